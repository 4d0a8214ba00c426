"""What the operations under ``torch.ops.swiglu`` share: their library, and how they meet autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

lib = torch.library.Library("swiglu", "DEF")

_AUTOCAST = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}
_BOTH = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def define(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines ``swiglu::schema``, computed by ``run`` on CPU and CUDA tensors and shaped by ``fake``."""
    name = schema.partition("(")[0]
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        lib.impl(name, run, device_type)
    torch.library.register_fake(f"swiglu::{name}", fake, lib=lib)
    return getattr(torch.ops.swiglu, name).default


def register_autocast(op: torch._ops.OpOverload, dtype_of: Callable[[str, list[Tensor]], torch.dtype]) -> None:
    """Under autocast ``op`` runs in the format that ``dtype_of`` takes from the device type and the tensors.

    Gradients keep the format of the tensors given. float64 is left alone, as torch's own operations leave it.
    """
    name = op._schema.name.partition("::")[2]
    for device_type, key in _AUTOCAST.items():

        def rule(*args, device_type=device_type):
            tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64]
            dtype = dtype_of(device_type, tensors) if tensors else None
            cast = {id(tensor): tensor.to(dtype) for tensor in tensors}
            with torch._C._ExcludeDispatchKeyGuard(_BOTH):
                return op(*(cast.get(id(a), a) for a in args))

        op.py_impl(key)(rule)
        lib.impl(name, lambda _keys, *args, rule=rule: rule(*args), key.name, with_keyset=True)


def autocast_dtype(device_type: str, _tensors: list[Tensor]) -> torch.dtype:
    """As ``F.linear``: autocast's own format."""
    return torch.get_autocast_dtype(device_type)
