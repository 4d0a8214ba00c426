"""The oldest torch that has what this package imports, said in a sentence."""

import torch

_OLDEST = (2, 5)

if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(
        f"swiglu needs torch {'.'.join(map(str, _OLDEST))} or later, found {torch.__version__}: update torch"
    )
