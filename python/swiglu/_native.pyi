"""The native half. Addresses and strides are integers, strides in elements; a bias address of 0 means none."""

from typing import final

__version__: str

def set_nvrtc_folder(folder: str) -> None: ...
def prepare(device: int, dtype: str, layout: str, n: int, k: int, save: bool = False) -> Plan: ...
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
