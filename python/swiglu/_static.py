"""The caller's promise that weights are static."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_promised: ContextVar[bool] = ContextVar("swiglu_static_weights", default=False)

is_promised = _promised.get


@contextmanager
def static_weights() -> Iterator[None]:
    """Within, weights are static: nothing that may still run on the GPU when a call is made writes them. Decoding keeps that.

    On Hopper and later a kernel may start before the one ahead of it has ended. Those for few tokens then read weights at once and
    wait for ``x`` alone, which saves 0.7 to 3.2 us a launch of few tokens. Calls that are captured in a CUDA graph within keep the promise for every
    replay; call :func:`prepare` with ``static_weights=True`` before. Calls that record gradients are not concerned, nor are those that
    torch's dispatcher serves (``torch.compile``, autocast, a profiler, ``torch.ops.swiglu``) or that copy an operand, nor is the CPU.

    What a call computes whose weights are being written (by an optimiser's step right before, say) is not defined: synchronise
    first, or leave the promise out. Per thread, as every context variable.

    >>> import torch, swiglu
    >>> mlp = swiglu.SwiGLU(16, 32)
    >>> with swiglu.static_weights(), torch.no_grad():
    ...     mlp(torch.ones(2, 16)).shape
    torch.Size([2, 16])
    """
    before = _promised.set(True)
    try:
        yield
    finally:
        _promised.reset(before)
