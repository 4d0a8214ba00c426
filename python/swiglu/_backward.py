"""The gradients of ``forward`` and ``ffn``: by the runtime's steps on a GPU, ``torch.ops.swiglu.backward``, else by torch's operations.

The steps serve gradients of x, of both weights of the gate or of all; what remains, float64, DTensors, gradients to be
differentiated again and torch.func are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, _steps
from ._ffn import ffn_op, ffn_saving_op
from ._gate import gate_gradients, gate_op
from ._library import define, is_batch, is_plain_call, is_transformed, register_gradients, tell_flop_counter
from ._op import forward_op, forward_saving_op, run_saving
from ._operands import as_dense, as_rows, as_weights, is_dtensor, lay
from ._steps import Gradients
from ._straight import empty


def gradients(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    needs: tuple[bool, ...],
    in_place: bool = False,
) -> Gradients:
    """Of x, gate, up, down and both biases, where ``needs`` says so.

    Without ``down``, ``dy`` is the gradient of z. ``g`` and ``u`` are the pre-activations, whose gradients take their place if
    ``in_place``; where they are None, they are computed again, which takes the biases.
    """
    dy = as_dense(dy)
    operands = (dy, x, gate, up, down, gate_bias, up_bias, g, u)
    # Of operands that are not alike torch says what is wrong.
    alike = all(t is None or (t.dtype is x.dtype and t.device == x.device) for t in operands)
    if alike and are_of_steps(needs) and _steps.is_supported(x) and not torch.is_grad_enabled():
        if is_plain_call(*operands):
            return _launched(*operands, needs, True, in_place)
        if not (is_transformed() or is_batch(dy) or any(map(is_dtensor, (dy, x, gate)))):
            tell_flop_counter()
            found = iter(backward_op(*operands, needs))
            return tuple(next(found) if need else None for need in needs)
    return _plain(*operands, needs)


def are_of_steps(needs: Sequence[bool]) -> bool:
    """Whether the steps serve these gradients: of x, of both weights of the gate or of all."""
    need_x, need_gate, need_up, *_ = needs
    return need_gate == need_up and (need_x or need_gate)


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
            d_down = _as_matrix(dy).t() @ _as_matrix(gate_op(g, u))
        dz = dy @ down if need_dg or need_du else None
    if dz is not None:
        dg, du = gate_gradients(dz, g, u, need_dg, need_du)
    dg, du = (d if d is None or more is None else d + more for d, more in zip((dg, du), arrived))
    rows = _as_matrix(x)
    dg, du = (None if d is None else _as_matrix(d) for d in (dg, du))
    return (
        torch.addmm(dg @ gate, du, up).reshape(x.shape) if need_x else None,
        dg.t() @ rows if need_gate else None,
        du.t() @ rows if need_up else None,
        d_down,
        dg.sum(0) if need_gate_bias else None,
        du.sum(0) if need_up_bias else None,
    )


def _as_matrix(tensor: Tensor) -> Tensor:
    """Of all tokens: torch guesses no number of rows where there are no columns."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


# ---- the runtime's steps ----


def _launched(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs, together=False, in_place=False) -> Gradients:
    """Three launches of the forward's, four of the block's, and one more where the pre-activations are computed again."""
    if not _steps.serves(x, gate, dy):
        return _without_steps(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs)
    # Each is copied once, if at all, and kept in a name until the last launch.
    layer, rows, first, second = lay(x, gate, up)
    dy, dy_stride = as_rows(dy)
    n, z = layer.n, None
    if g is None:
        z, g, u = run_saving(rows, gate, up, gate_bias, up_bias)
        in_place = True
    g, u = g.contiguous(), u.contiguous()  # a hook may have laid them otherwise
    dg, du = (g, u) if in_place else (empty(g), empty(u))
    need_x, need_weights, _, need_down, need_gate_bias, need_up_bias = needs
    of_down, _matrix = (None, None) if down is None else _steps.lay_down(down)
    dx, d_gate, d_up, d_down, d_stride, down_stride = _new_gradients(x, gate, up, down, layer.layout, needs, together)
    new_z = empty(x, (layer.m, n)) if need_down and z is None else None
    _native.backward(
        _native.step,
        layer,
        (dy.data_ptr(), dy_stride),
        (rows.data_ptr(), layer.x_stride),
        (first.data_ptr(), layer.gate_stride, second.data_ptr(), layer.up_stride),
        of_down,
        (g.data_ptr(), n, u.data_ptr(), n),
        (dg.data_ptr(), n, du.data_ptr(), n),
        (dx.data_ptr(), layer.k) if need_x else None,
        (d_gate.data_ptr(), d_stride, d_up.data_ptr(), d_stride) if need_weights else None,
        (d_down.data_ptr(), down_stride) if need_down else None,
        None if new_z is None else (new_z.data_ptr(), n),
        None if z is None else (z.data_ptr(), n),
    )
    d_gate_bias = dg.view(-1, n).sum(0) if need_gate_bias else None
    d_up_bias = du.view(-1, n).sum(0) if need_up_bias else None
    return dx, d_gate, d_up, d_down, d_gate_bias, d_up_bias


