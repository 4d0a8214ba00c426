"""``patch(model)``: SwiGLU blocks of an existing model run on the fused operations, with the weights they have.

A block is known by its parts, not by its class, so nothing here needs transformers. It keeps its parameters, their
names and its place; its class becomes a subclass with another ``forward``, which is in force while the block has
``_swiglu_save``. ``unpatch`` takes back both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ._functional import split_packed, swiglu_ffn, swiglu_fused
from ._module import is_known, mlp, packed_mlp
from ._operands import DTYPES, SAVE, check_choice, dtype_word

_SEPARATE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PACKED = ("gate_up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass
class PatchReport:
    """What :func:`patch` replaced and what it left alone, by the module's name; ``str`` of it is a table."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Module name to its class."""
    refused: dict[str, str] = field(default_factory=dict)
    """Module name to the reason."""

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.refused)} left alone"]
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name}: left alone, {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Kind:
    """A way in which a SwiGLU block is written: its ``forward``, and a plain statement of what that computes."""

    name: str
    forward: Callable
    plain: Callable[[nn.Module, Tensor], Tensor]
    call: Callable[[nn.Module, Tensor], Tensor]


def patch(model: nn.Module, *, save: str = "preactivations") -> PatchReport:
    """Replaces the SwiGLU blocks of ``model`` in place: Llama, Mistral, Qwen, Phi-3, Mixtral and what is built alike.

    A block is replaced if its parts are those of a SwiGLU block and probe tokens, small and large, come out as they
    should whether it trains or not. The report names the others with the reason: another activation (Gemma),
    projections that are no plain ``nn.Linear`` (LoRA, quantised), a ``forward`` that was replaced before (Liger,
    accelerate). Weights are neither copied nor renamed, so state dicts and optimizers stay valid. Experts keep the
    implementation that their config names: with the eager one each expert runs fused, with any other one its gate
    does. Patch before sharding or compiling. A block that was patched before takes the new ``save``, and is reported
    if that changes it.

    Args:
        model: changed in place; a block alone will do.
        save: what is kept for the backward, ``"preactivations"`` or ``"nothing"``: see :func:`swiglu.swiglu_ffn`.

    Raises:
        ValueError: ``save`` is neither.

    >>> import torch, swiglu
    >>> class MLP(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_proj, self.up_proj = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
    ...         self.down_proj, self.act_fn = torch.nn.Linear(16, 8), torch.nn.SiLU()
    ...     def forward(self, x):
    ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    >>> model = torch.nn.Sequential(MLP())
    >>> print(swiglu.patch(model))
    1 replaced, 0 left alone
      0: MLP
    >>> swiglu.unpatch(model)
    1
    """
    check_choice("save", save, SAVE)
    report = PatchReport()
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None or _saving(module) == save:
            continue
        reason = None if hasattr(module, "_swiglu_original") else _refusal(module, kind)
        reason = reason or _replace(module, kind, save)
        if reason is not None:
            report.refused[name] = reason
        else:
            report.replaced[name] = module._swiglu_original.__name__  # type: ignore[union-attr]
    return report


def _replace(module: Any, kind: _Kind, save: str) -> str | None:
    """Why the module's class refuses it, if it does: then the module is as it was."""
    before = type(module)
    try:
        if not hasattr(module, "_swiglu_original"):
            module.__class__ = _subclass(before, kind)
        module._swiglu_save = save
    except Exception as error:  # whatever the model's own code raises
        object.__setattr__(module, "__class__", before)
        return f"its class does not let itself be extended: {error}"
    return None


def unpatch(model: nn.Module) -> int:
    """Gives every block that :func:`patch` replaced its own forward back; returns how many.

    And its own class, unless another was put on top since (``fully_shard``).

    >>> import torch, swiglu
    >>> swiglu.unpatch(torch.nn.Linear(2, 2))
    0
    """
    patched = [module for module in model.modules() if _saving(module) is not None]
    for module in patched:
        del module._swiglu_save
        if "_swiglu_original" in type(module).__dict__:
            module.__class__ = type(module)._swiglu_original  # type: ignore[attr-defined]
    return len(patched)


def _saving(module: nn.Module) -> str | None:
    """What a block that is patched keeps for its backward; None of any other module."""
    return getattr(module, "_swiglu_save", None)


@functools.cache
def _subclass(original: type[nn.Module], kind: _Kind) -> type[nn.Module]:
    names: dict[str, Any] = {
        "__module__": __name__,
        "__reduce_ex__": _reduce,
        "_swiglu_kind": kind.name,
        "_swiglu_original": original,
        "_swiglu_save": None,
        "forward": kind.forward,
    }
    if kind is _EXPERTS:
        names["_apply_gate"] = _apply_gate
    return type(f"SwiGLU{original.__name__}", (original,), names)


def _reduce(self: Any, protocol: int) -> tuple:
    """Copies and pickles by the class it had: the subclass has no name to be imported by."""
    original = self._swiglu_original
    make, arguments, *state = original.__reduce_ex__(self, protocol)
    arguments = tuple(original if argument is type(self) else argument for argument in arguments)
    return (_remake, (self._swiglu_kind, make, *arguments), *state)


def _remake(kind: str, make: Callable, *arguments) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _subclass(type(module), next(k for k in _KINDS if k.name == kind))
    return module


# ---- the kinds ----


def _of_tokens_alone(forward: Callable) -> Callable:
    """Takes the tokens under any name; a call with more than them is the original's, as every call once unpatched."""

    def of_any(self: Any, *args, **kwargs):
        if self._swiglu_save is None or len(args) + len(kwargs) != 1:
            return self._swiglu_original.forward(self, *args, **kwargs)
        return forward(self, *args, *kwargs.values())

    return of_any


def _forward_separate(names: tuple[str, str, str]) -> Callable:
    @_of_tokens_alone
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in names)
        return mlp(x, gate, up, down, self._swiglu_save)

    return forward


