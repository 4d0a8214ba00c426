"""``forward`` and ``swiglu_ffn`` of plain tensors, past torch's dispatcher.

With few tokens the host's pace decides, so one native call reads the operands and launches. What it says of how they lie the
backward asks about again, and launches straight from their addresses. Whatever came in between (hooks, modes, gradients to be
differentiated again, ...) leaves that to :func:`gradients`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from . import _native, _steps, _straight
from ._backward import are_of_steps, down_bias_gradient, gradients
from ._ffn import check_ffn, project, run_ffn
from ._library import is_undisturbed_backward, recorded
from ._op import run, run_keeping
from ._operands import check
from ._static import is_promised
from ._straight import are_plain


def call(x, gate, up, down, gate_bias, up_bias, down_bias, keep, recording) -> Tensor | None:
    """z, or y where ``down`` is given; None where an operand is not plain. ``keep`` the pre-activations, if ``recording``.

    Nothing may wait in torch's dispatcher.
    """
    native, operands = _straight.native, (x, gate, up, down, gate_bias, up_bias, down_bias)
    if recording:
        done = None if native is None else native.forward_recorded(*operands, keep)
        return _recorded_call(*operands, keep, done) if done is not None or are_plain(*operands) else None
    static = is_promised()
    z = None if native is None else native.forward(*operands, static)
    if z is not None:
        return z if down is None else project(z, down, down_bias, static)
    if not are_plain(*operands):
        return None
    if down is None:
        return run(x, gate, up, gate_bias, up_bias)
    return run_ffn(x, gate, up, down, gate_bias, up_bias, down_bias)


def _forward(ctx, x, gate, up, down, gate_bias, up_bias, down_bias, keep, done):
    if done is None:
        if down is None:
            check(x, gate, up, gate_bias, up_bias)
        else:
            check_ffn(x, gate, up, down, gate_bias, up_bias, down_bias)
        done = *run_keeping(x, gate, up, gate_bias, up_bias, keep), None
    z, kept, layer = done
    ctx.layer = layer if layer is not None and _steps.run_on(layer.device) else None
    ctx.save_for_backward(x, gate, up, down, gate_bias, up_bias, kept)
    ctx.has_overwritten_kept = False
    return z if down is None else project(z, down, down_bias)


def _backward(ctx, dy):
    saved = ctx.saved_tensors  # once: checkpointing refuses a second time
    if ctx.has_overwritten_kept:
        raise RuntimeError(
            "an earlier backward broke off after it had overwritten what was saved; run the forward again"
        )
    x, gate, up, down, gate_bias, up_bias, kept = saved
    needs, again = ctx.needs_input_grad, torch.is_grad_enabled()
    # The gradients of what was kept take its place in the last backward that reads it.
    ctx.has_overwritten_kept = in_place = kept is not None and not _get_current_graph_task_keep_graph()
    d_down_bias = down_bias_gradient(dy, True) if needs[6] else None
    layer = ctx.layer
    if layer is not None and not again and is_undisturbed_backward():
        found = _by_address(layer, dy, saved, in_place, needs)
        if found is not None:
            dx, d_gate, d_up, d_down = found
            return dx, d_gate, d_up, d_down, None, None, d_down_bias, None, None
    g = u = None
    if kept is not None and not again:  # it has no gradients of its own: from the operands again
        g, u = kept.view(2, *x.shape[:-1], gate.shape[0]).unbind()
    found = gradients(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs[:6], in_place)
    return *found, d_down_bias, None, None


def _by_address(layer, dy, saved, in_place, needs):
    """The gradients of x, gate, up and down.

    None where the steps do not serve those needed, or anything lies otherwise than in the forward: whoever swaps a tensor's
    memory, or unpacks another, may do so.
    """
    x, gate, up, down, gate_bias, up_bias, kept = saved
    need_x, need_weights, _, need_down, need_gate_bias, need_up_bias, *_ = needs
    if need_gate_bias or need_up_bias or not are_of_steps(needs):  # biases take views
        return None
    native, pair = _straight.native, None
    if need_weights and gate._is_view():
        pair = _steps.new_pair(gate, up, layer.layout, True)[:2]
    more = (x, gate, up, down, gate_bias, up_bias, kept, pair, in_place, need_x, need_weights, need_down)
    found = native.backward(_native.step, layer, dy, *more)
    if found is None and are_plain(dy) and not dy.is_contiguous():
        found = native.backward(_native.step, layer, dy.contiguous(), *more)
    return found


_recorded_call = recorded("swiglu_recorded", _forward, _backward)
