"""What the operations under ``torch.ops.swiglu`` share: their library, how they meet autograd and autocast, and when a call
may step past torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ._straight import are_plain

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


def register_gradients(op: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> None:
    """Gives ``op`` its gradients."""
    torch.library.register_autograd(op._schema.name, backward, setup_context=setup_context, lib=lib)


def recorded(name: str, forward: Callable, backward: Callable) -> Callable:
    """A call of plain tensors with gradients, without torch's dispatcher: ``forward(ctx, *inputs)`` saves what it needs."""
    names = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), names)
    # Function.apply asks for torch.func and its wrappers, which :func:`is_plain_call` has done, and then calls this.
    return super(torch.autograd.Function, function).apply


def is_recording(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for gradients of one of ``tensors``."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_transformed() -> bool:
    """Whether torch.func or forward gradients are at work: torch.library refuses the former and drops the latter."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def is_batch(gradient: Tensor) -> bool:
    """Whether it stands for many, by ``is_grads_batched``, and has no memory of its own."""
    return is_legacy_batchedtensor(gradient)


def is_undisturbed() -> bool:
    """Whether nothing waits in torch's dispatcher for any tensor: compilation, modes, autocast, tracing, torch.func, forward
    gradients.

    Of compilation only dynamo's own tracing need be asked for: what traces behind it, and export, does so with modes.
    """
    return (
        not is_dynamo_compiling()
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and not _is_any_autocast_enabled()
        and not _is_tracing()
        and not is_transformed()
    )


def is_plain_call(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher would only record gradients and pass the call on: that takes longer than the launch."""
    return is_undisturbed() and are_plain(*tensors)


def is_undisturbed_backward() -> bool:
    """As :func:`is_undisturbed`, of the backward of a plain call: autocast has no rule for it, and modes over functions see no
    backward of torch's."""
    return not _len_torch_dispatch_stack() and forward_ad._current_level < 0


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
