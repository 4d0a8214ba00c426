"""``torch.ops.swiglu.forward``: the operation as torch knows it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from . import _native
from ._operands import as_rows, as_weights, check, dtype_word, stream_of

_NAME = "swiglu::forward"
_lib = torch.library.Library("swiglu", "DEF")
_lib.define(
    "forward(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _point_at_nvrtc() -> None:
    """Tells the runtime of the NVRTC wheel that this Python has, the one of torch's CUDA version first."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    folders = [root / below for root in roots for below in ("cu13/lib", "cuda_nvrtc/lib")]
    found = [folder for folder in folders if any(folder.glob("libnvrtc.so.*"))]
    major = (torch.version.cuda or "").partition(".")[0]
    found.sort(key=lambda folder: not (folder / f"libnvrtc.so.{major}").exists())
    if found:
        _native.set_nvrtc_folder(str(found[0]))


_point_at_nvrtc()


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
    _native.forward(
        device,
        dtype_word(x.dtype, device),
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
    )
    return z


_lib.impl("forward", run, "CPU")
_lib.impl("forward", run, "CUDA")


@torch.library.register_fake(_NAME, lib=_lib)
def _fake(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dz):
    """Plain torch operations for now: the pre-activations are computed again, then one GEMM a gradient and weight."""
    x, gate, up, gate_bias, up_bias = ctx.saved_tensors
    # The dispatcher drops trailing arguments that equal their defaults.
    needs = (*ctx.needs_input_grad, False, False)[:5]
    need_x, need_gate, need_up, need_gate_bias, need_up_bias = needs
    dtype = x.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    g = F.linear(x, gate, gate_bias).to(wide)
    dz = dz.to(wide)
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    columns = gate.shape[0]
    dg = du = None
    if need_x or need_gate or need_gate_bias:
        u = F.linear(x, up, up_bias).to(wide)
        dg = (dz * u * (sigmoid + silu * (1 - sigmoid))).reshape(-1, columns)
    if need_x or need_up or need_up_bias:
        du = (dz * silu).reshape(-1, columns)
    dg_bias = dg.sum(0).to(dtype) if need_gate_bias else None
    du_bias = du.sum(0).to(dtype) if need_up_bias else None
    dg = dg.to(dtype) if dg is not None else None
    du = du.to(dtype) if du is not None else None
    rows = x.reshape(-1, gate.shape[1])
    dx = torch.addmm(dg @ gate, du, up).reshape(x.shape) if need_x else None
    dgate = dg.t() @ rows if need_gate else None
    dup = du.t() @ rows if need_up else None
    return dx, dgate, dup, dg_bias, du_bias


torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=_lib)


def _register_autocast(device_type: str, key: DispatchKey) -> None:
    """Under autocast the operation runs in its number format, as F.linear does; gradients keep the parameters'."""
    excluded = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def rule(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return forward_op(*map(cast, args))

    forward_op.py_impl(key)(rule)
    _lib.impl("forward", lambda _keys, *args: rule(*args), key.name, with_keyset=True)


forward_op = torch.ops.swiglu.forward.default
_register_autocast("cpu", DispatchKey.AutocastCPU)
_register_autocast("cuda", DispatchKey.AutocastCUDA)
