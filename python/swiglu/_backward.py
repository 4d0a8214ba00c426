"""The gradients of ``forward`` and ``ffn``: by the runtime's steps on a GPU, ``torch.ops.swiglu.backward``, else by torch's operations.

The steps serve gradients of x, of both weights of the gate or of all; what remains, float64, DTensors, gradients to be
differentiated again and torch.func are torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _steps
from ._ffn import ffn_op, ffn_saving_op, run_ffn, run_ffn_saving
from ._gate import gate_gradients, gate_op
from ._library import define, is_batch, is_plain_call, is_transformed, may_overwrite_saved, register_gradients
from ._op import forward_op, forward_saving_op, run, run_saving
from ._operands import are_halves, as_rows, as_weights, is_dtensor

Gradients = tuple[Tensor | None, ...]


def gradients(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    saved: tuple[Tensor | None, Tensor | None],
    needs: tuple[bool, ...],
    in_place: bool = False,
) -> Gradients:
    """Of x, gate, up, down and both biases, where ``needs`` says so.

    Without ``down``, ``dy`` is the gradient of z. ``saved`` are the pre-activations, whose gradients take their place if
    ``in_place``; where they are None, they are computed again, which takes the biases.
    """
    operands = (dy, x, gate, up, down, *biases, *saved)
    if not _by_steps(dy, x, gate, needs):
        return _plain(*operands, needs)
    plain = is_plain_call(*operands)
    found = iter(_launched(*operands, needs, True, in_place) if plain else backward_op(*operands, needs))
    return tuple(next(found) if need else None for need in needs)


def _by_steps(dy: Tensor, x: Tensor, gate: Tensor, needs: tuple[bool, ...]) -> bool:
    need_x, need_gate, need_up, *_ = needs
    return (
        _steps.is_supported(x)
        and need_gate == need_up
        and (need_x or need_gate)
        and not torch.is_grad_enabled()
        and not is_transformed()
        and not is_batch(dy)
        and not any(map(is_dtensor, (dy, x, gate)))
    )


# ---- torch's operations ----


def _plain(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs, arrived=(None, None)):
    """``arrived`` are gradients of the pre-activations themselves, of those who asked for them."""
    need_x, need_gate, need_up, need_down, need_gate_bias, need_up_bias = needs
    need_dg, need_du = need_x or need_gate or need_gate_bias, need_x or need_up or need_up_bias
    if g is None:
        g = F.linear(x, gate, gate_bias)
        u = F.linear(x, up, up_bias) if need_dg or need_down else None
    dz, d_down, dg, du = dy, None, None, None
    if down is not None:
        if need_down:
            d_down = dy.reshape(-1, down.shape[0]).t() @ gate_op(g, u).reshape(-1, down.shape[1])
        dz = dy @ down if need_dg or need_du else None
    if dz is not None:
        dg, du = gate_gradients(dz, g, u, need_dg, need_du)
    dg, du = (d if d is None or more is None else d + more for d, more in zip((dg, du), arrived))
    n, k = gate.shape
    rows = x.reshape(-1, k)
    dg, du = (None if d is None else d.reshape(-1, n) for d in (dg, du))
    return (
        torch.addmm(dg @ gate, du, up).reshape(x.shape) if need_x else None,
        dg.t() @ rows if need_gate else None,
        du.t() @ rows if need_up else None,
        d_down,
        dg.sum(0) if need_gate_bias else None,
        du.sum(0) if need_up_bias else None,
    )


# ---- the runtime's steps ----


def _outputs(x, gate, up, down, needs, together=False) -> list[Tensor | None]:
    """The gradients' tensors; those of weights lie in memory as their weights do, if ``together`` also as halves of one."""
    need_x, need_weights, _, need_down, *need_biases = needs
    n = gate.shape[0]
    *_, layout = as_weights(gate, up)
    d_gate = d_up = None
    if need_weights and together and (are_halves(gate, up) or are_halves(up, gate)):
        both = _new(gate, layout, 2)
        d_gate, d_up = (both[:n], both[n:]) if are_halves(gate, up) else (both[n:], both[:n])
    elif need_weights:
        d_gate, d_up = _new(gate, layout), _new(up, layout)
    d_down = _new(down, as_weights(down, down)[-1]) if need_down else None
    d_biases = [x.new_empty(n) if need else None for need in need_biases]
    return [x.new_empty(x.shape) if need_x else None, d_gate, d_up, d_down, *d_biases]


def _new(weight: Tensor, layout: str, count: int = 1) -> Tensor:
    """For ``count`` matrices such as ``weight``, one below the other."""
    rows, cols = weight.shape[0] * count, weight.shape[1]
    return weight.new_empty((cols, rows)).t() if layout == "separate_kn" else weight.new_empty((rows, cols))


