"""The whole feed-forward block: ``torch.ops.swiglu.ffn``, and ``ffn_saving`` that keeps what its backward needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gate import gate_op, gradients
from ._library import autocast_dtype, define, lib, register_autocast
from ._op import projection_gradients, run, run_saving
from ._operands import bad_type, bad_value, check, check_bias

_NAMES = ("w_gate", "w_up", "b_gate", "b_up")
_OPERANDS = "Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up, Tensor? b_down"


def check_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> None:
    """Raises TypeError (number format) or ValueError (shape, device) with the argument's name."""
    check(x, w_gate, w_up, b_gate, b_up, _NAMES)
    if w_down.dim() != 2 or w_down.shape[1] != w_gate.shape[0]:
        bad_value(
            "w_down", f"has shape {list(w_down.shape)}, expected [out, {w_gate.shape[0]}]: one column a row of `w_gate`"
        )
    if w_down.dtype != x.dtype:
        bad_type("w_down", f"is {w_down.dtype}, expected {x.dtype} as `x`")
    if w_down.device != x.device:
        bad_value("w_down", f"is on {w_down.device}, expected {x.device} as `x`")
    if b_down is not None:
        check_bias("b_down", b_down, x, w_down)


def run_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    """The fused kernel and a GEMM, of CPU and CUDA tensors; no gradients."""
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    return F.linear(run(x, w_gate, w_up, b_gate, b_up), w_down, b_down)


def _run_saving(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    z, g, u = run_saving(x, w_gate, w_up, b_gate, b_up)
    return F.linear(z, w_down, b_down), g, u


def _fake(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    check_ffn(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


def _fake_saving(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
    y = _fake(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    g, u = (x.new_empty((*x.shape[:-1], w_gate.shape[0])) for _ in range(2))
    return y, g, u


ffn_op = define(f"ffn({_OPERANDS}) -> Tensor", run_ffn, _fake)
ffn_saving_op = define(f"ffn_saving({_OPERANDS}) -> (Tensor, Tensor, Tensor)", _run_saving, _fake_saving)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _setup_context_saving(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # g and u are not asked for by anyone: no zeros for them
    x, w_gate, w_up, w_down = inputs[:4]
    ctx.save_for_backward(x, w_gate, w_up, w_down, *output[1:])


def _backward(ctx, dy):
    x, w_gate, w_up, w_down, b_gate, b_up, _ = ctx.saved_tensors
    g, u = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    return _gradients(x, w_gate, w_up, w_down, g, u, dy, ctx.needs_input_grad)


def _backward_saving(ctx, dy, grad_g, grad_u):
    saved = ctx.saved_tensors  # once: checkpointing refuses a second time
    if dy is None:
        dy = saved[0].new_zeros((*saved[0].shape[:-1], saved[3].shape[0]))
    return _gradients(*saved, dy, ctx.needs_input_grad, grad_g, grad_u)


def _gradients(x, w_gate, w_up, w_down, g, u, dy, needs, grad_g=None, grad_u=None):
    """Of the seven operands, where ``needs`` says so; ``grad_g`` and ``grad_u`` arrive at the saved outputs."""
    need_x, need_gate, need_up, need_down, need_gate_bias, need_up_bias, need_down_bias = needs
    need_dg, need_du = need_x or need_gate or need_gate_bias, need_x or need_up or need_up_bias
    dy_rows = dy.reshape(-1, w_down.shape[0])
    d_down = dy_rows.t() @ gate_op(g, u).reshape(-1, w_down.shape[1]) if need_down else None
    d_down_bias = dy_rows.sum(0) if need_down_bias else None
    dg = du = None
    if need_dg or need_du:
        dg, du = gradients(dy @ w_down, g, u, need_dg, need_du)
    dg = dg if grad_g is None or dg is None else dg + grad_g
    du = du if grad_u is None or du is None else du + grad_u
    needs = need_x, need_gate, need_up, need_gate_bias, need_up_bias
    dx, d_gate, d_up, d_gate_bias, d_up_bias = projection_gradients(x, w_gate, w_up, dg, du, needs)
    return dx, d_gate, d_up, d_down, d_gate_bias, d_up_bias, d_down_bias


torch.library.register_autograd("swiglu::ffn", _backward, setup_context=_setup_context, lib=lib)
torch.library.register_autograd("swiglu::ffn_saving", _backward_saving, setup_context=_setup_context_saving, lib=lib)
register_autocast(ffn_op, autocast_dtype)
register_autocast(ffn_saving_op, autocast_dtype)
