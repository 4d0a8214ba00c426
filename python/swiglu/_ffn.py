"""The whole feed-forward block: ``torch.ops.swiglu.ffn``, and ``ffn_saving`` that keeps what its backward needs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor

from . import _steps
from ._library import autocast_dtype, define, register_autocast
from ._op import gemm_flops, plain_saving, run_keeping, run_saving
from ._operands import bad_type, bad_value, check, check_bias, check_tensors

NAMES = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
_OPERANDS = "Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up, Tensor? b_down"


def check_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    names: Sequence[str] = NAMES,
) -> None:
    """Raises TypeError (number format) or ValueError (shape, device) with the argument's name."""
    _, gate_name, up_name, down_name, gate_bias_name, up_bias_name, down_bias_name = names
    check(x, w_gate, w_up, b_gate, b_up, (gate_name, up_name, gate_bias_name, up_bias_name))
    n = w_gate.shape[0]
    if w_down.dim() != 2 or w_down.shape[1] != n:
        bad_value(down_name, f"has shape {list(w_down.shape)}, expected [out, {n}]: one column a row of `{gate_name}`")
    if w_down.dtype != x.dtype:
        bad_type(down_name, f"is {w_down.dtype}, expected {x.dtype} as `x`")
    if w_down.device != x.device:
        bad_value(down_name, f"is on {w_down.device}, expected {x.device} as `x`")
    if b_down is not None:
        check_bias(down_bias_name, b_down, x, w_down.shape[0])


def check_ffn_as(names: Sequence[str], *operands: Tensor | None) -> None:
    """As :func:`check_ffn`, of whatever a caller passed under these names."""
    check_tensors(names, operands, 4)
    check_ffn(*operands, names=names)  # type: ignore[arg-type]


def run_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    """The fused kernel and the down projection, of CPU and CUDA tensors; no gradients."""
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    return project(run_keeping(x, w_gate, w_up, b_gate, b_up, False)[0], w_down, b_down)


def run_ffn_saving(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    """As :func:`run_ffn`, with both pre-activations."""
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    z, g, u = run_saving(x, w_gate, w_up, b_gate, b_up)
    return project(z, w_down, b_down), g, u


def project(z: Tensor, w_down: Tensor, b_down: Tensor | None, static: bool = False) -> Tensor:
    """The down projection; no gradients. ``static``: nothing that may still run writes ``w_down``."""
    y = _steps.down(z, w_down, b_down, static)
    return F.linear(z, w_down, b_down) if y is None else y


def _fake(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


def _fake_saving(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    y = _fake(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    g, u = (x.new_empty((*x.shape[:-1], w_gate.shape[0])) for _ in range(2))
    return y, g, u


def _plain(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    return _plain_saving(x, w_gate, w_up, w_down, b_gate, b_up, b_down)[0]


def _plain_saving(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    z, g, u = plain_saving(x, w_gate, w_up, b_gate, b_up)
    return F.linear(z, w_down, b_down), g, u


def _flops(x: Sequence[int], w_gate: Sequence[int], _w_up, w_down: Sequence[int], *_biases, **_results) -> int:
    return gemm_flops(x, w_gate) + 2 * prod(x[:-1]) * prod(w_down)


ffn_op = define(f"ffn({_OPERANDS}) -> Tensor", run_ffn, _fake, _plain, _flops)
ffn_saving_op = define(
    f"ffn_saving({_OPERANDS}) -> (Tensor, Tensor, Tensor)", run_ffn_saving, _fake_saving, _plain_saving, _flops
)

register_autocast(ffn_op, autocast_dtype)
register_autocast(ffn_saving_op, autocast_dtype)
