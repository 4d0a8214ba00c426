"""xformers' names, whose fast path is gone: ``from swiglu.xformers import SwiGLU, swiglu, swiglu_packed``.

Mind theirs: ``w2`` is up and ``w3`` is down, biases are on by default, and ``op`` is accepted and ignored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._ffn import check_ffn_as
from ._functional import split_packed, swiglu_ffn
from ._module import mlp, packed_mlp
from ._operands import bad_value, check_tensor, raise_restated

__all__ = ["SwiGLU", "swiglu", "swiglu_packed"]

# Of x, gate, up, down and the three biases.
_NAMES = ("x", "w1", "w2", "w3", "b1", "b2", "b3")
_NAMES_OF_PACKED = ("x", "w1w2", "w1w2", "w3", "b1b2", "b1b2", "b3")


def swiglu(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    op: Any = None,
) -> Tensor:
    """``(silu(x @ w1.T + b1) * (x @ w2.T + b2)) @ w3.T + b3``; ``[..., out]``.

    ``w1`` and ``w2`` are ``[N, K]``, ``w3`` is ``[out, N]``; errors as :func:`swiglu.swiglu_ffn`.

    >>> import torch
    >>> from swiglu.xformers import swiglu
    >>> swiglu(torch.ones(2, 4), torch.ones(8, 4), None, torch.ones(8, 4), None, torch.ones(6, 8), None).shape
    torch.Size([2, 6])
    """
    try:
        return swiglu_ffn(x, w1, w2, w3, b1, b2, b3)
    except (TypeError, ValueError) as error:
        raise_restated(error, check_ffn_as, _NAMES, x, w1, w2, w3, b1, b2, b3)


def swiglu_packed(
    x: Tensor, w1w2: Tensor, b1b2: Tensor | None, w3: Tensor, b3: Tensor | None, *, op: Any = None
) -> Tensor:
    """The same with ``w1w2`` ``[2, N, K]`` and ``b1b2`` ``[2, N]``.

    Raises:
        ValueError: ``w1w2`` or ``b1b2`` has another shape, or as :func:`swiglu.swiglu_ffn`.

    >>> import torch
    >>> from swiglu.xformers import swiglu_packed
    >>> swiglu_packed(torch.ones(2, 4), torch.ones(2, 8, 4), None, torch.ones(6, 8), None).shape
    torch.Size([2, 6])
    """
    if not isinstance(w1w2, Tensor):
        check_tensor("w1w2", w1w2)
    if w1w2.dim() != 3 or w1w2.shape[0] != 2:
        bad_value("w1w2", f"has shape {list(w1w2.shape)}, expected [2, N, K]")
    if b1b2 is not None:
        if not isinstance(b1b2, Tensor):
            check_tensor("b1b2", b1b2)
        if b1b2.shape != (2, w1w2.shape[1]):
            bad_value("b1b2", f"has shape {list(b1b2.shape)}, expected [2, {w1w2.shape[1]}]")
    # Packed only where that is a view.
    is_packed = w1w2.is_contiguous()
    w1, w2 = split_packed(w1w2.flatten(0, 1), layout="packed_nk") if is_packed else w1w2.unbind()
    b1, b2 = (None, None) if b1b2 is None else b1b2.unbind()
    try:
        return swiglu_ffn(x, w1, w2, w3, b1, b2, b3)
    except (TypeError, ValueError) as error:
        raise_restated(error, check_ffn_as, _NAMES_OF_PACKED, x, w1, w2, w3, b1, b2, b3)


class SwiGLU(nn.Module):
    """``w3(silu(x1) * x2)`` with ``x1`` and ``x2`` the halves of ``w12(x)``.

    Args:
        in_features: K.
        hidden_features: N.
        out_features: features out; ``in_features`` if not given.
        bias: whether the projections have biases.
        _pack_weights: False for ``w1`` and ``w2`` instead of ``w12``.

    Parameter names and shapes are xformers', so state dicts load both ways.

    >>> import torch
    >>> from swiglu.xformers import SwiGLU
    >>> mlp = SwiGLU(16, 32, out_features=8)
    >>> mlp.w12.weight.shape, mlp(torch.ones(2, 3, 16)).shape
    (torch.Size([64, 16]), torch.Size([2, 3, 8]))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = in_features if out_features is None else out_features
        self.w12: nn.Linear | None = None
        if _pack_weights:
            self.w12 = nn.Linear(in_features, 2 * hidden_features, bias)
        else:
            self.w1 = nn.Linear(in_features, hidden_features, bias)
            self.w2 = nn.Linear(in_features, hidden_features, bias)
        self.w3 = nn.Linear(hidden_features, self.out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; errors as :func:`swiglu.swiglu_ffn`."""
        if self.w12 is not None:
            return packed_mlp(x, self.w12, self.w3)
        return mlp(x, self.w1, self.w2, self.w3)
