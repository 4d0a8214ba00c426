"""Compile ahead, then call without compiling, copying or dispatching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import _native, _steps
from ._library import has_tangent
from ._operands import (
    DTYPES,
    LAYOUTS,
    bad_type,
    bad_value,
    check_choice,
    check_tensor,
    dtype_word,
    row_stride,
    stream_of,
)
from ._straight import are_plain, empty
from ._tuning import note_untuned

_MANY_TOKENS = 4096  # of the Ms that a plan may meet, one where tuning matters


class Plan:
    """A prepared ``(device, dtype, order of the weights, N, K)``; made by :func:`prepare`. Any M, any thread."""

    def __init__(
        self,
        native: _native.Plan,
        device: torch.device,
        dtype: torch.dtype,
        transposed: bool,
        n: int,
        k: int,
        preparation: tuple,
    ):
        self._native = native
        self._launch = native.launch
        self._index = -1 if device.index is None else device.index
        self._transposed = transposed
        self._n = n
        self._k = k
        self._preparation = preparation
        self.device = device
        self.dtype = dtype

    def __deepcopy__(self, _memo: dict) -> Plan:
        return self  # nothing of it changes

    def __reduce__(self) -> tuple:
        """Unpickled, it is prepared again: on the machine that unpickles."""
        return _prepare, self._preparation

    def __call__(
        self,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As :func:`swiglu.forward` on ``x`` ``[M, K]``, without autograd, on the current stream; may be captured.

        ``gate`` and ``up`` are ``[N, K]``; a plan for ``separate_kn`` or ``packed_kn`` takes transposed views of
        ``[K, N]``. ``out`` is ``[M, N]`` and written in place; without it a new tensor is made.

        Raises:
            TypeError, ValueError: an argument does not fit, or would have to be copied; the message names it.
            RuntimeError: gradients would be lost, forward ones too, or the driver refused the launch.
        """
        n, k = self._n, self._k
        try:
            if x.dim() != 2:
                bad_value("x", f"has shape {list(x.shape)}, expected [M, {k}]")
            m = x.shape[0]
            z = empty(x, (m, n)) if out is None else out
            if torch.is_grad_enabled() and (
                x.requires_grad or gate.requires_grad or up.requires_grad or z.requires_grad
            ):
                raise RuntimeError(
                    "a plan records no gradients: call it under torch.no_grad(), or call swiglu.forward()"
                )
            if forward_ad._current_level >= 0 and any(map(has_tangent, (x, gate, up, gate_bias, up_bias, out))):
                raise RuntimeError("a plan has no forward gradients: call swiglu.forward()")
            rows, cols = n, k
            if self._transposed:
                gate, up, rows, cols = gate.t(), up.t(), k, n
            stride = self._matrix
            arguments = (
                m,
                x.data_ptr(),
                stride("x", x, m, k),
                gate.data_ptr(),
                stride("gate", gate, rows, cols),
                up.data_ptr(),
                stride("up", up, rows, cols),
                0 if gate_bias is None else self._bias("gate_bias", gate_bias),
                0 if up_bias is None else self._bias("up_bias", up_bias),
                z.data_ptr(),
                stride("out", z, m, n),
            )
        except (AttributeError, RuntimeError):  # of what has no address
            _check_memory(x, gate, up, gate_bias, up_bias, out)
            raise
        self._launch(stream_of(self._index), *arguments)
        if out is not None:
            increment_version(out)  # a backward that saved it is told
        return z

    def config(self, m: int) -> str:
        """The kernel that serves ``m`` tokens, and how it was found.

        >>> import torch, swiglu
        >>> swiglu.prepare(16, 32, dtype=torch.float32, device="cpu").config(1).startswith("cpu")
        True
        """
        return self._native.config(m)

    def _matrix(self, name: str, matrix: Tensor, rows: int, cols: int) -> int:
        """Its row stride, once it is what was prepared for."""
        if matrix.dtype is not self.dtype:
            bad_type(name, f"is {matrix.dtype}, expected {self.dtype} as prepared")
        if matrix.device != self.device:
            bad_value(name, f"is on {matrix.device}, expected {self.device} as prepared")
        if matrix.shape != (rows, cols):
            bad_value(name, f"has shape {list(matrix.shape)}, expected [{rows}, {cols}] in memory")
        if matrix.is_neg():
            bad_value(name, "is lazily negated; call resolve_neg() first")
        if matrix.is_contiguous():
            return cols
        stride = row_stride(matrix)
        if stride is None:
            bad_value(name, f"has strides {list(matrix.stride())}, expected rows of {cols} adjacent elements in memory")
        return stride

    def _bias(self, name: str, bias: Tensor) -> int:
        if bias.dim() != 1:
            bad_value(name, f"has shape {list(bias.shape)}, expected [{self._n}]")
        self._matrix(name, bias[None], 1, self._n)
        if torch.is_grad_enabled() and bias.requires_grad:
            raise RuntimeError("a plan records no gradients: call it under torch.no_grad(), or call swiglu.forward()")
        return bias.data_ptr()