def _plain_separate(names: tuple[str, str, str]) -> Callable:
    def plain(module: Any, x: Tensor) -> Tensor:
        gate, up, down = (getattr(module, name) for name in names)
        return down(F.silu(gate(x)) * up(x))

    return plain


@_of_tokens_alone
def _forward_packed(self: Any, x: Tensor) -> Tensor:
    return packed_mlp(x, self.gate_up_proj, self.down_proj, self._swiglu_save)


def _plain_packed(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, -1)
    return module.down_proj(F.silu(gate) * up)


def _forward_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[tokens, K]``, and for every token its experts and their weights, both ``[tokens, top_k]``."""
    implementation = getattr(getattr(self, "config", None), "_experts_implementation", None)
    if self._swiglu_save is None or implementation not in (None, "eager"):
        return self._swiglu_original.forward(self, hidden_states, top_k_index, top_k_weights)
    result = torch.zeros_like(hidden_states)
    chosen, places = top_k_index.flatten().sort(stable=True)
    numbers = torch.arange(self.gate_up_proj.shape[0] + 1, dtype=chosen.dtype, device=chosen.device)
    # The GPU is waited for here alone, not for every expert. Numbers of no expert here fall before the first or behind the last.
    starts = torch.searchsorted(chosen, numbers).tolist()
    weights = top_k_weights.flatten()
    for expert, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        place = places[start:end]
        token = place // top_k_index.shape[1]
        gate, up = split_packed(self.gate_up_proj[expert], layout="packed_nk")
        out = swiglu_ffn(hidden_states[token], gate, up, self.down_proj[expert], save=self._swiglu_save)
        result.index_add_(0, token, (out * weights[place, None]).to(result.dtype))
    return result


def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
    """What transformers' other implementations of experts call between their two GEMMs."""
    return self._swiglu_original._apply_gate(self, gate_up) if self._swiglu_save is None else swiglu_fused(gate_up)


def _plain_experts(module: Any, x: Tensor) -> Tensor:
    gate, up = F.linear(x, module.gate_up_proj[0]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, module.down_proj[0])


def _call_experts(module: Any, x: Tensor) -> Tensor:
    index = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    return type(module).forward(module, x, index, torch.ones_like(index, dtype=x.dtype))


def _call_block(module: Any, x: Tensor) -> Tensor:
    return type(module).forward(module, x[None])[0]


_EXPERTS = _Kind("experts", _forward_experts, _plain_experts, _call_experts)
_KINDS = (
    *(_Kind("/".join(names), _forward_separate(names), _plain_separate(names), _call_block) for names in _SEPARATE),
    _Kind("/".join(_PACKED), _forward_packed, _plain_packed, _call_block),
    _EXPERTS,
)


def _kind(module: nn.Module) -> _Kind | None:
    """How the module's parts are named, if they are those of a gated block at all."""
    for kind in _KINDS[:-1]:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in kind.name.split("/")):
            return kind
    packed = [getattr(module, name, None) for name in _PACKED]
    return _EXPERTS if all(isinstance(p, Tensor) and p.dim() == 3 for p in packed) else None


# ---- whether it may be replaced ----