def _new_gradients(x, gate, up, down, layout, needs, together):
    """For the gradients of x, gate, up and down, and the row strides of those of the gate's weights and of down."""
    need_x, need_weights, _, need_down, *_ = needs
    dx = empty(x) if need_x else None
    d_gate, d_up, stride = _steps.new_pair(gate, up, layout, together) if need_weights else (None, None, 0)
    d_down, down_stride = _steps.new_like(down) if need_down else (None, 0)
    return dx, d_gate, d_up, d_down, stride, down_stride


def _outputs(x, gate, up, down, needs) -> Gradients:
    """What :func:`_launched` returns, not yet written."""
    *found, _, _ = _new_gradients(x, gate, up, down, as_weights(gate, up)[-1], needs, False)
    n = gate.shape[0]
    return *found, *(x.new_empty(n) if need else None for need in needs[4:])


def _without_steps(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs) -> Gradients:
    """The same by torch's operations, of operands that are empty."""
    outputs = _outputs(x, gate, up, down, needs)
    for output, value in zip(outputs, _plain(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs)):
        if output is not None:
            output.copy_(value)
    return outputs


def _run(*operands_and_needs):
    return [gradient for gradient in _launched(*operands_and_needs) if gradient is not None]


def _fake(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs):
    return [output for output in _outputs(x, gate, up, down, needs) if output is not None]


def _plain_of_needed(*operands_and_needs):
    return [gradient for gradient in _plain(*operands_and_needs) if gradient is not None]


def _flops(_dy, x, gate, _up, down, _gate_bias, _up_bias, saved_gate, _saved_up, needs, **_results) -> int:
    need_x, need_gate, need_up, need_down, *_ = needs
    of_gate = 2 * (saved_gate is None) + 2 * need_x + need_gate + need_up
    of_down = 0 if down is None else prod(down) * (1 + need_down)
    return 2 * prod(x[:-1]) * (of_gate * prod(gate) + of_down)


backward_op = define(
    "backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor? down, Tensor? gate_bias, Tensor? up_bias, Tensor? saved_gate, "
    "Tensor? saved_up, bool[] needs) -> Tensor[]",
    _run,
    _fake,
    _plain_of_needed,
    _flops,
)


# ---- what autograd calls ----


def _setup_nothing(ctx, inputs, output):
    pass


def _refuse_again(ctx, *_gradients):
    raise NotImplementedError("torch.ops.swiglu.backward has no gradients: call the forward under torch.enable_grad()")


def _setup_forward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _setup_forward_saving(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the pre-activations are not asked for by anyone: no zeros for them
    ctx.save_for_backward(*inputs, *output[1:])


def _backward_forward(ctx, dz):
    x, gate, up, *biases = ctx.saved_tensors
    return _without_down(gradients(dz, x, gate, up, None, *biases, None, None, _needs(ctx)))


def _backward_forward_saving(ctx, dz, grad_g, grad_u):
    x, gate, up, *others = ctx.saved_tensors  # once: checkpointing refuses a second time
    return _without_down(_of_saving(dz, x, gate, up, None, *others, _needs(ctx), (grad_g, grad_u)))


def _needs(ctx) -> tuple[bool, ...]:
    # The dispatcher drops trailing arguments that equal their defaults.
    x, gate, up, gate_bias, up_bias = (*ctx.needs_input_grad, False, False)[:5]
    return x, gate, up, False, gate_bias, up_bias


def _without_down(found: Gradients) -> Gradients:
    return *found[:3], *found[4:]


def _of_saving(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs, arrived) -> Gradients:
    if dy is None:
        dy = g.new_zeros((*x.shape[:-1], (gate if down is None else down).shape[0]))
    if torch.is_grad_enabled():  # from the operands again, on which the pre-activations depend
        g = u = None
    if arrived[0] is not None or arrived[1] is not None:
        return _plain(as_dense(dy), x, gate, up, down, gate_bias, up_bias, g, u, needs, arrived)
    return gradients(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs)


def _setup_ffn(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])


def _setup_ffn_saving(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output[1:])


def _backward_ffn(ctx, dy):
    x, gate, up, down, *biases = ctx.saved_tensors
    *needs, need_bias = ctx.needs_input_grad
    return *gradients(dy, x, gate, up, down, *biases, None, None, needs), down_bias_gradient(dy, need_bias)


def _backward_ffn_saving(ctx, dy, grad_g, grad_u):
    *needs, need_bias = ctx.needs_input_grad
    return *_of_saving(dy, *ctx.saved_tensors, needs, (grad_g, grad_u)), down_bias_gradient(dy, need_bias)


def down_bias_gradient(dy: Tensor | None, need: bool) -> Tensor | None:
    """The sum over all tokens, where it is needed and anything arrived."""
    return _as_matrix(as_dense(dy)).sum(0) if need and dy is not None else None


register_gradients(backward_op, _setup_nothing, _refuse_again)
register_gradients(forward_op, _setup_forward, _backward_forward)
register_gradients(forward_saving_op, _setup_forward_saving, _backward_forward_saving)
register_gradients(ffn_op, _setup_ffn, _backward_ffn)
register_gradients(ffn_saving_op, _setup_ffn_saving, _backward_ffn_saving)
