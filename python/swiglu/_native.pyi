"""The native half. Addresses and strides are integers, strides in elements; a bias address of 0 means none."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

__version__: str

def set_nvrtc_folder(folder: str) -> None: ...
def largest_size(dtype: str) -> int: ...
def prepare(
    device: int, dtype: str, layout: str, n: int, k: int, save: bool = False, static_weights: bool = False
) -> Plan: ...
def forward(
    device: int,
    dtype: str,
    layout: str,
    n: int,
    k: int,
    stream: int,
    m: int,
    x: int,
    x_stride: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    gate_bias: int,
    up_bias: int,
    z: int,
    z_stride: int,
    saved_gate: int,
    saved_gate_stride: int,
    saved_up: int,
    saved_up_stride: int,
) -> bool: ...
def prepare_step(device: int, dtype: str, op: str, major: str, n: int, k: int) -> None: ...
def step(
    device: int,
    dtype: str,
    stream: int,
    m: int,
    op: str,
    major: str,
    n: int,
    k: int,
    left: tuple[int, ...],
    right: tuple[int, ...],
    saved: tuple[int, ...],
    out: tuple[int, ...],
    bias: int,
) -> None: ...
def backward(
    step: Callable[..., None],
    layer: tuple[int | str, ...],
    of_dy: tuple[int, int],
    of_x: tuple[int, int],
    of_weights: tuple[int, int, int, int],
    of_down: tuple[int, str, tuple[int, int]] | None,
    of_saved: tuple[int, int, int, int],
    of_grads: tuple[int, int, int, int],
    of_dx: tuple[int, int] | None,
    of_d_weights: tuple[int, int, int, int] | None,
    of_d_down: tuple[int, int] | None,
    of_new_z: tuple[int, int] | None,
    of_z: tuple[int, int] | None,
) -> None: ...

@final
class Plan:
    def launch(
        self,
        stream: int,
        m: int,
        x: int,
        x_stride: int,
        gate: int,
        gate_stride: int,
        up: int,
        up_stride: int,
        gate_bias: int,
        up_bias: int,
        z: int,
        z_stride: int,
    ) -> None: ...
    def matched(self, m: int) -> str: ...
    def config(self, m: int) -> str: ...

@final
class Torch:
    """What Python asks and makes past torch's dispatcher. None: out of the ordinary, go the general way."""

    def __init__(
        self,
        capsule: object,
        tensor: type,
        parameter: type,
        is_negated: Callable[[Tensor], bool],
        empty_cpu: Callable[..., Tensor],
        empty_cuda: Callable[..., Tensor],
        bf16: torch.dtype,
        f16: torch.dtype,
        f32: torch.dtype,
        word_of_f32: Callable[[int], str],
        note_new: Callable[..., None],
    ) -> None: ...
    def are_plain(self, *tensors: Tensor | None) -> bool: ...
    def forward(
        self,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        static_weights: bool,
    ) -> Tensor | None: ...
    def forward_recorded(
        self,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None, Layer] | None: ...
    def down(
        self, step: Callable[..., None], z: Tensor, down: Tensor, bias: Tensor | None, static_weights: bool
    ) -> Tensor | None: ...
    def empty(self, like: Tensor, shape: Sequence[int] | None = None, transposed: bool = False) -> Tensor | None: ...
    def backward(
        self,
        step: Callable[..., None],
        layer: Layer,
        dy: Tensor,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        kept: Tensor | None,
        d_weights: tuple[Tensor, Tensor] | None,
        in_place: bool,
        need_x: bool,
        need_weights: bool,
        need_down: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None: ...

@final
class Layer:
    """How the operands of one forward lay."""

    @property
    def device(self) -> int: ...
    @property
    def layout(self) -> str: ...
