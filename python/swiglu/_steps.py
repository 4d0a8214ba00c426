"""The steps of a feed-forward block beside the fused forward, on CUDA tensors: each is one launch on the current stream.

Weights are as for ``nn.Linear``, in either memory order; weight gradients are written in the memory order of their tensor.
What a kernel reads is copied only where no row stride describes it, what it writes lies as :func:`as_rows` wants it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from . import _native
from ._operands import DTYPES, as_rows, as_weights, dtype_word, stream_of

_MAJOR = {"separate_nk": "k_major", "separate_kn": "n_major"}
_ANY_MAJOR = "k_major"  # of a step without weights

Matrix = tuple[Tensor, int]  # and its row stride; held until the launch, because a copy must not be freed before


def is_supported(x: Tensor) -> bool:
    """Whether the steps run on tensors such as ``x``."""
    return x.is_cuda and x.dtype in DTYPES


def serves(x: Tensor, *others: Tensor) -> bool:
    """The same of the operands of one call, none of which may be empty: an empty one has no address."""
    return is_supported(x) and all(tensor.numel() for tensor in (x, *others))


def prepare(device: int, dtype: str, transposed: bool, n: int, k: int, training: bool) -> None:
    """Compiles and loads what the functions below launch for these sizes and weights, those of a backward if ``training``."""
    products = ("down", "dgated", "input_grad", "weight_grad", "down_weight_grad")
    for op in products if training else products[:1]:
        _native.prepare_step(device, dtype, op, "n_major" if transposed else "k_major", n, k)
    # Of a block whose weights are frozen in part, the gate is a launch of its own.
    for op in ("gate", "gate_backward") if training else ():
        _native.prepare_step(device, dtype, op, _ANY_MAJOR, n, n)


def gate(g: Tensor, u: Tensor, z: Tensor) -> None:
    """``z = silu(g) * u``."""
    n = g.shape[-1]
    _launch("gate", _ANY_MAJOR, n, n, g.numel() // n, saved=(as_rows(g), as_rows(u)), out=(as_rows(z),))


def gate_backward(dz: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
    """The gradients of :func:`gate`; ``dg`` and ``du`` may be any of the inputs."""
    n = g.shape[-1]
    saved, out = (as_rows(g), as_rows(u)), (as_rows(dg), as_rows(du))
    _launch("gate_backward", _ANY_MAJOR, n, n, g.numel() // n, left=(as_rows(dz),), saved=saved, out=out)


def down(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``z @ weight.T + bias``."""
    k, n = weight.shape
    y = z.new_empty((*z.shape[:-1], k))
    matrix, major = _as_weight(weight)
    bias = None if bias is None else bias.contiguous()
    _launch("down", major, n, k, z.numel() // n, left=(as_rows(z),), right=(matrix,), out=((y, k),), bias=bias)
    return y


def dgated(dy: Tensor, weight: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, z: Tensor | None) -> None:
    """:func:`gate_backward` of ``dz = dy @ weight``; writes ``silu(g) * u`` to ``z`` if given."""
    k, n = weight.shape
    matrix, major = _as_weight(weight)
    out = [as_rows(tensor) for tensor in (dg, du, z) if tensor is not None]
    saved = (as_rows(g), as_rows(u))
    _launch("dgated", major, n, k, g.numel() // n, (as_rows(dy),), (matrix,), saved, out=out)


def input_grad(dg: Tensor, du: Tensor, w_gate: Tensor, w_up: Tensor, dx: Tensor) -> None:
    """``dx = dg @ w_gate + du @ w_up``, one sum."""
    n, k = w_gate.shape
    first, first_stride, second, second_stride, layout = as_weights(w_gate, w_up)
    left, right = (as_rows(dg), as_rows(du)), ((first, first_stride), (second, second_stride))
    _launch("input_grad", _MAJOR[layout], n, k, dg.numel() // n, left, right, out=(as_rows(dx),))


def weight_grad(dg: Tensor, du: Tensor, x: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """``d_gate = dg.T @ x`` and ``d_up = du.T @ x``."""
    n, k = d_gate.shape
    first, first_stride, second, second_stride, layout = as_weights(d_gate, d_up)
    left, right = [as_rows(dg), as_rows(du)], [as_rows(x)]
    if layout == "separate_kn":
        left, right = right, left
    out = ((first, first_stride), (second, second_stride))
    _launch("weight_grad", _MAJOR[layout], n, k, dg.numel() // n, left, right, out=out)


def down_weight_grad(dy: Tensor, z: Tensor, d_down: Tensor) -> None:
    """``d_down = dy.T @ z``."""
    k, n = d_down.shape
    matrix, major = _as_weight(d_down)
    left, right = [as_rows(dy)], [as_rows(z)]
    if major == "n_major":
        left, right = right, left
    _launch("down_weight_grad", major, n, k, z.numel() // n, left, right, out=(matrix,))


def _as_weight(weight: Tensor) -> tuple[Matrix, str]:
    """As :func:`as_weights`, of one matrix."""
    matrix, stride, _, _, layout = as_weights(weight, weight)
    return (matrix, stride), _MAJOR[layout]


def _launch(
    op: str,
    major: str,
    n: int,
    k: int,
    m: int,
    left: Iterable[Matrix] = (),
    right: Iterable[Matrix] = (),
    saved: Iterable[Matrix] = (),
    *,
    out: Sequence[Matrix],
    bias: Tensor | None = None,
) -> None:
    result = out[0][0]
    device = result.get_device()
    _native.step(
        device,
        dtype_word(result.dtype, device),
        op,
        major,
        n,
        k,
        stream_of(device),
        m,
        _addresses(left),
        _addresses(right),
        _addresses(saved),
        _addresses(out),
        0 if bias is None else bias.data_ptr(),
    )


def _addresses(matrices: Iterable[Matrix]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), stride) for tensor, stride in matrices]
