"""The MLP block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._functional import forward, swiglu_torch


class SwiGLU(nn.Module):
    """``w_down(silu(w_gate(x)) * w_up(x))`` with gate, up and activation in one launch.

    Args:
        hidden_size: K, features in and out.
        intermediate_size: N, features between.
        bias: whether the three projections have biases.
        device, dtype: of the parameters, as for ``nn.Linear``.

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
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.w_gate = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.w_up = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.w_down = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to ``[..., hidden_size]``; errors as :func:`swiglu.forward`."""
        gate, up = self.w_gate, self.w_up
        if _is_plain(gate) and _is_plain(up):
            hidden = forward(x, gate.weight, up.weight, gate.bias, up.bias)
        else:
            hidden = swiglu_torch(gate(x), up(x))
        return self.w_down(hidden)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it is nothing but F.linear with its parameters."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not hooks
