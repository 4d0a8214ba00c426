"""Functions on tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _recorded
from ._ffn import NAMES, check_ffn, ffn_op, ffn_saving_op
from ._gate import (
    check_packed,
    check_pair,
    gate_op,
    gate_packed_op,
    gate_packed_recorded,
    gate_recorded,
    run_gate,
    run_gate_packed,
)
from ._library import is_exporting, is_plain_call, is_recording, is_transformed, is_undisturbed, tell_flop_counter
from ._op import forward_op, forward_saving_op, reference
from ._operands import (
    GATE_ORDERS,
    LAYOUTS,
    SAVE,
    are_halves,
    bad_value,
    check,
    check_choice,
    check_tensor,
    check_tensors,
    raise_restated,
)
from ._sharding import prepare_for

__all__ = ["forward", "split_packed", "swiglu_ffn", "swiglu_fused", "swiglu_torch"]


def forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    layout: str = "separate_nk",
    save: str = "preactivations",
) -> Tensor:
    """``silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` in one launch; ``[..., N]``.

    Args:
        x: ``[..., K]``, any leading dimensions; bfloat16, float16 or float32 (float64: plain torch operations).
        gate: ``[N, K]``, as ``nn.Linear.weight``.
        up: ``[N, K]``. Both may be views of one packed weight, see :func:`split_packed`.
        gate_bias: ``[N]``, if any.
        up_bias: ``[N]``, if any.
        layout: ``"separate_kn"`` when ``gate`` and ``up`` are ``[K, N]``, as in ``x @ W``.
        save: what is kept for the backward besides the operands. ``"preactivations"``: ``x @ gate.T`` and ``x @ up.T``,
            2 N numbers a token, stored by the same launch. ``"nothing"``: the backward computes both again.

    Nothing is copied where each matrix is described by one row stride, transposed views included. float32 on a GPU
    runs in TF32 where torch's own matmuls may. The first call for a new ``(device, dtype, order of the weights, N, K)``
    compiles its kernels; :func:`prepare` does that ahead.

    The backward on a GPU is three launches: the gate's, one GEMM for ``x``, one for both weights; what is frozen is not
    computed. On the CPU, in float64 and where gradients are differentiated again it is torch's operations. Under
    ``torch.func``, with forward gradients and of nested tensors all of it is.

    Raises:
        TypeError: a number format is not supported or differs from ``x``'s.
        ValueError: a shape or device does not fit; the message names the argument.
        RuntimeError: the GPU, its driver or NVRTC cannot be used.

    >>> import torch, swiglu
    >>> x, gate, up = torch.ones(2, 3, 4), torch.ones(8, 4), torch.ones(8, 4)
    >>> swiglu.forward(x, gate, up).shape
    torch.Size([2, 3, 8])
    """
    if layout == "separate_kn":
        return _forward_kn(x, gate, up, gate_bias, up_bias, save)
    if layout != "separate_nk":
        bad_value(
            "layout", f"is {layout!r}, expected 'separate_nk' or 'separate_kn'; split_packed() takes packed weights"
        )
    check_choice("save", save, SAVE)
    operands = (x, gate, up, gate_bias, up_bias)
    recording, keep = is_recording(*operands), save == "preactivations"
    if is_undisturbed():
        z = _recorded.call(x, gate, up, None, gate_bias, up_bias, None, keep, recording)
        if z is not None:
            return z
    if not _are_tensors(_NAMES, operands, 3):
        return handle_torch_function(forward, operands, *operands, layout=layout, save=save)
    if _is_torchs(x):
        if not x.is_nested:  # whose shapes torch checks
            check(*operands)
        return reference(*operands)
    _make_ready(*operands)
    saving = recording and keep and not is_exporting()
    return forward_saving_op(*operands)[0] if saving else forward_op(*operands)


def _forward_kn(x, gate, up, gate_bias, up_bias, save):
    """:func:`forward` of weights ``[K, N]``, which errors show as they were given."""
    operands = (x, gate, up, gate_bias, up_bias)
    both = isinstance(gate, Tensor) and isinstance(up, Tensor)  # the others are looked at where the straight way ends
    if not both and not _are_tensors(_NAMES, operands, 3):
        return handle_torch_function(forward, operands, *operands, layout="separate_kn", save=save)
    try:
        return forward(x, _transposed("gate", gate), _transposed("up", up), gate_bias, up_bias, save=save)
    except (TypeError, ValueError) as error:
        raise_restated(error, check, *operands, _NAMES[1:], True)


def swiglu_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    save: str = "preactivations",
) -> Tensor:
    """The feed-forward block ``forward(x, w_gate, w_up, b_gate, b_up) @ w_down.T + b_down``; ``[..., out]``.

    Args:
        x: ``[..., K]``, any leading dimensions; bfloat16, float16, float32 or float64.
        w_gate, w_up: ``[N, K]``, as ``nn.Linear.weight``; views of one packed weight by :func:`split_packed`.
        w_down: ``[out, N]``.
        b_gate, b_up: ``[N]``, if any.
        b_down: ``[out]``, if any.
        save: what is kept for the backward besides the operands. ``"preactivations"``: ``x @ w_gate.T`` and
            ``x @ w_up.T``, 2 N numbers a token, stored by the fused kernel beside z. ``"nothing"``: the forward is the fused
            kernel and the backward computes both again, two GEMMs more.

    The backward on a GPU is four launches, of which ``dz`` never reaches memory; what is frozen is not computed. Else as in
    :func:`forward`. Without gradients to record it is the fused kernel and one GEMM, whatever ``save`` says.

    Raises:
        TypeError: a number format is not supported or differs from ``x``'s.
        ValueError: a shape, device or ``save`` does not fit; the message names the argument.
        RuntimeError: the GPU, its driver or NVRTC cannot be used.

    >>> import torch, swiglu
    >>> x, w_gate, w_up, w_down = torch.ones(2, 3, 4), torch.ones(8, 4), torch.ones(8, 4), torch.ones(4, 8)
    >>> swiglu.swiglu_ffn(x, w_gate, w_up, w_down).shape
    torch.Size([2, 3, 4])
    """
    check_choice("save", save, SAVE)
    if w_down is None:  # what is shared with forward() would leave it out
        check_tensor("w_down", w_down)
    operands = (x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    recording, keep = is_recording(*operands), save == "preactivations"
    if is_undisturbed():
        y = _recorded.call(*operands, keep, recording)
        if y is not None:
            return y
    if not _are_tensors(NAMES, operands, 4):
        return handle_torch_function(swiglu_ffn, operands, *operands, save=save)
    if _is_torchs(x):
        if not x.is_nested:
            check_ffn(*operands)
        return F.linear(reference(x, w_gate, w_up, b_gate, b_up), w_down, b_down)
    _make_ready(*operands)
    saving = recording and keep and not is_exporting()
    return ffn_saving_op(*operands)[0] if saving else ffn_op(*operands)


def split_packed(weight: Tensor, *, layout: str, gate_order: str = "gate_first") -> tuple[Tensor, Tensor]:
    """The gate and up ``[N, K]`` of one packed weight, as views: ``forward(x, *split_packed(w, layout=...))``.

    Args:
        weight: ``[2N, K]`` (a merged ``gate_up_proj``) or ``[K, 2N]``.
        layout: ``"packed_nk"`` or ``"packed_kn"``, respectively.
        gate_order: which half is the gate: ``"gate_first"`` or ``"up_first"``.

    Raises:
        ValueError: an argument does not fit; the message names it.

    >>> import torch, swiglu
    >>> gate, up = swiglu.split_packed(torch.ones(16, 4), layout="packed_nk")
    >>> gate.shape, up.shape
    (torch.Size([8, 4]), torch.Size([8, 4]))
    """
    check_choice("layout", layout, LAYOUTS[2:])
    check_choice("gate_order", gate_order, GATE_ORDERS)
    if not isinstance(weight, Tensor) and not _are_tensors(("weight",), (weight,), 1):
        return handle_torch_function(split_packed, (weight,), weight, layout=layout, gate_order=gate_order)
    packed = weight if layout == "packed_nk" else _transposed("weight", weight)
    if packed.dim() != 2 or packed.shape[0] % 2:
        expected = "[2N, K]" if layout == "packed_nk" else "[K, 2N]"
        bad_value("weight", f"has shape {list(weight.shape)}, expected {expected}")
    halves = _Halves.apply if is_recording(packed) and is_plain_call(packed) else torch.chunk
    first, second = halves(packed, 2)
    return (first, second) if gate_order == "gate_first" else (second, first)


class _Halves(torch.autograd.Function):
    """``torch.chunk`` into two, whose backward copies nothing where the gradients are halves of one tensor already."""

    @staticmethod
    def forward(ctx, packed, count):
        return packed.chunk(count)

    @staticmethod
    def backward(ctx, first, second):
        if torch.is_grad_enabled() or not is_plain_call(first, second) or not are_halves(first, second):
            return torch.cat((first, second)), None
        return first.as_strided((2 * first.shape[0], first.shape[1]), first.stride()), None


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, in torch's own operations: what :func:`swiglu_fused` is held to.

    >>> import torch, swiglu
    >>> swiglu.swiglu_torch(torch.zeros(2), torch.ones(2))
    tensor([0., 0.])
    """
    return F.silu(gate) * up


def swiglu_fused(gate: Tensor, up: Tensor | None = None, *, gate_order: str = "gate_first") -> Tensor:
    """``silu(gate) * up``, elementwise, of two tensors or of the two halves of one; gradients flow to both.

    Args:
        gate: ``[..., N]``, any shape and strides; without ``up`` both halves side by side, ``[..., 2N]``.
        up: of the same shape.
        gate_order: which half is the gate, ``"gate_first"`` or ``"up_first"``; only matters without ``up``.

    Computed in float32 and rounded once (float64 of float64). Prefer :func:`forward` where the GEMMs before it are
    yours too: it needs no intermediate tensor.

    Raises:
        TypeError: a number format is not bfloat16, float16, float32 or float64, or they differ.
        ValueError: the shapes or devices differ, or the last dimension is odd; the message names the argument.

    >>> import torch, swiglu
    >>> gate, up = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    >>> z = swiglu.swiglu_fused(gate, up)
    >>> torch.equal(z, swiglu.swiglu_fused(torch.cat([up, gate], -1), gate_order="up_first"))
    True
    """
    check_choice("gate_order", gate_order, GATE_ORDERS)
    if is_plain_call(gate, up):
        recording = is_recording(gate, up)
        if up is None:
            return (gate_packed_recorded if recording else run_gate_packed)(gate, gate_order == "up_first")
        return (gate_recorded if recording else run_gate)(gate, up)
    if not _are_tensors(("gate", "up"), (gate, up), 1):
        return handle_torch_function(swiglu_fused, (gate, up), gate, up, gate_order=gate_order)
    if _is_torchs(gate):
        if up is None:
            if not gate.is_nested:
                check_packed(gate)
            first, second = gate.chunk(2, -1)
            gate, up = (first, second) if gate_order == "gate_first" else (second, first)
        if not gate.is_nested:
            check_pair(gate, up)
        return swiglu_torch(gate, up)
    _make_ready(gate, up)
    return gate_packed_op(gate, gate_order == "up_first") if up is None else gate_op(gate, up)


_NAMES = ("x", "gate", "up", "gate_bias", "up_bias")


def _are_tensors(names: tuple[str, ...], operands: tuple[Any, ...], required: int) -> bool:
    """False where torch's protocol for what stands for a tensor takes the call, as ``torch.fx`` does that traces.

    TypeError for anything else. The straight way need not ask: it takes tensors alone.
    """
    for operand in operands:
        if operand is not None and not isinstance(operand, Tensor) and has_torch_function(operands):
            return False
    check_tensors(names, operands, required)
    return True


def _is_torchs(x: Tensor) -> bool:
    """Whether torch's own operations compute all of it: of nested tensors, under torch.func, with forward gradients."""
    return x.is_nested or is_transformed()


def _make_ready(*tensors: Tensor | None) -> None:
    """What torch's dispatcher does with DTensors, and what its FLOP counter counts."""
    if not torch.compiler.is_compiling():
        prepare_for(tensors)
        tell_flop_counter()


def _transposed(name: str, matrix: Tensor) -> Tensor:
    if matrix.dim() != 2:
        bad_value(name, f"has shape {list(matrix.shape)}, expected two dimensions")
    return matrix.t()
