"""The names people already type: their constructors, parameter names, orders and initial values, and right gradients.

Shapes and tolerances are no looser than those of the projects the names come from; float64 decides besides.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, relative_error
from torch import nn

import swiglu
from swiglu import liger, xformers
from swiglu._module import _note_block

DTYPES = [torch.float32, torch.bfloat16]
# Against float64, relative. A hidden activation and two GEMMs are rounded on the way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
# Liger's tests allow an absolute 1.0 and 1e4 on values of this size, and this relative error.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(2, 256, 256, 512), (6, 42, 123, 431)]


class PlainMLP(nn.Module):
    """What stands in models: separate projections by default, packed with ``w12``-like names."""

    def __init__(self, hidden, intermediate, names=("gate_proj", "up_proj", "down_proj"), bias=False):
        super().__init__()
        self.names = names
        sizes = [(hidden, intermediate)] * 2 if len(names) == 3 else [(hidden, 2 * intermediate)]
        for name, (inputs, outputs) in zip(names, [*sizes, (intermediate, hidden)]):
            setattr(self, name, nn.Linear(inputs, outputs, bias))

    def forward(self, x):
        *first, down = (getattr(self, name) for name in self.names)
        gate, up = (layer(x) for layer in first) if len(first) == 2 else first[0](x).chunk(2, -1)
        return down(F.silu(gate) * up)


def config(hidden, intermediate, act="silu"):
    return SimpleNamespace(hidden_size=hidden, intermediate_size=intermediate, hidden_act=act)


def assert_same_block(ours, plain, x, dtype):
    """Outputs and every gradient: near what plain torch gives in this format, and near float64."""
    ours.load_state_dict(plain.state_dict(), strict=True)
    wide = copy.deepcopy(plain).double()
    results = []
    for module in (ours, plain, wide):
        inputs = x.detach().to(next(module.parameters()).dtype).requires_grad_()
        y = module(inputs)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(dy.to(y))
        results.append([y, inputs.grad, *(p.grad for _, p in sorted(module.named_parameters()))])
    for got, theirs, expected in zip(*results):
        assert got.dtype is dtype
        atol = expected.abs().max().item() * TOLERANCE[dtype]
        torch.testing.assert_close(got, theirs, rtol=RTOL[dtype], atol=atol)
        assert relative_error(got, expected) <= TOLERANCE[dtype]
    plain.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, length, hidden, intermediate", SHAPES)
def test_liger_llama_block(batch, length, hidden, intermediate, dtype, device):
    ours = liger.LigerSwiGLUMLP(config(hidden, intermediate)).to(device, dtype)
    plain = PlainMLP(hidden, intermediate).to(device, dtype)
    x = torch.randn(batch, length, hidden, device=device).to(dtype)
    assert_same_block(ours, plain, x, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, length, hidden, intermediate", SHAPES)
def test_liger_phi3_block(batch, length, hidden, intermediate, dtype):
    ours = liger.LigerPhi3SwiGLUMLP(config(hidden, intermediate)).to(dtype)
    plain = PlainMLP(hidden, intermediate, ("gate_up_proj", "down_proj")).to(dtype)
    assert_same_block(ours, plain, torch.randn(batch, length, hidden).to(dtype), dtype)


def test_liger_mixtral_expert():
    ours = liger.LigerBlockSparseTop2MLP(config(16, 40, "swish"))
    assert_same_block(ours, PlainMLP(16, 40, ("w1", "w3", "w2")), torch.randn(2, 3, 16), torch.float32)


def test_liger_constructors():
    assert swiglu.SwiGLUMLP is liger.LigerSwiGLUMLP
    assert swiglu.SiLUMulFunction is liger.LigerSiLUMulFunction
    assert liger.LigerSwiGLUMLP(config(8, 12), intermediate_size=20).up_proj.weight.shape == (20, 8)
    for name in ("LigerSwiGLUMLP", "LigerPhi3SwiGLUMLP", "LigerBlockSparseTop2MLP"):
        with pytest.raises(ValueError, match="argument `config`: .*gelu"):
            getattr(liger, name)(config(8, 12, "gelu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 8), (9, 7, 41)])
def test_liger_function(shape, dtype, device):
    a, b = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    a_wide, b_wide = (t.detach().double().requires_grad_() for t in (a, b))
    z, expected = swiglu.SiLUMulFunction.apply(a, b), F.silu(a_wide) * b_wide
    torch.testing.assert_close(z, swiglu.swiglu_torch(a, b), rtol=RTOL[dtype], atol=1e-2 * RTOL[dtype])
    dz = torch.randn_like(z)
    z.backward(dz)
    expected.backward(dz.double())
    for got, wanted in ((z, expected), (a.grad, a_wide.grad), (b.grad, b_wide.grad)):
        assert relative_error(got, wanted.detach()) <= TOLERANCE[dtype] / 3


def test_liger_multipliers():
    a, b = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = swiglu.SiLUMulFunction.apply(a, b, 0.5, 3.0)
    torch.testing.assert_close(z, F.silu(a * 0.5) * b * 3)
    assert torch.autograd.gradcheck(lambda a, b: swiglu.SiLUMulFunction.apply(a, b, 0.5, 3.0), (a, b))


def test_a_producer_that_saved_its_output_gets_the_right_gradient():
    """Liger writes gradients over its inputs, which spoils such a producer."""
    a, b = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    swiglu.SiLUMulFunction.apply(a.exp(), b.sigmoid()).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    (F.silu(wide[0].exp()) * wide[1].sigmoid()).sum().backward()
    assert all(relative_error(t.grad, w.grad) < 1e-6 for t, w in zip((a, b), wide))


def test_rotalabs_names():
    mlp = swiglu.SwiGLU(hidden_size=64, intermediate_size=256)
    x = torch.randn(2, 8, 64)
    y = mlp(x)
    assert y.shape == (2, 8, 64) and not y.isnan().any()
    assert [name for name, _ in mlp.named_parameters()] == ["w_gate.weight", "w_up.weight", "w_down.weight"]
    gate, up = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    fused, plain = swiglu.swiglu_fused(gate, up), swiglu.swiglu_torch(gate, up)
    assert fused.shape == plain.shape == gate.shape and not fused.isnan().any()
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(swiglu.swiglu_fused(gate.transpose(0, 1), up.transpose(0, 1)), fused.transpose(0, 1))


def test_all_three_projections_of_a_block_learn():
    """rotalabs-accel's gate has no gradient on a GPU: gate and up stay as they were."""
    mlp = swiglu.SwiGLU(8, 12)
    mlp(torch.randn(3, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mlp.parameters())


@pytest.mark.parametrize("order", ["gate_first", "up_first"])
@pytest.mark.parametrize("in_features, hidden", [(16, 16), (128, 512), (50, 70)])
def test_fused_swiglu(in_features, hidden, order):
    """More columns than one block, where fused-swiglu's kernels leave most of the sum out."""
    layer = swiglu.FusedSwiGLU(in_features, hidden, gate_order=order)
    assert [(name, tuple(p.shape)) for name, p in layer.named_parameters()] == [("Wf", (in_features, 2 * hidden))]
    x = torch.randn(33, in_features, requires_grad=True)
    z = layer(x)
    dz = torch.randn_like(z)
    z.backward(dz)
    x_wide, wf = x.detach().double().requires_grad_(), layer.Wf.detach().double().requires_grad_()
    first, second = x_wide @ wf[:, :hidden], x_wide @ wf[:, hidden:]
    expected = F.silu(first) * second if order == "gate_first" else first * F.silu(second)
    expected.backward(dz.double())
    assert relative_error(z, expected.detach()) <= 4e-6
    torch.testing.assert_close(z.double(), expected, rtol=1e-4, atol=1e-6)
    assert relative_error(x.grad, x_wide.grad) <= 1e-5
    assert relative_error(layer.Wf.grad, wf.grad) <= 1e-5


def test_fused_swiglu_swaps_in_as_documented():
    w1a, w1b, x = torch.randn(64, 96) * 0.1, torch.randn(64, 96) * 0.1, torch.randn(5, 64)
    layer = swiglu.FusedSwiGLU(64, 96)
    layer.load_state_dict({"Wf": torch.cat([w1a, w1b], 1)})
    assert torch.allclose(swiglu.SiLUMulFunction.apply(x @ w1a, x @ w1b), layer(x), atol=1e-6)
    layer.Wf.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.Wf.grad is None and x.grad is not None


def test_fused_swiglu_notes_block_once():
    _note_block.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for block in (64, 32, None):
            swiglu.FusedSwiGLU(8, 12, block=block)
        assert swiglu.FusedSwiGLU(8, 12, 64).block == 64 and swiglu.FusedSwiGLU(8, 12).block is None
    assert len(seen) == 1 and "`block` is ignored" in str(seen[0].message)
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match="argument `gate_order`: "):
        swiglu.FusedSwiGLU(8, 12, gate_order="second")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_xformers_block(pack, bias):
    names = ("w12", "w3") if pack else ("w1", "w2", "w3")
    ours = xformers.SwiGLU(24, 40, bias=bias, _pack_weights=pack)
    assert_same_block(ours, PlainMLP(24, 40, names, bias), torch.randn(2, 3, 24), torch.float32)


