"""Fused SwiGLU for PyTorch: ``z = silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` in one launch.

- :func:`forward`: the operation, with autograd, autocast and ``torch.compile``
- :class:`SwiGLU`: the MLP block around it
- :func:`prepare`: compiles ahead, for CUDA graphs and for the shortest call
- :func:`split_packed`: the gate and up views of one packed weight

CPU tensors run on the CPU backend. Importing needs neither a GPU nor CUDA.
"""

from ._functional import forward, split_packed, swiglu_fused, swiglu_torch
from ._module import SwiGLU
from ._native import __version__
from ._plan import Plan, prepare

__all__ = ["Plan", "SwiGLU", "__version__", "forward", "prepare", "split_packed", "swiglu_fused", "swiglu_torch"]
