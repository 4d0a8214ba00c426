"""Fused SwiGLU for PyTorch: ``z = silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` in one launch.

- :func:`forward`: the operation, with autograd, autocast and ``torch.compile``
- :func:`swiglu_ffn`: the whole feed-forward block
- :func:`swiglu_fused`: the elementwise half
- :class:`SwiGLU`: it as a module; :class:`FusedSwiGLU`: with one packed parameter
- :mod:`swiglu.liger`, :mod:`swiglu.xformers`: the names that Liger and xformers have for the same
- :func:`patch`, :func:`unpatch`: the blocks of an existing model, in place
- :func:`prepare`: compiles ahead, for CUDA graphs
- :func:`static_weights`: a promise that makes decoding faster
- :func:`split_packed`: the gate and up views of one packed weight

CPU tensors run on the CPU backend. Importing needs neither a GPU nor CUDA.
"""

from . import _minimum  # noqa: F401, first: the others' imports would say less
from ._functional import forward, split_packed, swiglu_ffn, swiglu_fused, swiglu_torch
from ._module import FusedSwiGLU, SwiGLU
from ._native import __version__
from ._patch import PatchReport, patch, unpatch
from ._plan import Plan, prepare
from ._static import static_weights
from .liger import SiLUMulFunction, SwiGLUMLP

__all__ = [
    "FusedSwiGLU",
    "PatchReport",
    "Plan",
    "SiLUMulFunction",
    "SwiGLU",
    "SwiGLUMLP",
    "__version__",
    "forward",
    "patch",
    "prepare",
    "split_packed",
    "static_weights",
    "swiglu_ffn",
    "swiglu_fused",
    "swiglu_torch",
    "unpatch",
]
