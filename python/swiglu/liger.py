"""Liger's names: ``from swiglu.liger import LigerSiLUMulFunction, LigerSwiGLUMLP``.

Parameters keep the names of Hugging Face's modules, so state dicts load both ways. ``config`` is anything with
``hidden_size``, ``intermediate_size`` and ``hidden_act``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._functional import swiglu_fused
from ._module import mlp, packed_mlp
from ._operands import bad_value

__all__ = [
    "BlockSparseTop2MLP",
    "LigerBlockSparseTop2MLP",
    "LigerPhi3SwiGLUMLP",
    "LigerSiLUMulFunction",
    "LigerSwiGLUMLP",
    "Phi3SwiGLUMLP",
    "SiLUMulFunction",
    "SwiGLUMLP",
]


class SiLUMulFunction:
    """``SiLUMulFunction.apply(a, b)``: ``silu(a) * b``.

    No tensor is written in place: a second backward, and a producer that saved its output, get the right gradients.

    >>> import torch
    >>> from swiglu.liger import LigerSiLUMulFunction
    >>> LigerSiLUMulFunction.apply(torch.zeros(2), torch.ones(2))
    tensor([0., 0.])
    """

    @staticmethod
    def apply(a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
        """``silu(a * gate_multiplier) * b * down_multiplier``, of ``a``'s shape; errors as ``swiglu_fused``."""
        z = swiglu_fused(a if gate_multiplier == 1 else a * gate_multiplier, b)
        return z if down_multiplier == 1 else z * down_multiplier


class _ConfiguredMLP(nn.Module):
    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        if config.hidden_act not in ("silu", "swish"):
            bad_value("config", f"has hidden_act {config.hidden_act!r}, expected 'silu' or 'swish'")
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size


class SwiGLUMLP(_ConfiguredMLP):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, as Llama, Mistral and Qwen have it; no biases.

    ``[..., hidden_size]`` to ``[..., hidden_size]``. ValueError unless ``config.hidden_act`` is silu or swish.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from swiglu.liger import LigerSwiGLUMLP
    >>> config = SimpleNamespace(hidden_size=16, intermediate_size=32, hidden_act="silu")
    >>> LigerSwiGLUMLP(config)(torch.ones(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__(config, intermediate_size)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.gate_proj, self.up_proj, self.down_proj)


class Phi3SwiGLUMLP(_ConfiguredMLP):
    """The same with gate and up in one ``gate_up_proj``, the gate first, as Phi-3 has it.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from swiglu.liger import LigerPhi3SwiGLUMLP
    >>> config = SimpleNamespace(hidden_size=16, intermediate_size=32, hidden_act="silu")
    >>> LigerPhi3SwiGLUMLP(config)(torch.ones(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return packed_mlp(x, self.gate_up_proj, self.down_proj)


class BlockSparseTop2MLP(_ConfiguredMLP):
    """One expert as Mixtral had it in transformers 4: ``w2(silu(w1(x)) * w3(x))``.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from swiglu.liger import LigerBlockSparseTop2MLP
    >>> config = SimpleNamespace(hidden_size=16, intermediate_size=32, hidden_act="silu")
    >>> LigerBlockSparseTop2MLP(config)(torch.ones(5, 16)).shape
    torch.Size([5, 16])
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.w1 = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)
        self.w2 = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)
        self.w3 = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.w1, self.w3, self.w2)


LigerSiLUMulFunction = SiLUMulFunction
LigerSwiGLUMLP = SwiGLUMLP
LigerPhi3SwiGLUMLP = Phi3SwiGLUMLP
LigerBlockSparseTop2MLP = BlockSparseTop2MLP