def _refusal(module: nn.Module, kind: _Kind) -> str | None:
    """Why the module is left alone, if it is."""
    if isinstance(module, GraphModule):
        return "it is a graph of torch.fx, which writes its own forward: patch before tracing"
    if "forward" in module.__dict__:
        return "its forward was replaced before"
    activation = next((f for name in _ACTIVATIONS if callable(f := getattr(module, name, None))), None)
    if activation is not None and not _is_silu(activation):
        return f"its activation is {getattr(activation, '__name__', type(activation).__name__)}, not SiLU"
    if kind is not _EXPERTS:
        for name in kind.name.split("/"):
            part = getattr(module, name)
            if type(part) is not nn.Linear:
                return f"{name} is {type(part).__name__}, not nn.Linear"
            if not is_known(part.weight):
                return f"{name}'s weight is {type(part.weight).__name__}, not a plain tensor"
    known = {*kind.name.split("/"), *_PACKED, *_ACTIVATIONS}
    others = sorted({*module._modules, *module._parameters, *module._buffers} - known)
    if others:
        return f"it has parts that a SwiGLU block has not: {', '.join(others)}"
    where = {parameter.device.type for parameter in module.parameters()}
    if "meta" in where:
        return "its weights are on the meta device; load them first"
    if not where <= {"cpu", "cuda"}:
        return f"its weights are on {' and '.join(sorted(where))}, and the kernels on CPU and CUDA devices alone"
    return _probe(module, kind)


def _is_silu(activation: Callable) -> bool:
    points = torch.linspace(-60, 60, 241, dtype=torch.float64, device="cpu")
    try:
        return torch.allclose(activation(points), F.silu(points), rtol=1e-9, atol=1e-12)
    except (TypeError, ValueError, RuntimeError):
        return False


_SCALES = (1, 10, 100)  # of the probe tokens: clamps show in large ones alone
# What another order of the sums may change, relative to the norm of the tokens.
_TOLERANCE = {"bf16": 0.02, "f16": 0.02, "tf32": 2e-3, "f32": 1e-4, "f64": 1e-10}


def _probe(module: Any, kind: _Kind) -> str | None:
    """Tokens through the block as it is: multipliers, clamps, dropout or another order of the halves would show."""
    weight = next(module.parameters())
    if kind is _EXPERTS:
        experts, rows, k = module.gate_up_proj.shape
        if module.down_proj.shape != (experts, k, rows // 2):
            return "its weights are not [experts, 2N, K] and [experts, K, N]"
    else:
        k = getattr(module, kind.name.split("/")[0]).in_features
    # No random numbers: those of the program stay as they are.
    tokens = torch.arange(2 * k, device=weight.device).view(2, k).sin()
    x = torch.cat([scale * tokens for scale in _SCALES]).to(weight.dtype)
    try:
        (expected, *both), is_random = _plainly_and_in_both_modes(module, kind, x)
    except Exception as error:  # whatever the model's own code raises
        return f"probe tokens do not pass through it: {error}"
    tolerance = _TOLERANCE[dtype_word(expected.dtype, x.get_device()) if expected.dtype in DTYPES else "f64"]
    expected, *both = (y.double() for y in (expected, *both))
    if not 0 < expected[:2].norm() < torch.inf:
        return "probe tokens come out as zeros or not finite, which tells nothing"
    for got in both:
        differs = functools.partial(_differs, tolerance)
        if got.shape != expected.shape or any(map(differs, got.split(2), expected.split(2))):
            return "its output is not down(silu(gate(x)) * up(x))"
    return "it draws random numbers, as a dropout does" if is_random else None


@torch.no_grad()
def _plainly_and_in_both_modes(module: nn.Module, kind: _Kind, x: Tensor) -> tuple[list[Tensor], bool]:
    """What the block should compute, what it does while it trains and while it does not, and whether it drew random numbers."""
    found, parts = [kind.plain(module, x)], {part: part.training for part in module.modules()}
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):  # of a dropout
            before = _random_states(x)
            for training in (True, False):
                for part in parts:
                    part.training = training
                found.append(kind.call(module, x))
            is_random = not all(map(torch.equal, before, _random_states(x)))
    finally:
        for part, training in parts.items():
            part.training = training
    return found, is_random


def _random_states(x: Tensor) -> list[Tensor]:
    """Of the CPU, and of the GPU of ``x``: a dropout that hits none of the probe tokens shows in these alone."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


def _differs(tolerance: float, got: Tensor, expected: Tensor) -> bool:
    """What overflows tells nothing."""
    size = expected.norm()
    return bool(size.isfinite() and not (got - expected).norm() <= tolerance * size)
