"""The promise that weights are static: it changes when they are read, and no result."""

import pytest
import torch
from conftest import assert_right, operands, relative_error
from test_ffn import TOLERANCE, ffn_operands, float64

import swiglu
from swiglu import _op, _static, _steps, _straight


def test_the_promise_ends_with_its_block():
    with swiglu.static_weights():
        with swiglu.static_weights():
            assert _static.is_promised()
        assert _static.is_promised()
    assert not _static.is_promised()
    with pytest.raises(KeyError), swiglu.static_weights():
        raise KeyError
    assert not _static.is_promised()


class Spy:
    """Torch's native side, which tells whether forwards were launched with the promise."""

    def __init__(self, native):
        self.native, self.promises = native, []

    def __getattr__(self, name):
        return getattr(self.native, name)

    def forward(self, *given):
        self.promises.append(given[-1])
        return self.native.forward(*given)


@pytest.fixture
def promises(monkeypatch):
    if _straight.native is None:
        pytest.skip("needs a torch with DLPack's exchange API")
    spy = Spy(_straight.native)
    monkeypatch.setattr(_straight, "native", spy)
    return spy.promises


@pytest.mark.parametrize("m", [1, 17, 64, 300])
def test_the_forward_is_right(m, device, promises):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = operands(m, 200, 776, dtype, device, True)
    if device == "cuda":
        torch.cuda.synchronize()
    with swiglu.static_weights():
        assert_right(swiglu.forward(*inputs), *inputs)
    assert_right(swiglu.forward(*inputs), *inputs)
    assert promises == [True, False]


def test_whatever_writes_weights_itself_makes_no_promise(device, launched, monkeypatch):
    """Copies, casts and what records gradients: no op of static weights is prepared or launched."""
    prepared = []
    native = _op._native.prepare
    monkeypatch.setattr(_op._native, "prepare", lambda *given: prepared.append(given) or native(*given))
    if device == "cpu":
        monkeypatch.setattr(_steps, "is_supported", lambda x: x.dtype is torch.float32)
    x, gate, up, down, *_ = ffn_operands(4, 48, 40, torch.float32, device)
    wide = torch.randn(48, 80, device=device)[:, ::2]
    with swiglu.static_weights():
        swiglu.swiglu_ffn(x, wide, up, down)
        swiglu.swiglu_ffn(x.requires_grad_(), gate, up, down)
        with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
            swiglu.swiglu_ffn(x, gate, up, down)
    assert launched and "down_static" not in launched
    assert not any(given[6:] and given[6] for given in prepared)


@pytest.mark.parametrize("m", [1, 20])
def test_the_block_launches_its_ops(m, device, launched, monkeypatch):
    inputs = ffn_operands(m, 64, 32, torch.float32, device, True, 48)
    if device == "cpu":
        monkeypatch.setattr(_steps, "is_supported", lambda x: True)
    else:
        torch.cuda.synchronize()
    plain = swiglu.swiglu_ffn(*inputs)
    with swiglu.static_weights():
        fixed = swiglu.swiglu_ffn(*inputs)
    assert launched == ["down", "down_static"]
    expected, _ = float64(inputs, torch.zeros_like(plain))
    for y in (plain, fixed):
        assert relative_error(y, expected) <= TOLERANCE[y.dtype]


@pytest.mark.gpu
def test_a_graph_keeps_the_promise(promises):
    mlp = swiglu.SwiGLU(512, 1024, device="cuda", dtype=torch.bfloat16)
    swiglu.prepare(512, 1024, dtype=torch.bfloat16, device="cuda", static_weights=True)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with swiglu.static_weights(), torch.cuda.graph(graph):
            y = x
            for _ in range(5):
                y = mlp(y)
        assert promises == 5 * [True]
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            expected = x
            for _ in range(5):
                expected = mlp(expected)
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_a_plan_makes_the_promise():
    plan = swiglu.prepare(776, 200, dtype=torch.bfloat16, device="cuda", static_weights=True)
    inputs = operands(5, 200, 776, torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    assert_right(plan(*inputs), *inputs)