def test_xformers_defaults_and_functions():
    mlp = xformers.SwiGLU(24, 40, 16)
    assert set(mlp.state_dict()) == {"w12.weight", "w12.bias", "w3.weight", "w3.bias"}
    x = torch.randn(2, 3, 24)
    w12, b12, w3, b3 = mlp.w12.weight, mlp.w12.bias, mlp.w3.weight, mlp.w3.bias
    expected = mlp(x)
    assert expected.shape == (2, 3, 16)
    packed = xformers.swiglu_packed(x, w12.view(2, 40, 24), b12.view(2, 40), w3, b3)
    separate = xformers.swiglu(x, w12[:40], b12[:40], w12[40:], b12[40:], w3, b3, op=None)
    assert torch.equal(packed, expected) and torch.equal(separate, expected)
    with pytest.raises(ValueError, match="argument `w1w2`: "):
        xformers.swiglu_packed(x, w12, None, w3, None)
    with pytest.raises(ValueError, match="argument `b1b2`: "):
        xformers.swiglu_packed(x, w12.view(2, 40, 24), b12, w3, None)


def test_xformers_functions_name_their_own_arguments():
    x, w, b, down, shift = torch.randn(3, 4), torch.randn(8, 4), torch.randn(8), torch.randn(5, 8), torch.randn(5)
    good = {"x": x, "w1": w, "b1": b, "w2": w, "b2": b, "w3": down, "b3": shift}
    packed = {"x": x, "w1w2": torch.stack([w, w]), "b1b2": torch.stack([b, b]), "w3": down, "b3": shift}
    for function, given in ((xformers.swiglu, good), (xformers.swiglu_packed, packed)):
        assert function(**given).shape == (3, 5)
        for name, tensor in given.items():
            wrongs = [3, *([] if name[0] == "b" else [None]), *([] if name == "x" else [tensor.double()])]
            wrongs += [tensor[..., :3]] if name[0] == "b" or name in ("w2", "w3") else []
            for wrong in wrongs:
                with pytest.raises((TypeError, ValueError), match=f"argument `{name}`: "):
                    function(**{**given, name: wrong})
        with pytest.raises(ValueError, match=r"argument `x`: .* as `w1(w2)?` has 4 columns"):
            function(**{**given, "x": x[:, :3]})


