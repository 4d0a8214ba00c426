"""Gradients: against finite differences, against float64 autograd, and only those asked for."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, kept_numbers, operands, relative_error
from torch.utils.checkpoint import checkpoint

import swiglu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def float64_grads(inputs, dz):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    x, gate, up, gate_bias, up_bias = wide
    z = F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    given = [t for t in wide if t is not None]
    return torch.autograd.grad(z, given, dz.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias, device):
    inputs = [None if t is None else t.requires_grad_() for t in operands((2, 3), 4, 5, torch.float64, device, bias)]
    assert torch.autograd.gradcheck(swiglu.forward, inputs)
    assert torch.autograd.gradgradcheck(swiglu.forward, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_matches_float64_autograd(dtype, device):
    inputs = [t.requires_grad_() for t in operands((3, 11), 72, 40, dtype, device, bias=True)]
    dz = torch.randn(3, 11, 72, device=device).to(dtype)
    grads = torch.autograd.grad(swiglu.forward(*inputs), inputs, dz)
    for tensor, got, expected in zip(inputs, grads, float64_grads(inputs, dz)):
        assert got.dtype is dtype and got.shape == tensor.shape
        assert relative_error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5))[1:])
def test_any_subset(wanted):
    inputs = [t.requires_grad_(want) for t, want in zip(operands(5, 12, 8, bias=True), wanted)]
    dz = torch.randn(5, 12)
    swiglu.forward(*inputs).backward(dz)
    for tensor, want, expected in zip(inputs, wanted, float64_grads(inputs, dz)):
        assert (tensor.grad is not None) == want
        if want:
            assert relative_error(tensor.grad, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("save", ["preactivations", "nothing"])
@pytest.mark.parametrize(
    "wanted, again, gemms",
    # Pre-activations computed again where they are not kept, then one GEMM a gradient and two for x.
    [((0,), 2, 2), ((1,), 2, 1), ((2,), 1, 1), ((3,), 2, 0), ((4,), 1, 0), ((0, 1, 2), 2, 4)],
)
def test_only_the_gemms_asked_for(wanted, again, gemms, save):
    from torch.utils.flop_counter import FlopCounterMode

    m, n, k = 16, 24, 8
    inputs = operands(m, n, k, bias=True)
    for index in wanted:
        inputs[index].requires_grad_()
    z = swiglu.forward(*inputs, save=save)
    with FlopCounterMode(display=False) as counter:
        z.sum().backward()
    assert counter.get_total_flops() == (gemms + again * (save == "nothing")) * 2 * m * n * k


@pytest.mark.parametrize("save, matrices", [("preactivations", 2), ("nothing", 0)])
def test_what_is_kept(save, matrices):
    """Beside the operands."""
    inputs = [t.requires_grad_() for t in operands(5, 12, 8, bias=True)]
    assert kept_numbers(lambda: swiglu.forward(*inputs, save=save), inputs) == matrices * 5 * 12
    with pytest.raises(ValueError, match="argument `save`: "):
        swiglu.forward(*inputs, save="all")


def test_a_gradient_into_a_view_and_twice_through_the_graph():
    x, gate, up, _, _ = (None if t is None else t.requires_grad_() for t in operands((4, 6), 12, 8))
    z = swiglu.forward(x.transpose(0, 1)[1:], gate, up).sum()
    first = torch.autograd.grad(z, (x, gate, up), retain_graph=True)
    again = torch.autograd.grad(z, (x, gate, up))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    expected = float64_grads([x.transpose(0, 1)[1:], gate, up, None, None], torch.ones(5, 4, 12))
    assert relative_error(first[0].transpose(0, 1)[1:], expected[0]) <= TOLERANCE[torch.float32]
    assert (first[0][:, 0] == 0).all()


def test_a_weight_used_twice():
    x, gate, _, _, _ = operands(5, 12, 8)
    gate.requires_grad_()
    swiglu.forward(x, gate, gate).sum().backward()
    wide = gate.detach().double().requires_grad_()
    (F.silu(x.double() @ wide.t()) * (x.double() @ wide.t())).sum().backward()
    assert relative_error(gate.grad, wide.grad) <= TOLERANCE[torch.float32]


def test_packed_parameter_gets_one_gradient():
    x, gate, up, _, _ = operands(5, 12, 8)
    packed = torch.cat([gate, up]).requires_grad_()
    dz = torch.randn(5, 12)
    swiglu.forward(x, *swiglu.split_packed(packed, layout="packed_nk")).backward(dz)
    _, dgate, dup = float64_grads([x, gate, up, None, None], dz)
    assert relative_error(packed.grad, torch.cat([dgate, dup])) <= TOLERANCE[torch.float32]


def test_activation_checkpointing():
    mlp = swiglu.SwiGLU(8, 12)
    x = torch.randn(5, 8, requires_grad=True)
    plain = torch.autograd.grad(mlp(x).sum(), [x, *mlp.parameters()])
    again = torch.autograd.grad(checkpoint(mlp, x, use_reentrant=False).sum(), [x, *mlp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_no_tokens_give_zero_gradients():
    inputs = [t.requires_grad_() for t in operands(0, 12, 8, bias=True)]
    swiglu.forward(*inputs).sum().backward()
    assert all(t.grad.shape == t.shape and (t.grad == 0).all() for t in inputs)


SPARSE = {
    "forward": (lambda x, w: swiglu.forward(x, w, w), 1),
    "ffn": (lambda x, w: swiglu.swiglu_ffn(x, w, w, w.t(), b_down=x[0]), 1),
    "gate": (lambda x, w: swiglu.swiglu_fused(x, x.sin()), 0),
    "gate_packed": (lambda x, w: swiglu.swiglu_fused(x), 0),
    "raw": (lambda x, w: torch.ops.swiglu.ffn_saving(x, w, w, w.t(), None, None, x[0])[0], 1),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(name, device, launched):
    function, unused = SPARSE[name]
    x, w = torch.randn(5, 8, device=device, requires_grad=True), torch.randn(12, 8, device=device, requires_grad=True)
    y = function(x, w)
    dy = torch.zeros_like(y).index_fill_(0, torch.tensor([1, 3], device=device), 2.0)
    leaves = (x, w)[: 1 + unused]
    expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(y, leaves, dy.to_sparse()), expected):
        torch.testing.assert_close(got, wanted)


def test_elementwise():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(swiglu.swiglu_fused(gate, up), F.silu(gate) * up)
    assert torch.equal(swiglu.swiglu_torch(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu.swiglu_fused, (gate, up))
    with pytest.raises(ValueError, match="argument `up`: "):
        swiglu.swiglu_fused(gate, up[:2])