def _check_memory(*operands: Tensor | None) -> None:
    """Raises TypeError for an operand of a plan that is no tensor, or none with an address."""
    for place, (name, operand) in enumerate(zip(("x", "gate", "up", "gate_bias", "up_bias", "out"), operands)):
        if operand is not None or place < 3:
            check_tensor(name, operand)  # type: ignore[arg-type]
            if not are_plain(operand):
                bad_type(name, "has no memory of its own, as under torch.func: call swiglu.forward()")


def _prepare(sizes: tuple[int, int], options: dict[str, Any]) -> Plan:
    return prepare(*sizes, **options)


def prepare(
    hidden_size: int,
    intermediate_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str | int,
    layout: str = "separate_nk",
    out_features: int | None = None,
    training: bool = False,
    static_weights: bool = False,
) -> Plan:
    """Compiles and loads every kernel that :func:`swiglu.forward`, :func:`swiglu.swiglu_ffn` and :func:`swiglu.swiglu_fused`
    may launch for these sizes, whatever M.

    Afterwards they and the returned plan may be captured in a CUDA graph. Keep no plan for that: plans stay for the life of
    the process.

    Args:
        hidden_size: K, columns of ``x``.
        intermediate_size: N, columns of the result.
        dtype: bfloat16, float16 or float32.
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``.
        layout: how the weights lie in memory: ``"separate_nk"`` or ``"packed_nk"`` (rows of K, ``nn.Linear``),
            ``"separate_kn"`` or ``"packed_kn"`` (rows of N). The down projection lies likewise.
        out_features: columns of what the down projection gives; ``hidden_size`` unless given.
        training: whether gradients will be asked for: then also what saves for them and what computes them.
        static_weights: whether calls will be made under :func:`static_weights`: then also what they launch, and the plan
            itself makes that promise.

    Raises:
        TypeError: ``dtype`` is not supported, or a size is no integer.
        ValueError: a size, ``device`` or ``layout`` is not; the message names the argument.
        RuntimeError: the GPU, its driver or NVRTC cannot be used, or kernels do not compile.

    >>> import torch, swiglu
    >>> plan = swiglu.prepare(4, 8, dtype=torch.float32, device="cpu")
    >>> plan(torch.ones(3, 4), torch.ones(8, 4), torch.ones(8, 4)).shape
    torch.Size([3, 8])
    """
    if dtype not in DTYPES:
        bad_type("dtype", f"is {dtype}, expected bfloat16, float16 or float32")
    check_choice("layout", layout, LAYOUTS)
    out = hidden_size if out_features is None else out_features
    most = _native.largest_size(DTYPES[dtype])
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size), ("out_features", out)):
        if not hasattr(size, "__index__"):
            bad_type(name, f"is {size!r}, expected an integer")
        if not 0 <= size <= most:
            bad_value(name, f"is {size}, expected 0 to {most} in {dtype}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        bad_value("device", f"is {device!r}: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        bad_value("device", f"is {device}, expected a CPU or a CUDA device")
    if device.type == "cpu":
        device = torch.device("cpu")
    elif not torch.cuda.is_available():
        raise RuntimeError("argument `device`: torch sees no usable GPU")
    elif device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    index = -1 if device.index is None else device.index
    word, sizes = dtype_word(dtype, index), (intermediate_size, hidden_size)
    native = plain = _native.prepare(index, word, layout, *sizes)
    if training:
        _native.prepare(index, word, layout, *sizes, True)
    if static_weights:
        native = _native.prepare(index, word, layout, *sizes, False, True)
    if index >= 0 and min(*sizes, out) > 0:
        _steps.prepare(index, word, layout.endswith("kn"), *sizes, out, training, static_weights)
    note_untuned(plain, index, word, layout, *sizes, training, _MANY_TOKENS)
    options = {"dtype": dtype, "device": device, "layout": layout, "out_features": out_features}
    options |= {"training": training, "static_weights": static_weights}
    preparation = (hidden_size, intermediate_size), options
    return Plan(native, device, dtype, layout.endswith("kn"), intermediate_size, hidden_size, preparation)
