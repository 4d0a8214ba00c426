"""``silu(gate) * up`` elementwise: ``torch.ops.swiglu.gate`` of two tensors, ``gate_packed`` of two halves of one.

:func:`silu_mul` and :func:`silu_mul_backward` are all that computes: a kernel on a GPU, else torch's operations.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _steps
from ._library import define, is_plain_call, recorded, register_autocast, register_gradients
from ._operands import as_dense, bad_type, bad_value, check_dtype, check_tensor
from ._straight import empty

_LONGEST_ROW = 2**20


def silu_mul(gate: Tensor, up: Tensor, z: Tensor) -> None:
    """Writes ``silu(gate) * up`` to ``z``: computed in float32 (float64 of float64), rounded once. Any strides."""
    if _goes_by_rows(gate):
        return _steps.gate(gate, up, z)
    torch.mul(F.silu(gate.to(_wide(gate))), up, out=z)


def silu_mul_backward(dz: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Writes the gradients of :func:`silu_mul`, each rounded once. Any strides."""
    if _goes_by_rows(gate):
        return _steps.gate_backward(dz, gate, up, dgate, dup)
    silu, slope, _ = _silu_derivatives(gate)
    torch.mul(dz, silu, out=dup)
    torch.mul(slope.mul_(up), dz, out=dgate)


