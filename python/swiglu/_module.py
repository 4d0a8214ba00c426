"""The MLP block, and the packed layer of fused-swiglu."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ._functional import forward, split_packed, swiglu_ffn, swiglu_fused
from ._operands import GATE_ORDERS, SAVE, check_choice, is_dtensor
from ._straight import PLAIN_TYPES


class SwiGLU(nn.Module):
    """``w_down(silu(w_gate(x)) * w_up(x))``: gate, up and activation in one launch, and a GEMM.

    Args:
        hidden_size: K, features in and out.
        intermediate_size: N, features between.
        bias: whether the three projections have biases.
        device, dtype: of the parameters, as for ``nn.Linear``.
        save: what a training step keeps for its backward, ``"preactivations"`` (faster) or
            ``"nothing"`` (smaller): see :func:`swiglu.swiglu_ffn`.

    ``w_gate``, ``w_up`` and ``w_down`` are ``nn.Linear``, so parameters, their names and initial values are theirs.
    A projection that was replaced (LoRA, quantisation) or has hooks is called instead of fused.

    >>> import torch, swiglu
    >>> mlp = swiglu.SwiGLU(16, 32)
    >>> mlp(torch.ones(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        save: str = "preactivations",
    ) -> None:
        super().__init__()
        check_choice("save", save, SAVE)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.save = save
        self.w_gate = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.w_up = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.w_down = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to ``[..., hidden_size]``; errors as :func:`swiglu.swiglu_ffn`."""
        parts: dict[str, Any] = self._modules  # a module's own lookup ends there too, a microsecond later
        return mlp(x, parts["w_gate"], parts["w_up"], parts["w_down"], self.save)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"


class FusedSwiGLU(nn.Module):
    """``silu(x @ a) * (x @ b)`` of one parameter ``Wf`` ``[in_features, 2 * hidden_dim]``, ``[a | b]``.

    Args:
        in_features: K.
        hidden_dim: N.
        block: kept as an attribute and otherwise ignored; the tuner decides.
        gate_order: which half goes through silu. ``"gate_first"`` is what fused-swiglu's README documents,
            ``"up_first"`` what its kernels compute: take that for weights that were trained with them.
        device, dtype: of ``Wf``.

    fused-swiglu's layer with the sum over all of K, any leading dimensions, CPU tensors, and a gradient for ``Wf``
    (``Wf.requires_grad_(False)`` freezes it, as there). ``Wf`` starts as ``nn.Linear`` starts its weight, where
    fused-swiglu takes a unit normal.

    >>> import torch, swiglu
    >>> layer = swiglu.FusedSwiGLU(16, 32)
    >>> layer.Wf.shape, layer(torch.ones(2, 16)).shape
    (torch.Size([16, 64]), torch.Size([2, 32]))
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int,
        block: int | None = None,
        *,
        gate_order: str = "gate_first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("gate_order", gate_order, GATE_ORDERS)
        if block is not None:
            _note_block()
        self.in_features = in_features
        self.hidden_dim = hidden_dim
        self.block = block
        self.gate_order = gate_order
        bound = max(in_features, 1) ** -0.5
        self.Wf = nn.Parameter(torch.empty(in_features, 2 * hidden_dim, device=device, dtype=dtype))
        nn.init.uniform_(self.Wf, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., hidden_dim]``; errors as :func:`swiglu.forward`."""
        gate, up = split_packed(self.Wf, layout="packed_kn", gate_order=self.gate_order)
        return forward(x, gate, up)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, hidden_dim={self.hidden_dim}, gate_order={self.gate_order!r}"


@functools.cache
def _note_block() -> None:
    warnings.warn("FusedSwiGLU: `block` is ignored, the tuner decides; leave it out", stacklevel=3)


def mlp(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module, save: str = "preactivations") -> Tensor:
    """``down(silu(gate(x)) * up(x))``, fused as far as the three are plain ``nn.Linear``."""
    of_gate, of_up = _linear(gate), _linear(up)
    if of_gate and of_up:
        return _fused(x, of_gate[0], of_up[0], of_gate[1], of_up[1], down, save)
    return down(swiglu_fused(gate(x), up(x)))


def packed_mlp(x: Tensor, gate_up: nn.Module, down: nn.Module, save: str = "preactivations") -> Tensor:
    """The same with gate and up in one projection, the gate first."""
    # What torch.fx traces with is no tensor, and would see halves as constants.
    if isinstance(x, Tensor) and (found := _linear(gate_up)):
        weight, bias = found
        gate, up = split_packed(weight, layout="packed_nk")
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return _fused(x, gate, up, gate_bias, up_bias, down, save)
    return down(swiglu_fused(gate_up(x)))


def _fused(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down: nn.Module,
    save: str,
) -> Tensor:
    if of_down := _linear(down):
        return swiglu_ffn(x, gate, up, of_down[0], gate_bias, up_bias, of_down[1], save=save)
    return down(forward(x, gate, up, gate_bias, up_bias, save=save))


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias, if calling it is nothing but F.linear with them."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) is not nn.Linear or hooks or "forward" in module.__dict__:
        return None
    own: dict[str, Any] = module._parameters
    # Sharding may have put plain tensors in place of parameters.
    weight = own["weight"] if "weight" in own else module.weight
    bias = own["bias"] if "bias" in own else module.bias
    return (weight, bias) if is_known(weight) else None


def is_known(weight: Tensor) -> bool:
    """Whether the operations may take it as it is: no subclass (quantised, say) but those that stand for any tensor."""
    return type(weight) in PLAIN_TYPES or isinstance(weight, FakeTensor) or is_dtensor(weight)
