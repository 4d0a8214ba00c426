"""``forward`` and ``swiglu_ffn`` of plain tensors with gradients, past torch's dispatcher.

With few tokens the host's pace decides, so the forward remembers how its operands lie, and its backward launches straight from
their addresses. Whatever came in between (hooks, modes, gradients to be differentiated again, ...) leaves that to
:func:`gradients`.
"""

from __future__ import annotations

import torch
from torch._C._autograd import _get_current_graph_task_keep_graph

from . import _steps
from ._backward import are_of_steps, down_bias_gradient, gradients
from ._ffn import check_ffn, project
from ._library import is_plain_backward, recorded
from ._op import run_keeping
from ._operands import as_rows, check


def _forward(ctx, x, gate, up, down, gate_bias, up_bias, down_bias, keep):
    if down is None:
        check(x, gate, up, gate_bias, up_bias)
    else:
        check_ffn(x, gate, up, down, gate_bias, up_bias, down_bias)
    z, kept, layer = run_keeping(x, gate, up, gate_bias, up_bias, keep)
    ctx.save_for_backward(x, gate, up, down, gate_bias, up_bias, kept)
    ctx.has_overwritten_kept = False
    needs = ctx.needs_input_grad
    has_steps = layer is not None and _steps.is_supported(x) and (down is None or down.numel())
    if has_steps and are_of_steps(needs) and not (needs[4] or needs[5]):  # biases beside the gate take views
        ctx.layer, ctx.lie = layer, _lie(x, gate, up, down, kept)
    else:
        ctx.layer = None
    return z if down is None else project(z, down, down_bias)


def _lie(*tensors):
    """What launches by address rely on: whoever swaps a tensor's memory, or unpacks another, may change any of it."""
    return [t if t is None else (t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors]


def _backward(ctx, dy):
    saved = ctx.saved_tensors  # once: checkpointing refuses a second time
    if ctx.has_overwritten_kept:
        raise RuntimeError(
            "an earlier backward broke off after it had overwritten what was saved; run the forward again"
        )
    x, gate, up, down, gate_bias, up_bias, kept = saved
    needs, layer, again = ctx.needs_input_grad, ctx.layer, torch.is_grad_enabled()
    # The gradients of what was kept take its place in the last backward that reads it.
    ctx.has_overwritten_kept = in_place = kept is not None and not _get_current_graph_task_keep_graph()
    d_down_bias = down_bias_gradient(dy, True) if needs[6] else None
    if (
        layer is None
        or again
        or not is_plain_backward(dy, saved)
        or _lie(x, gate, up, down, kept) != ctx.lie
    ):
        g = u = None
        if kept is not None and not again:  # it has no gradients of its own: from the operands again
            g, u = kept.view(2, *x.shape[:-1], gate.shape[0]).unbind()
        found = gradients(dy, x, gate, up, down, gate_bias, up_bias, g, u, needs[:6], in_place)
        return *found, d_down_bias, None
    z = None
    if kept is None:
        z, kept, _ = run_keeping(x, gate, up, gate_bias, up_bias, True)
        in_place = True
    grads = kept if in_place else torch.empty_like(kept)
    dy, dy_stride = as_rows(dy)
    n, half, g, dg = layer.n, kept.nbytes // 2, kept.data_ptr(), grads.data_ptr()
    dx, d_gate, d_up, d_down = _steps.backward(
        layer,
        (dy.data_ptr(), dy_stride),
        (x.data_ptr(), layer.x_stride),
        (gate.data_ptr(), layer.gate_stride, up.data_ptr(), layer.up_stride),
        (g, n, g + half, n),
        (dg, n, dg + half, n),
        x,
        gate,
        up,
        down,
        z,
        needs,
        True,
    )
    return dx, d_gate, d_up, d_down, None, None, d_down_bias, None


recorded_call = recorded("swiglu_recorded", _forward, _backward)
"""Of x, gate, up, down, the three biases (None: there is none) and whether the pre-activations are kept."""
