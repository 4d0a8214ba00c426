"""``torch.ops.swiglu.forward``, and ``forward_saving`` that also stores what its backward would compute again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._library import autocast_dtype, define, register_autocast
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
        note_untuned(_native.prepare(device, word, layout, n, k, saved is not None), device, n, k, tokens)
    return z


def _fake(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


def _fake_saving(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    z, g, u = (x.new_empty((*x.shape[:-1], gate.shape[0])) for _ in range(3))
    return z, g, u


_OPERANDS = "Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None"
forward_op = define(f"forward({_OPERANDS}) -> Tensor", run, _fake)
forward_saving_op = define(f"forward_saving({_OPERANDS}) -> (Tensor, Tensor, Tensor)", run_saving, _fake_saving)
register_autocast(forward_op, autocast_dtype)
register_autocast(forward_saving_op, autocast_dtype)
