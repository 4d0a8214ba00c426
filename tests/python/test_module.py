"""The MLP block: names, values, state dicts, and stepping aside."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, kept_numbers
from torch import nn

import swiglu


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_matches_three_linears(bias, device):
    mlp = swiglu.SwiGLU(24, 40, bias, device=device)
    x = torch.randn(2, 5, 24, device=device)
    wide, x64 = copy.deepcopy(mlp).double(), x.double()
    expected = wide.w_down(F.silu(wide.w_gate(x64)) * wide.w_up(x64))
    torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_state_dict_is_that_of_three_linears():
    names = {f"{name}.{kind}" for name in ("w_gate", "w_up", "w_down") for kind in ("weight", "bias")}
    assert set(swiglu.SwiGLU(8, 12, bias=True).state_dict()) == names
    assert set(swiglu.SwiGLU(8, 12).state_dict()) == {name for name in names if name.endswith("weight")}
    linears = nn.ModuleDict({"w_gate": nn.Linear(8, 12), "w_up": nn.Linear(8, 12), "w_down": nn.Linear(12, 8)})
    mlp = swiglu.SwiGLU(8, 12, bias=True)
    mlp.load_state_dict(linears.state_dict())
    linears.load_state_dict(mlp.state_dict())
    assert torch.equal(mlp.w_up.weight, linears["w_up"].weight)


def test_same_seed_same_start_as_linears():
    torch.manual_seed(7)
    mlp = swiglu.SwiGLU(8, 12)
    torch.manual_seed(7)
    assert torch.equal(mlp.w_gate.weight, nn.Linear(8, 12, bias=False).weight)
    assert torch.equal(mlp.w_up.weight, nn.Linear(8, 12, bias=False).weight)


def test_prints_its_sizes():
    assert "hidden_size=8, intermediate_size=12" in repr(swiglu.SwiGLU(8, 12))


def test_learns():
    mlp = swiglu.SwiGLU(8, 32)
    before = copy.deepcopy(mlp.state_dict())
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(mlp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(before[name], now) for name, now in mlp.state_dict().items())


def test_a_replaced_or_hooked_projection_is_called():
    mlp, x = swiglu.SwiGLU(8, 12), torch.randn(3, 8)
    plain = mlp(x)
    seen = []
    handle = mlp.w_up.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(mlp(x), plain)
    handle.remove()
    assert len(seen) == 1

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(8, 12, bias=False)
    doubled.weight = mlp.w_up.weight
    mlp.w_up = doubled
    torch.testing.assert_close(mlp(x), 2 * plain)


@pytest.mark.parametrize("save, kept", [("preactivations", 2), ("nothing", 0)])
def test_a_hooked_down_projection_leaves_save_in_force(save, kept):
    mlp, x = swiglu.SwiGLU(8, 12, save=save), torch.randn(5, 8)
    mlp.w_down.register_forward_hook(lambda module, inputs, output: None)
    # What goes into the down projection is torch's to keep.
    assert kept_numbers(lambda: mlp(x), [x, *mlp.parameters()]) == (1 + kept) * 5 * 12


def test_compiles_whole():
    mlp, x = swiglu.SwiGLU(8, 12), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_whole(strict):
    mlp, x = swiglu.SwiGLU(8, 12).requires_grad_(False), torch.randn(3, 8)
    exported = torch.export.export(mlp, (x,), strict=strict)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.swiglu.ffn.default]
    torch.testing.assert_close(exported.module()(x), mlp(x))


@pytest.mark.gpu
def test_compiles_with_inductor():
    mlp, x = swiglu.SwiGLU(64, 128, device="cuda", dtype=torch.bfloat16), torch.randn(3, 64).cuda().bfloat16()
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), mlp(x))