def _launched(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs, together=False, in_place=False):
    """Those of :func:`_outputs` that are needed: three launches of the forward's, four of the block's, and one more where the
    pre-activations are computed again."""
    outputs = _outputs(x, gate, up, down, needs, together)
    dx, d_gate, d_up, d_down, *d_biases = outputs
    if not _steps.serves(x, gate, dy):
        for output, value in zip(outputs, _plain(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs)):
            if output is not None:
                output.copy_(value)
        return [output for output in outputs if output is not None]
    dy, x = as_rows(dy)[0], as_rows(x)[0]  # copied once, if at all
    if g is None:
        z, g, u = run_saving(x, gate, up, gate_bias, up_bias)
        z_again, in_place = None, True
    else:
        z = z_again = g.new_empty(g.shape) if d_down is not None else None
    in_place = in_place and g.is_contiguous() and u.is_contiguous()  # a hook may have laid them otherwise
    dg, du = (g, u) if in_place else (g.new_empty(g.shape), g.new_empty(g.shape))
    if down is None:
        _steps.gate_backward(dy, g, u, dg, du)
    else:
        _steps.dgated(dy, down, g, u, dg, du, z_again)
    if dx is not None:
        _steps.input_grad(dg, du, gate, up, dx)
    if d_gate is not None:
        _steps.weight_grad(dg, du, x, d_gate, d_up)
    if d_down is not None:
        _steps.down_weight_grad(dy, z, d_down)
    for d_bias, d in zip(d_biases, (dg, du)):
        if d_bias is not None:
            torch.sum(d.view(-1, d.shape[-1]), 0, out=d_bias)
    return [output for output in outputs if output is not None]


def _fake(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs):
    return [output for output in _outputs(x, gate, up, down, needs) if output is not None]


backward_op = define(
    "backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor? down, Tensor? gate_bias, Tensor? up_bias, Tensor? saved_gate, "
    "Tensor? saved_up, bool[] needs) -> Tensor[]",
    _launched,
    _fake,
)


# ---- what autograd calls ----


def _setup_forward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _setup_forward_saving(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the pre-activations are not asked for by anyone: no zeros for them
    ctx.save_for_backward(*inputs, *output[1:])


def _backward_forward(ctx, dz):
    x, gate, up, *biases = ctx.saved_tensors
    return _without_down(gradients(dz, x, gate, up, None, biases, (None, None), _needs(ctx)))


def _backward_forward_saving(ctx, dz, grad_g, grad_u):
    x, gate, up, *others = ctx.saved_tensors  # once: checkpointing refuses a second time
    return _without_down(_of_saving(ctx, dz, x, gate, up, None, *others, _needs(ctx), (grad_g, grad_u)))


def _needs(ctx) -> tuple[bool, ...]:
    # The dispatcher drops trailing arguments that equal their defaults.
    x, gate, up, gate_bias, up_bias = (*ctx.needs_input_grad, False, False)[:5]
    return x, gate, up, False, gate_bias, up_bias


def _without_down(found: Gradients) -> Gradients:
    return *found[:3], *found[4:]


def _of_saving(ctx, dy, x, gate, up, down, gate_bias, up_bias, g, u, needs, arrived) -> Gradients:
    if dy is None:
        dy = g.new_zeros((*x.shape[:-1], (gate if down is None else down).shape[0]))
    if torch.is_grad_enabled():  # hidden outputs have no gradients: from the operands again
        g = u = None
    if getattr(ctx, "has_overwritten_saved", False):
        raise RuntimeError(
            "an earlier backward broke off after it had overwritten what was saved; run the forward again"
        )
    if arrived[0] is None and arrived[1] is None:
        ctx.has_overwritten_saved = may_overwrite_saved(ctx)
        return gradients(dy, x, gate, up, down, (gate_bias, up_bias), (g, u), needs, ctx.has_overwritten_saved)
    return _plain(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs, arrived)


def _setup_ffn(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])


def _setup_ffn_saving(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output[1:])


def _backward_ffn(ctx, dy):
    x, gate, up, down, *biases = ctx.saved_tensors
    *needs, need_bias = ctx.needs_input_grad
    return *gradients(dy, x, gate, up, down, biases, (None, None), needs), _down_bias(dy, need_bias)


def _backward_ffn_saving(ctx, dy, grad_g, grad_u):
    *needs, need_bias = ctx.needs_input_grad
    return *_of_saving(ctx, dy, *ctx.saved_tensors, needs, (grad_g, grad_u)), _down_bias(dy, need_bias)


def _down_bias(dy: Tensor | None, need: bool) -> Tensor | None:
    return dy.reshape(-1, dy.shape[-1]).sum(0) if need and dy is not None else None


forward_recorded = register_gradients(forward_op, run, _setup_forward, _backward_forward)
forward_saving_recorded = register_gradients(
    forward_saving_op, run_saving, _setup_forward_saving, _backward_forward_saving, hidden=2
)
ffn_recorded = register_gradients(ffn_op, run_ffn, _setup_ffn, _backward_ffn)
ffn_saving_recorded = register_gradients(
    ffn_saving_op, run_ffn_saving, _setup_ffn_saving, _backward_ffn_saving, hidden=2
)
