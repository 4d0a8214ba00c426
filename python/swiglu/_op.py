"""``torch.ops.swiglu.forward``, and ``forward_saving`` that also stores what its backward would compute again."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._library import autocast_dtype, define, register_autocast
from ._operands import check, lay
from ._straight import empty
from ._tuning import note_new


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
    return run_keeping(x, gate, up, gate_bias, up_bias, False)[0]


def run_saving(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`run`, with both pre-activations, from the same launch."""
    check(x, gate, up, gate_bias, up_bias)
    z = empty(x, (*x.shape[:-1], gate.shape[0]))
    if _is_torchs(x, z):
        g, u = F.linear(x, gate, gate_bias).contiguous(), F.linear(x, up, up_bias).contiguous()
        return F.silu(g) * u, g, u
    g, u = empty(z), empty(z)
    _launch(x, gate, up, gate_bias, up_bias, z, g.data_ptr(), u.data_ptr())
    return z, g, u


def run_keeping(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`run_saving` of checked operands: both pre-activations are in one tensor without a shape, if ``keep``."""
    z = empty(x, (*x.shape[:-1], gate.shape[0]))
    if _is_torchs(x, z):
        if not keep:
            return reference(x, gate, up, gate_bias, up_bias).contiguous(), None
        g, u = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
        return F.silu(g) * u, torch.stack((g, u)).view(-1)
    kept = empty(x, (2 * z.numel(),)) if keep else None
    first, second = (0, 0) if kept is None else (kept.data_ptr(), kept.data_ptr() + z.nbytes)
    _launch(x, gate, up, gate_bias, up_bias, z, first, second)
    return z, kept


def _is_torchs(x: Tensor, z: Tensor) -> bool:
    """float64, and what is empty: that has no address, nor does an empty sum."""
    return x.dtype is torch.float64 or not z.numel() or not x.numel()


def _launch(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    z: Tensor,
    saved_gate: int,
    saved_up: int,
) -> None:
    # Kept in names until the launch: a copy must not be freed before.
    layer, rows, first, second = lay(x, gate, up)
    device, word, stream, m, n, k, layout, x_stride, gate_stride, up_stride = layer
    gate_bias = None if gate_bias is None else gate_bias.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    prepared_now = _native.forward(
        device,
        word,
        layout,
        n,
        k,
        stream,
        m,
        rows.data_ptr(),
        x_stride,
        first.data_ptr(),
        gate_stride,
        second.data_ptr(),
        up_stride,
        0 if gate_bias is None else gate_bias.data_ptr(),
        0 if up_bias is None else up_bias.data_ptr(),
        z.data_ptr(),
        n,
        saved_gate,
        n,
        saved_up,
        n,
    )
    if prepared_now:
        note_new(device, word, layout, n, k, saved_gate != 0, m)


def _fake(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


def _fake_saving(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    z, g, u = (x.new_empty((*x.shape[:-1], gate.shape[0])) for _ in range(3))
    return z, g, u


def _plain(x, gate, up, gate_bias=None, up_bias=None):
    check(x, gate, up, gate_bias, up_bias)
    return reference(x, gate, up, gate_bias, up_bias)


def plain_saving(x, gate, up, gate_bias=None, up_bias=None):
    """As :func:`run_saving`, in torch's own operations."""
    check(x, gate, up, gate_bias, up_bias)
    g, u = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
    return F.silu(g) * u, g, u


def gemm_flops(x: Sequence[int], gate: Sequence[int], *_others, **_results) -> int:
    """Of both GEMMs, of operands of these shapes."""
    return 4 * prod(x) * gate[0]


_OPERANDS = "Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None"
forward_op = define(f"forward({_OPERANDS}) -> Tensor", run, _fake, _plain, gemm_flops)
forward_saving_op = define(
    f"forward_saving({_OPERANDS}) -> (Tensor, Tensor, Tensor)", run_saving, _fake_saving, plain_saving, gemm_flops
)
register_autocast(forward_op, autocast_dtype)
register_autocast(forward_saving_op, autocast_dtype)
