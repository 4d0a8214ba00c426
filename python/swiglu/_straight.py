"""Torch as native code sees it: tensors read by DLPack's C exchange API, outputs made past torch's dispatcher.

Both are optional. Where this torch lacks them :data:`native` is None, and every call goes the general way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C import _has_storage

from . import _native
from ._operands import dtype_word
from ._tuning import note_new

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def read_by(empty_cpu, empty_cuda) -> _native.Torch:
    """Torch as native code sees it, of these allocators; each takes shape, strides and format, and the current device.

    Raises:
        AttributeError, ValueError: torch has no exchange API, or another one.
    """
    return _native.Torch(
        Tensor.__dlpack_c_exchange_api__,
        Tensor,
        torch.nn.Parameter,
        Tensor.is_neg,
        empty_cpu,
        empty_cuda,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        partial(dtype_word, torch.float32),
        note_new,
    )


def find() -> _native.Torch | None:
    """The same of torch's own allocators; None where anything is missing."""
    try:
        from torch._C._dynamo import guards  # whose stub leaves these out

        return read_by(guards._empty_strided_cpu, guards._empty_strided_cuda)  # type: ignore[attr-defined]
    except (AttributeError, ImportError, ValueError):
        return None


native = find()


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether each that is given is on a CPU or GPU with memory of its own: no subclass, wrapper or lazy negation."""
    if native is not None:
        return native.are_plain(*tensors)
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TYPES or tensor.is_neg() or tensor.is_nested or not _has_storage(tensor):
            return False
        if not (tensor.is_cuda or tensor.is_cpu):
            return False
    return True


def empty(like: Tensor, shape: Sequence[int] | None = None, transposed: bool = False) -> Tensor:
    """Unwritten memory for an output: of the format and on the device of ``like``, of its shape unless ``shape`` is another.

    Rows lie one after another; columns do if ``transposed``, which takes two dimensions.
    """
    if native is not None and (made := native.empty(like, shape, transposed)) is not None:
        return made
    shape = like.shape if shape is None else shape
    return like.new_empty(shape[::-1]).t() if transposed else like.new_empty(shape)
