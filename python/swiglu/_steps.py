"""The steps of a feed-forward block beside the fused forward, on CUDA tensors: each is one launch on the current stream.

Weights are as for ``nn.Linear``, in either memory order. What a kernel reads is copied only where no row stride describes it,
what it writes lies as :func:`as_rows` wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from . import _native, _straight
from ._operands import DTYPES, are_halves, as_rows, as_weights, dtype_word, stream_of
from ._straight import empty

_MAJOR = {"separate_nk": "k_major", "separate_kn": "n_major"}
_ANY_MAJOR = "k_major"  # of a step without weights


def run_on(device: int) -> bool:
    """Whether the steps run there: on GPUs, not on the CPU, which is -1."""
    return device >= 0


def is_supported(x: Tensor) -> bool:
    """Whether the steps run on tensors such as ``x``, on a CPU or GPU."""
    return run_on(x.get_device()) and x.dtype in DTYPES


def serves(x: Tensor, *others: Tensor) -> bool:
    """The same of the operands of one call, none of which may be empty: an empty one has no address."""
    if not is_supported(x) or not x.numel():
        return False
    for tensor in others:
        if not tensor.numel():
            return False
    return True


def prepare(device: int, dtype: str, transposed: bool, n: int, k: int, out: int, training: bool, static: bool) -> None:
    """Compiles and loads what is launched for these sizes and weights, that of a backward too if ``training``.

    ``out`` are the rows of the down projection.
    """
    major = "n_major" if transposed else "k_major"
    ops = [("down", major, out), ("gate", _ANY_MAJOR, n)]
    if static:
        ops += [("down_static", major, out)]
    if training:
        ops += [("dgated", major, out), ("down_weight_grad", major, out)]
        ops += [("input_grad", major, k), ("weight_grad", major, k), ("gate_backward", _ANY_MAJOR, n)]
    for op, op_major, columns in ops:
        _native.prepare_step(device, dtype, op, op_major, n, columns)


def _launcher(like: Tensor, m: int) -> Callable[..., None]:
    """What launches steps on ``m`` tokens, on the GPU and in the number format of ``like``.

    It takes op, major, n, k, the groups left, right, saved and out as the runtime's ``RawStep`` has them, and the address of a
    bias or 0. A group is the address and row stride of each of its matrices in turn: whoever launches keeps their tensors.
    """
    device = like.get_device()
    return partial(_native.step, device, dtype_word(like.dtype, device), stream_of(device), m)


def gate(g: Tensor, u: Tensor, z: Tensor) -> None:
    """``z = silu(g) * u``."""
    n = g.shape[-1]
    (g, g_stride), (u, u_stride), (z, z_stride) = as_rows(g), as_rows(u), as_rows(z)
    saved = (g.data_ptr(), g_stride, u.data_ptr(), u_stride)
    _launcher(z, z.numel() // n)("gate", _ANY_MAJOR, n, n, (), (), saved, (z.data_ptr(), z_stride), 0)


def gate_backward(dz: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
    """The gradients of :func:`gate`; ``dg`` and ``du`` may be any of the inputs."""
    n = g.shape[-1]
    (dz, dz_stride), (g, g_stride), (u, u_stride) = as_rows(dz), as_rows(g), as_rows(u)
    (dg, dg_stride), (du, du_stride) = as_rows(dg), as_rows(du)
    saved = (g.data_ptr(), g_stride, u.data_ptr(), u_stride)
    out = (dg.data_ptr(), dg_stride, du.data_ptr(), du_stride)
    launch = _launcher(dg, g.numel() // n)
    launch("gate_backward", _ANY_MAJOR, n, n, (dz.data_ptr(), dz_stride), (), saved, out, 0)


def down(z: Tensor, weight: Tensor, bias: Tensor | None, static: bool) -> Tensor | None:
    """``z @ weight.T + bias``; None where the steps do not serve. ``static``: nothing that may still run writes ``weight``."""
    if not is_supported(z):
        return None
    native = _straight.native
    if native is not None and (y := native.down(_native.step, z, weight, bias, static)) is not None:
        return y
    if not serves(z, weight):
        return None
    k, n = weight.shape
    y = empty(z, (*z.shape[:-1], k))
    rows, stride = as_rows(z)
    matrix, matrix_stride, major = _as_weight(weight)
    bias = None if bias is None else bias.contiguous()
    left, right = (rows.data_ptr(), stride), (matrix.data_ptr(), matrix_stride)
    shift = 0 if bias is None else bias.data_ptr()
    _launcher(y, z.numel() // n)("down", major, n, k, left, right, (), (y.data_ptr(), k), shift)
    return y


# Rows of a down projection, the step's word for its order, address and row stride.
Down = tuple[int, str, tuple[int, int]]
Gradients = tuple["Tensor | None", ...]


def lay_down(weight: Tensor) -> tuple[Down, Tensor]:
    """How a down projection lies, and the matrix that lies so: keep it until the last launch."""
    matrix, stride, major = _as_weight(weight)
    return (weight.shape[0], major, (matrix.data_ptr(), stride)), matrix


def new_pair(gate: Tensor, up: Tensor, layout: str, together: bool) -> tuple[Tensor, Tensor, int]:
    """For gradients of both weights of the gate, and their row stride."""
    transposed = layout == "separate_kn"
    rows, cols = gate.shape
    if together and gate._is_view() and (are_halves(gate, up) or are_halves(up, gate)):
        first, second = empty(gate, (2 * rows, cols), transposed).chunk(2)
        first, second = (first, second) if are_halves(gate, up) else (second, first)
        return first, second, 2 * rows if transposed else cols
    return empty(gate, None, transposed), empty(up, None, transposed), rows if transposed else cols


def new_like(weight: Tensor) -> tuple[Tensor, int]:
    """For the gradient of one weight, and its row stride."""
    transposed = _as_weight(weight)[-1] == "n_major"
    return empty(weight, None, transposed), weight.shape[0 if transposed else 1]


def _as_weight(weight: Tensor) -> tuple[Tensor, int, str]:
    """As :func:`as_weights`, of one matrix: with its row stride and the step's word for its order."""
    matrix, stride, _, _, layout = as_weights(weight, weight)
    return matrix, stride, _MAJOR[layout]
