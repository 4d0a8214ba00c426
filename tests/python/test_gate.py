"""The elementwise gate: values, gradients to the second order, layouts, and what torch.library asks of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, relative_error

import swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.swiglu


def assert_rounded_once(got, expected):
    """Every element is within half a unit in the last place, and what float32 loses before that."""
    units = torch.finfo(got.dtype).eps * (4 if got.dtype is torch.float32 else 0.51)
    error = (got.detach().double() - expected).abs()
    assert (error <= units * expected.abs() + 1e-6).all(), error.max()


def float64(gate, up, dz=None):
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    z = F.silu(gate) * up
    return z.detach() if dz is None else (z.detach(), *torch.autograd.grad(z, (gate, up), dz.double()))


def pair(*shape, dtype=torch.float32, device="cpu"):
    return [torch.randn(*shape, device=device).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 16), (33, 129), (1, 1), (0, 4), (3, 0)])
def test_matches_float64_with_one_rounding(shape, dtype, device):
    gate, up = (t.requires_grad_() for t in pair(*shape, dtype=dtype, device=device))
    dz = torch.randn(shape, device=device).to(dtype)
    packed = torch.cat([gate, up], -1).detach().requires_grad_()
    z, z_packed = swiglu.swiglu_fused(gate, up), swiglu.swiglu_fused(packed)
    assert z.dtype is dtype and z.shape == shape and z.is_contiguous()
    expected, *gradients = float64(gate, up, dz)
    assert_rounded_once(z, expected)
    assert_rounded_once(z_packed, expected)  # torch's own loops over rows and halves may differ in the last bit
    z.backward(dz)
    z_packed.backward(dz)
    for got, wanted in zip((gate.grad, up.grad, *packed.grad.chunk(2, -1)), gradients * 2):
        assert got.dtype is dtype
        assert_rounded_once(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_neither_overflow_nor_vanish_wrongly(dtype):
    gate = torch.tensor([-100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0]).to(dtype).requires_grad_()
    up = torch.full((7,), 3.0).to(dtype).requires_grad_()
    swiglu.swiglu_fused(gate, up).sum().backward()
    expected = float64(gate, up, torch.ones(7))
    got = swiglu.swiglu_fused(gate, up), gate.grad, up.grad
    for a, b in zip(got, expected):
        assert_rounded_once(a, b)


def test_not_a_number_and_infinity_pass_through():
    gate = torch.tensor([torch.nan, torch.inf, 1.0])
    up = torch.tensor([1.0, 1.0, torch.nan])
    z = swiglu.swiglu_fused(gate, up)
    assert z[0].isnan() and z[1].isinf() and z[2].isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device):
    base = torch.randn(6, 5, 40, device=device)
    expanded = torch.randn(1, 1, 16, device=device).expand(6, 5, 16)
    for gate, up in (
        (base[..., :16], base[..., 20:36]),
        (base[..., 0:32:2], base[..., 1:32:2]),
        (base.transpose(0, 1)[..., :16], base.transpose(0, 1)[..., 16:32]),
        (expanded, base[..., :16]),
    ):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        z = swiglu.swiglu_fused(gate, up)
        dz = torch.randn(1, device=device).expand(z.shape)
        expected, dgate, dup = float64(gate, up, dz)
        assert z.is_contiguous() and relative_error(z, expected) <= 2e-7
        for got, wanted in zip(torch.autograd.grad(z, (gate, up), dz), (dgate, dup)):
            assert relative_error(got, wanted) <= 2e-7
    halves = base.transpose(0, 1)
    assert relative_error(swiglu.swiglu_fused(halves), float64(*halves.chunk(2, -1))) <= 2e-7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["gate_first", "up_first"])
def test_gradients_to_the_second_order(order, device):
    gate, up = (t.requires_grad_() for t in pair(3, 4, dtype=torch.float64, device=device))
    packed = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    for function, inputs in (
        (swiglu.swiglu_fused, (gate, up)),
        (lambda packed: swiglu.swiglu_fused(packed, gate_order=order), (packed,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_any_subset():
    for want_gate, want_up in itertools.product([False, True], repeat=2):
        gate, up = pair(3, 8)
        gate.requires_grad_(want_gate), up.requires_grad_(want_up)
        z = swiglu.swiglu_fused(gate, up)
        assert z.requires_grad == (want_gate or want_up)
        if z.requires_grad:
            z.sum().backward()
        assert (gate.grad is not None, up.grad is not None) == (want_gate, want_up)


def test_one_tensor_used_twice_and_twice_backward():
    both = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: swiglu.swiglu_fused(t, t), both)
    z = swiglu.swiglu_fused(both, both).sum()
    first = torch.autograd.grad(z, both, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(z, both)[0])


def test_inputs_are_left_alone():
    gate, up = pair(3, 8)
    before = gate.clone(), up.clone()
    swiglu.swiglu_fused(gate.requires_grad_(), up.requires_grad_()).sum().backward()
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, device):
    gate, up = (t.requires_grad_(grad) for t in pair(2, 3, 8, device=device))
    dz = torch.randn(2, 3, 8, device=device, requires_grad=grad)
    packed = torch.randn(2, 3, 20, device=device)[..., 2:18].requires_grad_(grad)
    torch.library.opcheck(OPS.gate.default, (gate, up))
    torch.library.opcheck(OPS.gate.default, (gate.transpose(0, 1), up.transpose(0, 1)))
    torch.library.opcheck(OPS.gate_backward.default, (dz, gate, up))
    torch.library.opcheck(OPS.gate_packed.default, (packed, True))
    torch.library.opcheck(OPS.gate_packed_backward.default, (dz, packed, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def block(gate, up):
        return swiglu.swiglu_fused(gate + 1, up) * swiglu.swiglu_fused(torch.cat([gate, up], -1))

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 9):
        inputs = [t.requires_grad_() for t in pair(rows, 8)]
        expected, got = block(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_the_format_and_widens_a_mixed_pair(device):
    gate, up = pair(4, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert swiglu.swiglu_fused(gate, up).dtype is torch.float32
        assert swiglu.swiglu_fused(gate.bfloat16(), up.bfloat16()).dtype is torch.bfloat16
        mixed = swiglu.swiglu_fused(gate.requires_grad_(), up.bfloat16().requires_grad_())
        assert mixed.dtype is (F.silu(gate) * up.bfloat16()).dtype is torch.float32
    mixed.sum().backward()
    assert gate.grad.dtype is torch.float32


def test_function_transforms_and_forward_gradients():
    gate, up = pair(3, 8, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda g, u: swiglu.swiglu_fused(g, u).sum()))(gate, up)
    torch.testing.assert_close(per_sample, float64(gate, up, torch.ones(3, 8))[1])
    _, tangent = torch.func.jvp(
        lambda g: swiglu.swiglu_fused(torch.cat([g, up], -1)), (gate,), (torch.ones_like(gate),)
    )
    torch.testing.assert_close(tangent, per_sample)


def test_wrong_arguments_are_named():
    gate, up = pair(3, 8)
    for argument, error, inputs in (
        ("gate", TypeError, (gate.int(), up.int())),
        ("up", ValueError, (gate, up[:2])),
        ("up", ValueError, (gate, up[:, :1])),
        ("up", TypeError, (gate, up.half())),
        ("up", ValueError, (gate, up.to("meta"))),
        ("gate", ValueError, (gate[:, :7],)),
        ("gate", ValueError, (torch.tensor(1.0),)),
    ):
        with pytest.raises(error, match=f"argument `{argument}`: "):
            swiglu.swiglu_fused(*inputs)
    with pytest.raises(ValueError, match="argument `gate_order`: "):
        swiglu.swiglu_fused(gate, gate_order="first")
