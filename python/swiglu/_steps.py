"""The steps of a feed-forward block beside the fused forward, on CUDA tensors: each is one launch on the current stream.

Weights are as for ``nn.Linear``, in either memory order. What a kernel reads is copied only where no row stride describes it,
what it writes lies as :func:`as_rows` wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from . import _native
from ._operands import DTYPES, as_rows, as_weights, dtype_word, stream_of

MAJOR = {"separate_nk": "k_major", "separate_kn": "n_major"}
ANY_MAJOR = "k_major"  # of a step without weights


def is_supported(x: Tensor) -> bool:
    """Whether the steps run on tensors such as ``x``."""
    return x.is_cuda and x.dtype in DTYPES


def serves(x: Tensor, *others: Tensor) -> bool:
    """The same of the operands of one call, none of which may be empty: an empty one has no address."""
    if not is_supported(x) or not x.numel():
        return False
    for tensor in others:
        if not tensor.numel():
            return False
    return True


def prepare(device: int, dtype: str, transposed: bool, n: int, k: int, training: bool) -> None:
    """Compiles and loads what is launched for these sizes and weights, that of a backward too if ``training``."""
    products = ("down", "dgated", "input_grad", "weight_grad", "down_weight_grad")
    for op in products if training else products[:1]:
        _native.prepare_step(device, dtype, op, "n_major" if transposed else "k_major", n, k)
    # Of a block whose weights are frozen in part, the gate is a launch of its own.
    for op in ("gate", "gate_backward") if training else ():
        _native.prepare_step(device, dtype, op, ANY_MAJOR, n, n)


def launcher(like: Tensor, m: int) -> Callable[..., None]:
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
    launcher(z, z.numel() // n)("gate", ANY_MAJOR, n, n, (), (), saved, (z.data_ptr(), z_stride), 0)


def gate_backward(dz: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
    """The gradients of :func:`gate`; ``dg`` and ``du`` may be any of the inputs."""
    n = g.shape[-1]
    (dz, dz_stride), (g, g_stride), (u, u_stride) = as_rows(dz), as_rows(g), as_rows(u)
    (dg, dg_stride), (du, du_stride) = as_rows(dg), as_rows(du)
    saved = (g.data_ptr(), g_stride, u.data_ptr(), u_stride)
    out = (dg.data_ptr(), dg_stride, du.data_ptr(), du_stride)
    launch = launcher(dg, g.numel() // n)
    launch("gate_backward", ANY_MAJOR, n, n, (dz.data_ptr(), dz_stride), (), saved, out, 0)


def down(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``z @ weight.T + bias``."""
    k, n = weight.shape
    y = z.new_empty((*z.shape[:-1], k))
    rows, stride = as_rows(z)
    matrix, matrix_stride, major = as_weight(weight)
    bias = None if bias is None else bias.contiguous()
    left, right = (rows.data_ptr(), stride), (matrix.data_ptr(), matrix_stride)
    shift = 0 if bias is None else bias.data_ptr()
    launcher(y, z.numel() // n)("down", major, n, k, left, right, (), (y.data_ptr(), k), shift)
    return y


def as_weight(weight: Tensor) -> tuple[Tensor, int, str]:
    """As :func:`as_weights`, of one matrix: with its row stride and the step's word for its order."""
    matrix, stride, _, _, layout = as_weights(weight, weight)
    return matrix, stride, MAJOR[layout]