@pytest.mark.parametrize(
    "build",
    [
        lambda: swiglu.FusedSwiGLU(8, 12, gate_order="up_first"),
        lambda: liger.SwiGLUMLP(config(8, 12)),
        lambda: liger.Phi3SwiGLUMLP(config(8, 12)),
        lambda: xformers.SwiGLU(8, 12),
    ],
)
def test_compiles_whole(build):
    module, x = build(), torch.randn(3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, got = module(x), compiled(x)
    torch.testing.assert_close(got, expected)
    parameters = list(module.parameters())
    for a, b in zip(torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build", [lambda: liger.SwiGLUMLP(config(8, 12)), lambda: liger.Phi3SwiGLUMLP(config(8, 12))])
def test_a_replaced_or_hooked_projection_is_called(build):
    mlp, x = build(), torch.randn(3, 8)
    plain, seen = mlp(x), []
    for layer in mlp.children():
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(module))
        torch.testing.assert_close(mlp(x), plain)
        handle.remove()
    assert len(seen) == len(list(mlp.children()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: swiglu.SwiGLU(8, 12, bias=True),
        lambda: swiglu.FusedSwiGLU(8, 12, gate_order="up_first"),
        lambda: liger.SwiGLUMLP(config(8, 12)),
        lambda: liger.Phi3SwiGLUMLP(config(8, 12)),
        lambda: xformers.SwiGLU(8, 12),
    ],
)
def test_traced_by_fx(build):
    module, x = build(), torch.randn(3, 8)
    graph = torch.fx.symbolic_trace(module)
    assert "swiglu_" in graph.code
    torch.testing.assert_close(graph(x), module(x))
    with torch.no_grad():
        for parameter in module.parameters():  # which no constant of the graph stands for
            parameter.mul_(0.5)
    twin = copy.deepcopy(graph)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(x), module(x))
    twin(x).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_functions_traced_by_fx():
    x, gate, up = torch.randn(3, 8), torch.randn(8, 12), torch.randn(8, 12)
    for function, given in (
        (lambda x, gate, up: swiglu.forward(x, gate, up, layout="separate_kn"), (x, gate, up)),
        (lambda x, gate, up: swiglu.forward(x, gate.t(), up.t(), save="nothing"), (x, gate, up)),
        (lambda x, up: swiglu.swiglu_fused(x, up), (gate, up)),
    ):
        torch.testing.assert_close(torch.fx.symbolic_trace(function)(*given), function(*given))
