"""What the operations under ``torch.ops.swiglu`` share: their library, how they meet autograd and autocast, and when a call
may step past torch's dispatcher."""

from __future__ import annotations

import sys
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
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ._straight import are_plain

_tells_of_exports: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def is_exporting() -> bool:
    """Whether torch.export is at work: parameters want gradients then, of a program that will have none.

    Not of strict exports: under dynamo torch 2.7 to 2.13 tell so of every compiled call.
    """
    return not is_dynamo_compiling() and _tells_of_exports()


# What computes each operation in torch's own, by its name.
_plain: dict[str, Callable] = {}


class _Library(torch.library.Library):
    """Its rules for autograd leave operands with tangents to torch's operations: those of torch.library drop tangents."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        rule = _rule_of_tangents(fn, _plain[op_name]) if dispatch_key == "Autograd" else fn
        super().impl(op_name, rule, dispatch_key, **options)


def _rule_of_tangents(rule: Callable, plain: Callable) -> Callable:
    def of_any(keys, *operands):
        if forward_ad._current_level >= 0 and any(map(has_tangent, operands)):
            return plain(*operands)
        return rule(keys, *operands)

    return of_any


try:
    lib = _Library("swiglu", "DEF")
except RuntimeError as error:
    if "namespace" not in str(error):
        raise
    raise ImportError(
        "torch has operations named swiglu already: the package was imported before in this process, which torch allows once. "
        "Start a new process, or leave its modules in sys.modules"
    ) from error

_AUTOCAST = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}
_BOTH = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
# Operations of which torch's FLOP counter does not know yet, and what counts them.
_uncounted: dict[Any, Callable[..., int]] = {}


def define(
    schema: str, run: Callable, fake: Callable, plain: Callable, flops: Callable[..., int] | None = None
) -> torch._ops.OpOverload:
    """Defines ``swiglu::schema``, computed by ``run`` on CPU and CUDA tensors and shaped by ``fake``.

    ``plain`` computes it in torch's operations: under torch.func, and of operands with tangents. That takes
    :func:`register_gradients` too.

    ``flops`` takes the operands' shapes in place of tensors. It counts GEMMs alone, as torch's counter does.
    """
    name = schema.partition("(")[0]
    _plain[name] = plain
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        lib.impl(name, run, device_type)
    lib.impl(name, plain, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"swiglu::{name}", fake, lib=lib)
    op = getattr(torch.ops.swiglu, name)
    if flops is not None:
        _uncounted[op] = flops
        tell_flop_counter()
    return op.default


def tell_flop_counter() -> None:
    """Tells torch's FLOP counter how to count, once somebody has imported it: that takes its time, and imports triton."""
    if not _uncounted or "torch.utils.flop_counter" not in sys.modules or is_dynamo_compiling():
        return
    from torch.utils.flop_counter import register_flop_formula

    formulas = {op: register_flop_formula(op)(flops) for op, flops in _uncounted.items()}
    _uncounted.clear()
    # A counter that is at work has copied what there was before. Up to torch 2.5 it is the mode itself.
    for mode in _get_current_dispatch_mode_stack():
        getattr(getattr(mode, "counter", mode), "flop_registry", {}).update(formulas)


def has_tangent(operand: object) -> bool:
    """Whether it has one at the current level of forward gradients."""
    return isinstance(operand, Tensor) and forward_ad.unpack_dual(operand).tangent is not None


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
        try:
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad is True:
                    return True
        except AttributeError:  # whoever takes what is no tensor refuses it by its name
            pass
    return False


def is_transformed() -> bool:
    """Whether torch.func or forward gradients are at work: torch.library refuses the former and drops the latter."""
    return forward_ad._current_level >= 0 or _is_in_torch_func()


def _is_in_torch_func() -> bool:
    return peek_interpreter_stack() is not None


# Dynamo calls it while it traces: torch.compiler.assume_constant_result, without the import of all of torch._dynamo.
_is_in_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_batch(gradient: Tensor) -> bool:
    """Whether it stands for many, by ``is_grads_batched``, and has no memory of its own; none does where dynamo traces."""
    return not is_dynamo_compiling() and is_legacy_batchedtensor(gradient)


def is_undisturbed() -> bool:
    """Whether nothing waits in torch's dispatcher for any tensor: compilation, modes, autocast, tracing, torch.func, forward
    gradients, a profiler.

    Of compilation only dynamo's own tracing need be asked for: what traces behind it, and export, does so with modes.
    """
    return (
        not is_dynamo_compiling()
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and not _is_any_autocast_enabled()
        and not _is_tracing()
        and not is_transformed()
        and not _profiler_enabled()
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
