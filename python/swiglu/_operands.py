"""What may be passed, said once, and how it lies in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

# float64 is served by torch's own operations: for gradient checks.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
LAYOUTS = ("separate_nk", "separate_kn", "packed_nk", "packed_kn")
GATE_ORDERS = ("gate_first", "up_first")
SAVE = ("preactivations", "nothing")
# What torch.backends.cuda.matmul.fp32_precision reads; since torch 2.9.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def bad_value(argument: str, reason: str) -> NoReturn:
    raise ValueError(f"argument `{argument}`: {reason}")


def bad_type(argument: str, reason: str) -> NoReturn:
    raise TypeError(f"argument `{argument}`: {reason}")


def check_choice(argument: str, word: str, words: tuple[str, ...]) -> None:
    """Raises ValueError for a word that is none of ``words``."""
    if word not in words:
        bad_value(argument, f"is {word!r}, expected {' or '.join(map(repr, words))}")


def check_tensor(argument: str, tensor: Tensor) -> None:
    """Raises TypeError for what is no tensor, or none of rows of numbers."""
    if not isinstance(tensor, Tensor):
        bad_type(argument, f"is {type(tensor).__name__ if tensor is not None else None}, expected a tensor")
    if tensor.layout is not torch.strided and not tensor.is_nested:
        bad_type(argument, f"has layout {tensor.layout}, expected torch.strided")
    if tensor.is_quantized:
        bad_type(argument, f"is quantised to {tensor.dtype}, expected bfloat16, float16, float32 or float64")


def check_tensors(names: Sequence[str], tensors: Sequence[Tensor | None], required: int) -> None:
    """The same of several, of which those behind the first ``required`` may be left out."""
    for place, (name, tensor) in enumerate(zip(names, tensors)):
        if tensor is not None or place < required:
            check_tensor(name, tensor)  # type: ignore[arg-type]


def raise_restated(error: Exception, check_again: Callable, *operands) -> NoReturn:
    """Raises what ``check_again`` finds wrong with the operands as the caller named them; ``error`` if nothing of its kind."""
    try:
        check_again(*operands)
    except Exception as said:  # of no tensors, anything
        # Autocast makes formats alike that are checked as they are here.
        is_of_formats = type(error) is TypeError and _is_any_autocast_enabled()
        if type(said) is type(error) and not is_of_formats:
            raise said from None
    raise error


def check_dtype(argument: str, tensor: Tensor) -> None:
    """Raises TypeError for a number format that no operation takes."""
    if tensor.dtype not in DTYPES and tensor.dtype is not torch.float64:
        bad_type(argument, f"is {tensor.dtype}, expected bfloat16, float16, float32 or float64")


def check(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    names: tuple[str, str, str, str] = ("gate", "up", "gate_bias", "up_bias"),
    transposed: bool = False,
) -> None:
    """Raises TypeError (number format) or ValueError (shape, device) with the argument's name.

    ``transposed``: ``gate`` and ``up`` are ``[K, N]``.
    """
    if x is None or gate is None or up is None:
        check_tensors(("x", *names[:2]), (x, gate, up), 3)
    dtype, device = x.dtype, x.device
    gate_name, up_name, gate_bias_name, up_bias_name = names
    check_dtype("x", x)
    if gate.dim() != 2:
        bad_value(gate_name, f"has shape {list(gate.shape)}, expected {'[K, N]' if transposed else '[N, K]'}")
    k, n = gate.shape if transposed else gate.shape[::-1]
    if x.dim() == 0 or x.shape[-1] != k:
        lines = "rows" if transposed else "columns"
        bad_value("x", f"has shape {list(x.shape)}, expected [..., {k}] as `{gate_name}` has {k} {lines}")
    if up.shape != gate.shape:
        bad_value(up_name, f"has shape {list(up.shape)}, expected {list(gate.shape)} as `{gate_name}`")
    if gate.dtype != dtype or up.dtype != dtype:
        name, other = (gate_name, gate) if gate.dtype != dtype else (up_name, up)
        bad_type(name, f"is {other.dtype}, expected {dtype} as `x`")
    if gate.device != device or up.device != device:
        name, other = (gate_name, gate) if gate.device != device else (up_name, up)
        bad_value(name, f"is on {other.device}, expected {device} as `x`")
    if gate_bias is not None:
        check_bias(gate_bias_name, gate_bias, x, n)
    if up_bias is not None:
        check_bias(up_bias_name, up_bias, x, n)


def check_bias(name: str, bias: Tensor, x: Tensor, rows: int) -> None:
    """The same for the bias of a projection whose weight has so many rows."""
    if bias.dim() != 1 or bias.shape[0] != rows:
        bad_value(name, f"has shape {list(bias.shape)}, expected [{rows}]")
    if bias.dtype != x.dtype:
        bad_type(name, f"is {bias.dtype}, expected {x.dtype} as `x`")
    if bias.device != x.device:
        bad_value(name, f"is on {bias.device}, expected {x.device} as `x`")


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether it is one; there is none where nobody imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def as_dense(gradient: Tensor) -> Tensor:
    """What a sparse gradient stands for: it may arrive where the result is dense."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def row_stride(matrix: Tensor) -> int | None:
    """Elements from row to row, if that says all: rows of adjacent elements that do not overlap."""
    rows, cols = matrix.shape
    row_stride, col_stride = matrix.stride()
    if (col_stride == 1 or cols <= 1) and (row_stride >= cols or rows <= 1):
        # A single row may have any stride: take the handiest.
        return row_stride if rows > 1 else cols
    return None


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as a row-major ``[M, K]``, and its row stride; a copy only where one stride cannot describe it."""
    cols = x.shape[-1]
    if x.is_contiguous():
        return x, cols  # the leading dimensions need no view: only the address is used
    if x.dim() != 2:
        x = x.reshape(-1, cols)
    stride = row_stride(x)
    return (x, stride) if stride is not None else (x.contiguous(), cols)


def as_weights(gate: Tensor, up: Tensor) -> tuple[Tensor, int, Tensor, int, str]:
    """Both weights with their row strides, as matrices of one layout, and its name; copies only where none fits."""
    if gate.is_contiguous() and up.is_contiguous():
        cols = gate.shape[1]
        return gate, cols, up, cols, "separate_nk"
    for first, second, layout in ((gate, up, "separate_nk"), (gate.t(), up.t(), "separate_kn")):
        strides = row_stride(first), row_stride(second)
        if strides[0] is not None and strides[1] is not None:
            return first, strides[0], second, strides[1], layout
    return gate.contiguous(), gate.shape[1], up.contiguous(), up.shape[1], "separate_nk"


class Layer(NamedTuple):
    """How the operands of one layer lie: what native calls take beside addresses. Strides are of rows, in elements."""

    device: int
    dtype: str
    stream: int
    m: int
    n: int
    k: int
    layout: str
    x_stride: int
    gate_stride: int
    up_stride: int


def lay(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Layer, Tensor, Tensor, Tensor]:
    """The layer of operands that are not empty, and the three that lie so; copies only where none fits."""
    n, k = gate.shape
    device = x.get_device()
    rows, x_stride = as_rows(x)
    gate, gate_stride, up, up_stride, layout = as_weights(gate, up)
    word = dtype_word(x.dtype, device)
    layer = Layer(device, word, stream_of(device), x.numel() // k, n, k, layout, x_stride, gate_stride, up_stride)
    return layer, rows, gate, up


def are_halves(first: Tensor, second: Tensor) -> bool:
    """Whether both are in memory what ``chunk(2)`` makes of one matrix."""
    distance = first.shape[0] * first.stride(0) * first.element_size()
    return (
        first.stride() == second.stride()
        and second.data_ptr() - first.data_ptr() == distance
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    )


def dtype_word(dtype: torch.dtype, device: int) -> str:
    """The runtime's word for a number format; fp32 on a GPU follows torch's matmul precision."""
    word = DTYPES[dtype]
    if word == "f32" and device >= 0 and _allows_tf32():
        return "tf32" if torch.cuda.get_device_capability(device) >= (8, 0) else word
    return word


def _allows_tf32() -> bool:
    if _fp32_precision is not None:  # where it is used, the older call may refuse to answer
        return _fp32_precision("cuda", "matmul") == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def stream_of(device: int) -> int:
    """The handle of torch's current stream on GPU ``device``; 0 for the CPU, which is -1."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