def _goes_by_rows(gate: Tensor) -> bool:
    """Whether a kernel serves: each length of a row has a plan of its own, which vectors of any length are not worth."""
    return gate.dim() > 1 and gate.shape[-1] <= _LONGEST_ROW and _steps.serves(gate)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _silu_derivatives(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu and its first derivative, and sigmoid, of which the second is made."""
    gate = gate.to(_wide(gate))
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid), sigmoid


def check_pair(gate: Tensor, up: Tensor) -> None:
    """Raises TypeError (number format) or ValueError (shape, device) with the argument's name."""
    if gate is None:
        check_tensor("gate", gate)
    check_dtype("gate", gate)
    if up.shape != gate.shape:
        bad_value("up", f"has shape {list(up.shape)}, expected {list(gate.shape)} as `gate`")
    if up.dtype != gate.dtype:
        bad_type("up", f"is {up.dtype}, expected {gate.dtype} as `gate`")
    if up.device != gate.device:
        bad_value("up", f"is on {up.device}, expected {gate.device} as `gate`")


def check_packed(gate_up: Tensor) -> None:
    """As :func:`check_pair`, of one tensor with both halves."""
    if gate_up is None:
        check_tensor("gate", gate_up)
    check_dtype("gate", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        bad_value("gate", f"has shape {list(gate_up.shape)}, expected [..., 2N] when `up` is not given")


def _halves(gate_up: Tensor, up_first: bool) -> tuple[Tensor, Tensor]:
    first, second = gate_up.chunk(2, -1)
    return (second, first) if up_first else (first, second)


def _joined(gate: Tensor, up: Tensor, up_first: bool) -> Tensor:
    return torch.cat((up, gate) if up_first else (gate, up), -1)


# ---- two tensors ----


def run_gate(gate: Tensor, up: Tensor) -> Tensor:
    """What computes, of CPU and CUDA tensors; no gradients."""
    check_pair(gate, up)
    z = empty(gate)
    silu_mul(gate, up, z)
    return z


def _fake(gate, up):
    check_pair(gate, up)
    return gate.new_empty(gate.shape)


def _plain(gate, up):
    check_pair(gate, up)
    return (F.silu(gate.to(_wide(gate))) * up).to(gate.dtype)


def _run_backward(dz: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty(gate), empty(up)
    silu_mul_backward(dz, gate, up, dgate, dup)
    return dgate, dup


def _fake_backward(dz, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _plain_backward(dz, gate, up):
    silu, slope, _ = _silu_derivatives(gate)
    return (slope * up * dz).to(gate.dtype), (dz * silu).to(up.dtype)


gate_op = define("gate(Tensor gate, Tensor up) -> Tensor", run_gate, _fake, _plain)
gate_backward_op = define(
    "gate_backward(Tensor dz, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _plain_backward,
)


def gate_gradients(dz: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool):
    """The gradients asked for, None for the others; ``up`` matters only to the gate's."""
    dz = as_dense(dz)
    if need_gate:
        dgate, dup = _straight(_run_backward, gate_backward_op, dz, gate, up)
        return dgate, dup if need_up else None
    return None, _straight(run_gate, gate_op, gate, dz) if need_up else None


def _straight(run, op, *operands):
    """``op`` of ``operands``, past torch's dispatcher where nothing waits there and nobody differentiates again."""
    tensors = (tensor for tensor in operands if isinstance(tensor, Tensor))
    return (op if torch.is_grad_enabled() or not is_plain_call(*tensors) else run)(*operands)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dz):
    return gate_gradients(dz, *ctx.saved_tensors, *ctx.needs_input_grad)


def _second_gradients(dz, gate, up, grad_dgate, grad_dup):
    """Of ``dgate = dz * up * silu'(gate)`` and ``dup = dz * silu(gate)``, in torch's operations."""
    silu, slope, sigmoid = _silu_derivatives(gate)
    curve = (sigmoid * (1 - sigmoid)) * (2 + gate * (1 - 2 * sigmoid))
    by_dz = grad_dgate * up * slope + grad_dup * silu
    by_gate = (grad_dgate * up * curve + grad_dup * slope) * dz
    by_up = grad_dgate * dz * slope
    return by_dz.to(dz.dtype), by_gate.to(gate.dtype), by_up.to(up.dtype)


def _second_backward(ctx, grad_dgate, grad_dup):
    return _second_gradients(*ctx.saved_tensors, grad_dgate, grad_dup)


def _record(ctx, gate, up):
    ctx.save_for_backward(gate, up)
    return run_gate(gate, up)


gate_recorded = recorded("gate_recorded", _record, _backward)
register_gradients(gate_op, _save_inputs, _backward)
register_gradients(gate_backward_op, _save_inputs, _second_backward)


# ---- two halves of one ----


def run_gate_packed(gate_up: Tensor, up_first: bool) -> Tensor:
    """The same of one tensor with both halves."""
    check_packed(gate_up)
    gate, up = _halves(gate_up, up_first)
    return run_gate(gate, up)


def _fake_packed(gate_up, up_first):
    check_packed(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _plain_packed(gate_up, up_first):
    check_packed(gate_up)
    return _plain(*_halves(gate_up, up_first))


def _run_packed_backward(dz: Tensor, gate_up: Tensor, up_first: bool) -> Tensor:
    grad = empty(gate_up)
    silu_mul_backward(dz, *_halves(gate_up, up_first), *_halves(grad, up_first))
    return grad


def _fake_packed_backward(dz, gate_up, up_first):
    return gate_up.new_empty(gate_up.shape)


def _plain_packed_backward(dz, gate_up, up_first):
    return _joined(*_plain_backward(dz, *_halves(gate_up, up_first)), up_first)


gate_packed_op = define(
    "gate_packed(Tensor gate_up, bool up_first) -> Tensor", run_gate_packed, _fake_packed, _plain_packed
)
gate_packed_backward_op = define(
    "gate_packed_backward(Tensor dz, Tensor gate_up, bool up_first) -> Tensor",
    _run_packed_backward,
    _fake_packed_backward,
    _plain_packed_backward,
)


def _save_packed(ctx, inputs, output):
    *tensors, ctx.up_first = inputs
    ctx.save_for_backward(*tensors)


def _packed_backward(ctx, dz):
    (gate_up,) = ctx.saved_tensors
    return _straight(_run_packed_backward, gate_packed_backward_op, as_dense(dz), gate_up, ctx.up_first), None


def _packed_second_backward(ctx, grad):
    dz, gate_up = ctx.saved_tensors
    parts = (*_halves(gate_up, ctx.up_first), *_halves(grad, ctx.up_first))
    by_dz, by_gate, by_up = _second_gradients(dz, *parts)
    return by_dz, _joined(by_gate, by_up, ctx.up_first), None


def _record_packed(ctx, gate_up, up_first):
    ctx.save_for_backward(gate_up)
    ctx.up_first = up_first
    return run_gate_packed(gate_up, up_first)


gate_packed_recorded = recorded("gate_packed_recorded", _record_packed, _packed_backward)
register_gradients(gate_packed_op, _save_packed, _packed_backward)
register_gradients(gate_packed_backward_op, _save_packed, _packed_second_backward)


def _promoted(_device_type: str, tensors: list[Tensor]) -> torch.dtype:
    """As ``silu(gate) * up`` in torch's own operations: autocast leaves the format, a mixed pair gets the wider."""
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


register_autocast(gate_op, _promoted)
