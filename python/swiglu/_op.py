"""``torch.ops.swiglu.forward``: the operation as torch knows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._gate import gradients
from ._library import autocast_dtype, define, lib, register_autocast
from ._operands import as_rows, as_weights, check, dtype_word, stream_of
from ._tuning import note_untuned


def nvrtc_folder() -> Path | None:
    """Where the NVRTC wheel lies that this Python has, the one of torch's CUDA version first."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    folders = [root / below for root in roots for below in ("cu13/lib", "cuda_nvrtc/lib")]
    found = [folder for folder in folders if any(folder.glob("libnvrtc.so.*"))]
    major = (torch.version.cuda or "").partition(".")[0]
    found.sort(key=lambda folder: not (folder / f"libnvrtc.so.{major}").exists())
    return found[0] if found else None


if (_folder := nvrtc_folder()) is not None:
    _native.set_nvrtc_folder(str(_folder))


def reference(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """The formula in torch's own operations."""
    return F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)


def run(x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None) -> Tensor:
    """The kernel behind the operation, of CPU and CUDA tensors; no gradients."""
    check(x, gate, up, gate_bias, up_bias)
    if x.dtype is torch.float64:
        return reference(x, gate, up, gate_bias, up_bias).contiguous()
    return _launch(x, gate, up, gate_bias, up_bias, None)


def run_saving(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`run`, with both pre-activations, from the same launch."""
    check(x, gate, up, gate_bias, up_bias)
    if x.dtype is torch.float64 or x.shape[-1] == 0:
        g, u = F.linear(x, gate, gate_bias).contiguous(), F.linear(x, up, up_bias).contiguous()
        return F.silu(g) * u, g, u
    g, u = (x.new_empty((*x.shape[:-1], gate.shape[0])) for _ in range(2))
    return _launch(x, gate, up, gate_bias, up_bias, (g, u)), g, u


def _launch(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    saved: tuple[Tensor, Tensor] | None,
) -> Tensor:
    n, k = gate.shape
    z = x.new_empty((*x.shape[:-1], n))
    tokens = z.numel() // n if n else 0
    if tokens == 0:
        return z
    if k == 0:  # an empty sum has no address
        return reference(x, gate, up, gate_bias, up_bias)
    device = x.get_device()
    rows, x_stride = as_rows(x)
    gate, gate_stride, up, up_stride, layout = as_weights(gate, up)
    # Kept in names until the launch: a copy must not be freed before.
    gate_bias = None if gate_bias is None else gate_bias.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    word = dtype_word(x.dtype, device)
    prepared_now = _native.forward(
        device,
        word,
        layout,
        n,
        k,
        stream_of(device),
        tokens,
        rows.data_ptr(),
        x_stride,
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        0 if gate_bias is None else gate_bias.data_ptr(),
        0 if up_bias is None else up_bias.data_ptr(),
        z.data_ptr(),
        n,
        0 if saved is None else saved[0].data_ptr(),
        n,
        0 if saved is None else saved[1].data_ptr(),
        n,
    )
    if prepared_now:
        note_untuned(_native.prepare(device, word, layout, n, k), device, n, k, tokens)
    return z


def _fake(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


forward_op = define(
    "forward(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor", run, _fake
)


def projection_gradients(
    x: Tensor, gate: Tensor, up: Tensor, dg: Tensor | None, du: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """From the gradients of both pre-activations those of x, gate, up and the biases, where ``needs`` says so."""
    need_x, need_gate, need_up, need_gate_bias, need_up_bias = needs
    n, k = gate.shape
    rows = x.reshape(-1, k)
    dg = None if dg is None else dg.reshape(-1, n)
    du = None if du is None else du.reshape(-1, n)
    return (
        torch.addmm(dg @ gate, du, up).reshape(x.shape) if need_x else None,
        dg.t() @ rows if need_gate else None,
        du.t() @ rows if need_up else None,
        dg.sum(0) if need_gate_bias else None,
        du.sum(0) if need_up_bias else None,
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dz):
    """Plain torch operations for now: the pre-activations are computed again, then one GEMM a gradient and weight."""
    x, gate, up, gate_bias, up_bias = ctx.saved_tensors
    # The dispatcher drops trailing arguments that equal their defaults.
    needs = (*ctx.needs_input_grad, False, False)[:5]
    need_x, need_gate, need_up, need_gate_bias, need_up_bias = needs
    need_dg, need_du = need_x or need_gate or need_gate_bias, need_x or need_up or need_up_bias
    g = F.linear(x, gate, gate_bias)
    u = F.linear(x, up, up_bias) if need_dg else None
    return projection_gradients(x, gate, up, *gradients(dz, g, u, need_dg, need_du), needs)


torch.library.register_autograd("swiglu::forward", _backward, setup_context=_setup_context, lib=lib)
register_autocast(forward_op, autocast_dtype)
