"""The whole block in both modes: values, any subset of gradients, what is kept, and what torch.library asks of it."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, kept_numbers, operands, reference, relative_error
from torch.utils.checkpoint import checkpoint

import swiglu

SAVE = ["preactivations", "nothing"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
OPS = torch.ops.swiglu


def ffn_operands(m, n, k, dtype=torch.float32, device="cpu", bias=False, out=None):
    out = k if out is None else out
    x, w_gate, w_up, b_gate, b_up = operands(m, n, k, dtype, device, bias)
    w_down = torch.randn(out, n, device=device).div(max(n, 1) ** 0.5).to(dtype)
    b_down = torch.randn(out, device=device).to(dtype) if bias else None
    return [x, w_gate, w_up, w_down, b_gate, b_up, b_down]


def float64(inputs, dy):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = wide
    y = F.linear(F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up), w_down, b_down)
    grads = iter(torch.autograd.grad(y, [t for t in wide if t is not None], dy.double()))
    return y.detach(), [None if t is None else next(grads) for t in wide]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_matches_float64(dtype, bias, save, device):
    inputs = ffn_operands((3, 11), 72, 40, dtype, device, bias, out=24)
    dy = torch.randn(3, 11, 24, device=device).to(dtype)
    expected, gradients = float64(inputs, dy)
    with torch.no_grad():
        assert relative_error(swiglu.swiglu_ffn(*inputs, save=save), expected) <= TOLERANCE[dtype]
    given = [t.requires_grad_() for t in inputs if t is not None]
    y = swiglu.swiglu_ffn(*inputs, save=save)
    assert y.shape == (3, 11, 24) and y.dtype is dtype
    assert relative_error(y, expected) <= TOLERANCE[dtype]
    wanted = [g for g in gradients if g is not None]
    for tensor, got, gradient in zip(given, torch.autograd.grad(y, given, dy), wanted):
        assert got.dtype is dtype and got.shape == tensor.shape
        assert relative_error(got, gradient) <= TOLERANCE[dtype]


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_to_the_second_order(bias, save):
    inputs = ffn_operands((2, 2), 4, 3, torch.float64, bias=bias)
    inputs = [None if t is None else t.requires_grad_() for t in inputs]

    def function(*inputs):
        return swiglu.swiglu_ffn(*inputs, save=save)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("save", SAVE)
def test_any_subset(save):
    dy = torch.randn(5, 8)
    inputs = ffn_operands(5, 12, 8, bias=True)
    _, expected = float64(inputs, dy)
    for wanted in list(itertools.product([False, True], repeat=7))[1:]:
        given = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted)]
        swiglu.swiglu_ffn(*given, save=save).backward(dy)
        for tensor, want, gradient in zip(given, wanted, expected):
            assert (tensor.grad is not None) == want
            if want:
                assert relative_error(tensor.grad, gradient) <= TOLERANCE[torch.float32]


def test_only_the_gemms_asked_for():
    """A backward with frozen weights has no weight gradients to compute, and the other way round."""
    from torch.utils.flop_counter import FlopCounterMode

    m, n, k = 32, 64, 16
    gemm = 2 * m * n * k
    cases = [("nothing", "x", 5), ("preactivations", "x", 3), ("preactivations", "w_down", 1)]
    for save, name, count in cases:
        inputs = ffn_operands(m, n, k)
        inputs[["x", "w_gate", "w_up", "w_down"].index(name)].requires_grad_()
        y = swiglu.swiglu_ffn(*inputs, save=save)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == count * gemm, (save, name)


@pytest.mark.parametrize("save, kept", [("preactivations", 2), ("nothing", 0)])
def test_what_is_kept(save, kept):
    m, n, k = 64, 96, 32
    inputs = [t.requires_grad_() for t in ffn_operands(m, n, k) if t is not None]
    assert kept_numbers(lambda: swiglu.swiglu_ffn(*inputs, save=save), inputs) == kept * m * n


def test_gradients_of_the_saved_outputs_are_right_too():
    inputs = [t.requires_grad_() for t in ffn_operands(3, 5, 4, torch.float64, bias=True)]
    assert torch.autograd.gradcheck(OPS.ffn_saving, inputs)
    assert torch.autograd.gradcheck(lambda *inputs: OPS.ffn_saving(*inputs)[1], inputs)


@pytest.mark.parametrize("save", SAVE)
def test_a_weight_used_twice_and_checkpointing(save):
    x, gate, _, down, *_ = (None if t is None else t.requires_grad_() for t in ffn_operands(5, 12, 8))

    def block(x):
        return swiglu.swiglu_ffn(swiglu.swiglu_ffn(x, gate, gate, down, save=save), gate, gate, down, save=save)

    plain = torch.autograd.grad(block(x).sum(), (x, gate, down))
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), (x, gate, down))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    wide = [t.detach().double().requires_grad_() for t in (x, gate, down)]
    y = wide[0]
    for _ in range(2):
        y = F.linear(F.silu(y @ wide[1].t()) * (y @ wide[1].t()), wide[2])
    for got, expected in zip(plain, torch.autograd.grad(y.sum(), wide)):
        assert relative_error(got, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("m", [0, (2, 0, 3), (), (2, 1, 3)])
def test_leading_dimensions(m, save):
    inputs = [t.requires_grad_() for t in ffn_operands(m, 12, 8, bias=True)]
    y = swiglu.swiglu_ffn(*inputs, save=save)
    assert y.shape == inputs[0].shape
    y.sum().backward()
    _, expected = float64(inputs, torch.ones_like(y))
    for tensor, gradient in zip(inputs, expected):
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("n, k, out", [(0, 8, 4), (12, 0, 4), (12, 8, 0), (0, 0, 0)])
@pytest.mark.parametrize("m", [(2, 3), ()])
def test_sizes_of_zero_have_gradients(m, n, k, out, save, device, launched):
    inputs = [t.requires_grad_() for t in ffn_operands(m, n, k, device=device, bias=True, out=out)]
    y = swiglu.swiglu_ffn(*inputs, save=save)
    z = swiglu.forward(*inputs[:3], *inputs[4:6], save=save)
    raw = torch.ops.swiglu.ffn_saving(*inputs)[0]
    assert y.shape == (*m, out) and z.shape == (*m, n)
    _, expected = float64(inputs, torch.ones_like(y))
    for result in (y, raw):
        for got, gradient in zip(torch.autograd.grad(result.sum(), inputs), expected):
            torch.testing.assert_close(got.double(), gradient, rtol=1e-4, atol=1e-5)
    used = [*inputs[:3], *inputs[4:6]]
    assert all(d.shape == t.shape for d, t in zip(torch.autograd.grad(z.sum(), used), used))


@pytest.mark.parametrize("save", SAVE)
def test_non_contiguous_inputs(save):
    _, w_gate, _, w_down, *_ = ffn_operands((6, 5), 40, 24)
    strided = [
        torch.randn(6, 5, 31)[..., 3:27].transpose(0, 1),
        w_gate.t().contiguous().t(),
        torch.randn(40, 48)[:, ::2],
        w_down.t().contiguous().t(),
    ]
    strided = [t.detach().requires_grad_() for t in strided]
    y = swiglu.swiglu_ffn(*strided, save=save)
    dy = torch.randn(1).expand(y.shape)
    expected, gradients = float64([*strided, None, None, None], dy)
    assert relative_error(y, expected) <= TOLERANCE[torch.float32]
    for got, gradient in zip(torch.autograd.grad(y, strided, dy), gradients):
        assert relative_error(got, gradient) <= TOLERANCE[torch.float32]


def test_packed_parameter_gets_one_gradient():
    x, w_gate, w_up, w_down, *_ = ffn_operands(5, 12, 8)
    packed = torch.cat([w_up, w_gate]).requires_grad_()
    halves = swiglu.split_packed(packed, layout="packed_nk", gate_order="up_first")
    swiglu.swiglu_ffn(x, *halves, w_down).sum().backward()
    _, expected = float64([x, w_gate, w_up, w_down, None, None, None], torch.ones(5, 8))
    assert relative_error(packed.grad, torch.cat([expected[2], expected[1]])) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, device):
    inputs = [None if t is None else t.requires_grad_() for t in ffn_operands((2, 3), 24, 16, device=device, bias=bias)]
    torch.library.opcheck(OPS.ffn.default, inputs)
    torch.library.opcheck(OPS.ffn_saving.default, inputs)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, save):
    def block(*inputs):
        return swiglu.swiglu_ffn(*inputs, save=save).square()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (4, 9):
        inputs = [t.requires_grad_() for t in ffn_operands(m, 24, 16, bias=True)]
        expected, got = block(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize("save", SAVE)
def test_autocast(save):
    inputs = [t.requires_grad_() for t in ffn_operands(64, 96, 48, bias=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = swiglu.swiglu_ffn(*inputs, save=save)
    assert y.dtype is torch.bfloat16
    expected, _ = float64([t.bfloat16() for t in inputs], torch.ones_like(y))
    assert relative_error(y, expected) <= TOLERANCE[torch.bfloat16]
    y.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in inputs)


def test_function_transforms():
    inputs = ffn_operands(5, 12, 8, torch.float64)[:4]
    expected = float64([*inputs, None, None, None], torch.ones(5, 8))[1]
    gradients = torch.func.grad(lambda *inputs: swiglu.swiglu_ffn(*inputs).sum(), argnums=(0, 3))(*inputs)
    torch.testing.assert_close(gradients, (expected[0], expected[3]))


def test_wrong_arguments_are_named():
    good = dict(zip(("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"), ffn_operands(3, 8, 4, bias=True)))
    for argument, error, wrong in (
        ("x", ValueError, good["x"][:, :3]),
        ("w_gate", ValueError, good["w_gate"][0]),
        ("w_up", TypeError, good["w_up"].half()),
        ("w_up", ValueError, good["w_up"][:7]),
        ("w_down", ValueError, good["w_down"][:, :7]),
        ("w_down", ValueError, good["w_down"][0]),
        ("w_down", TypeError, good["w_down"].double()),
        ("w_down", ValueError, good["w_down"].to("meta")),
        ("b_gate", ValueError, good["b_gate"][:7]),
        ("b_up", TypeError, good["b_up"].half()),
        ("b_down", ValueError, good["b_down"][:3]),
    ):
        with pytest.raises(error, match=f"argument `{argument}`: "):
            swiglu.swiglu_ffn(**{**good, argument: wrong})
    with pytest.raises(ValueError, match="argument `save`: "):
        swiglu.swiglu_ffn(**good, save="all")


@pytest.mark.parametrize("recording", [False, True])
def test_the_down_projection_is_never_left_out(recording):
    from torch.utils.flop_counter import FlopCounterMode

    x, w_gate, w_up, _, _, _, b_down = ffn_operands(3, 8, 4, bias=True)
    for context in (contextlib.nullcontext, lambda: FlopCounterMode(display=False)):  # which the dispatcher serves
        with context(), pytest.raises(TypeError, match="argument `w_down`: is None"):
            swiglu.swiglu_ffn(x.requires_grad_(recording), w_gate, w_up, None, None, None, b_down)


def test_without_gradients_it_is_the_fused_kernel():
    x, w_gate, w_up, w_down, *_ = ffn_operands(9, 12, 8)
    expected = F.linear(swiglu.forward(x, w_gate, w_up), w_down)
    assert torch.equal(swiglu.swiglu_ffn(x, w_gate, w_up, w_down), expected)
    assert relative_error(expected, reference(x, w_gate, w_up) @ w_down.double().t()) <= TOLERANCE[torch.float32]
