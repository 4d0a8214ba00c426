"""The IDX format of MNIST: a magic number, big-endian sizes, then bytes; with or without gzip."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

# Third byte: the element type; only unsigned bytes occur in MNIST. Fourth: the number of dimensions.
_UNSIGNED_BYTE = 8


def read(path: Path) -> Tensor:
    """The file's array as uint8; ValueError names the file and what is wrong with it."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"{path}: is no IDX file")
    kind, dimensions = data[2], data[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(f"{path}: elements of type {kind:#x}, expected {_UNSIGNED_BYTE:#x}, unsigned bytes")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(f"{path}: ends in its sizes")
    sizes = struct.unpack(f">{dimensions}I", data[4:start])
    expected = 1
    for size in sizes:
        expected *= size
    if len(data) - start != expected:
        raise ValueError(f"{path}: holds {len(data) - start} elements, its sizes {list(sizes)} say {expected}")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(sizes)


def mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[count, rows * columns]`` in 0 to 1 and labels, of training and of test."""

    def find(stem: str) -> Tensor:
        names = [stem, f"{stem}.gz", stem.replace("-idx", ".idx")]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{folder}: none of {', '.join(names)}")
        return read(found)

    parts = []
    for part in ("train", "t10k"):
        images, labels = find(f"{part}-images-idx3-ubyte"), find(f"{part}-labels-idx1-ubyte")
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(f"{folder}: {part} has images {list(images.shape)} and labels {list(labels.shape)}")
        parts += [images.flatten(1).float() / 255, labels.long()]
    return tuple(parts)
