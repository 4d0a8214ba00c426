"""The native steps, played on CPU tensors from the addresses and strides they are given: what the package passes is what counts."""

import ctypes

import torch
import torch.nn.functional as F

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def matrix(dtype, given, rows, cols):
    """Rows of adjacent elements, or an AssertionError."""
    address, stride = given
    item = dtype.itemsize
    assert address and address % item == 0 and (stride >= cols or rows == 1), (address, stride, rows, cols)
    count = (rows - 1) * stride + cols
    memory = (ctypes.c_byte * (count * item)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, cols), (stride, 1))


def step(device, dtype, stream, m, op, major, n, k, left, right, saved, out, bias):
    """As ``RawStep`` in the runtime says, in float64, every output rounded once."""
    assert device == -1 and stream == 0 and m > 0 and n > 0 and k > 0
    left, right, saved, out = (list(zip(group[::2], group[1::2], strict=True)) for group in (left, right, saved, out))
    op = op.removesuffix("_static")  # of when weights are read
    dtype, k_major = DTYPES[dtype], {"k_major": True, "n_major": False}[major]

    def read(group, *shapes):
        assert len(group) == len(shapes), (op, group)
        return [matrix(dtype, given, *shape).double() for given, shape in zip(group, shapes)]

    def write(*values):
        assert len(out) == len(values), (op, out)
        for given, value in zip(out, values):
            matrix(dtype, given, *value.shape).copy_(value)

    def weight(shape):
        """A weight as `[N, K]` (of down `[K, N]`) in memory, or its transpose."""
        return shape if k_major else shape[::-1]

    def gated(dz, g, u):
        sigmoid = g.sigmoid()
        silu = g * sigmoid
        return dz * u * (sigmoid + silu * (1 - sigmoid)), dz * silu, silu * u

    mn, mk, nk, kn = (m, n), (m, k), (n, k), (k, n)
    if op not in ("down",):
        assert bias == 0
    if op == "gate":
        g, u = read(saved, mn, mn)
        write(F.silu(g) * u)
    elif op == "gate_backward":
        write(*gated(*read(left, mn), *read(saved, mn, mn))[: len(out)])
    elif op == "down":
        (z,), (w,) = read(left, mn), read(right, weight(kn))
        shift = matrix(dtype, (bias, k), 1, k).double() if bias else 0
        write(z @ (w.t() if k_major else w) + shift)
    elif op == "dgated":
        (dy,), (w,) = read(left, mk), read(right, weight(kn))
        write(*gated(dy @ (w if k_major else w.t()), *read(saved, mn, mn))[: len(out)])
    elif op == "input_grad":
        dg, du = read(left, mn, mn)
        gate, up = (w if k_major else w.t() for w in read(right, weight(nk), weight(nk)))
        write(dg @ gate + du @ up)
    elif op == "weight_grad" and k_major:
        (dg, du), (x,) = read(left, mn, mn), read(right, mk)
        write(dg.t() @ x, du.t() @ x)
    elif op == "weight_grad":
        (x,), (dg, du) = read(left, mk), read(right, mn, mn)
        write(x.t() @ dg, x.t() @ du)
    elif op == "down_weight_grad" and k_major:
        (dy,), (z,) = read(left, mk), read(right, mn)
        write(dy.t() @ z)
    elif op == "down_weight_grad":
        (z,), (dy,) = read(left, mn), read(right, mk)
        write(z.t() @ dy)
    else:
        raise AssertionError(f"unknown step {op}")
