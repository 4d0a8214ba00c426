"""The operation: values, shapes, strides, refusals, and what torch.library asks of it."""

import contextlib
import functools
import os
import signal

import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_right, operands, reference, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import swiglu
from swiglu._operands import dtype_word

DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 64, 32), (5, 96, 64), (33, 17, 19), (130, 200, 72), (3, 1, 1)])
def test_matches_float64(m, n, k, dtype, bias, device):
    inputs = operands(m, n, k, dtype, device, bias)
    assert_right(swiglu.forward(*inputs), *inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)])
def test_any_leading_dimensions(leading, device):
    inputs = operands(leading, 24, 16, device=device)
    z = swiglu.forward(*inputs)
    assert z.shape == (*leading, 24) and z.is_contiguous()
    assert_right(z, *inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, k", [(0, 8), (8, 0)])
def test_empty_sizes(n, k, device):
    inputs = operands(3, n, k, device=device)
    z = swiglu.forward(*inputs)
    assert z.shape == (3, n) and (z == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_inputs(dtype, device):
    x, gate, up, _, _ = operands((6, 5), 40, 24, dtype, device)
    wide = torch.randn(6, 5, 31, device=device).to(dtype)
    for strided in (wide[..., 3:27], x.transpose(0, 1), x[::2], x[:, ::2], x[:1, :1].expand(4, 7, 24)):
        assert_right(swiglu.forward(strided, gate, up), strided, gate, up)
    every_other = torch.randn(40, 48, device=device).to(dtype)[:, ::2]
    assert_right(swiglu.forward(x, every_other, up), x, every_other, up)
    assert_right(swiglu.forward(x, gate[:1].expand(40, 24), up), x, gate[:1].expand(40, 24), up)
    mixed = gate.t().contiguous().t()
    assert_right(swiglu.forward(x, mixed, up), x, mixed, up)
    bias = torch.randn(80, device=device).to(dtype)[::2]
    assert_right(swiglu.forward(x, gate, up, bias, bias), x, gate, up, bias, bias)


@pytest.mark.parametrize("device", DEVICES)
def test_other_layouts(device):
    x, gate, up, _, _ = operands(7, 40, 24, device=device)
    expected = reference(x, gate, up)
    transposed = gate.t().contiguous(), up.t().contiguous()
    packed_nk, packed_kn = torch.cat([gate, up]), torch.cat(transposed, 1)
    up_first = torch.cat([up, gate])
    for z in (
        swiglu.forward(x, *transposed, layout="separate_kn"),
        swiglu.forward(x, *swiglu.split_packed(packed_nk, layout="packed_nk")),
        swiglu.forward(x, *swiglu.split_packed(packed_kn, layout="packed_kn")),
        swiglu.forward(x, *swiglu.split_packed(up_first, layout="packed_nk", gate_order="up_first")),
    ):
        assert relative_error(z, expected) <= TOLERANCE[torch.float32]


def test_packed_views_share_memory():
    packed = torch.randn(24, 8)
    gate, up = swiglu.split_packed(packed, layout="packed_kn")
    assert gate.shape == up.shape == (4, 24)
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def refusals():
    x, gate, up, gate_bias, up_bias = operands(3, 8, 4, bias=True)
    double = torch.float64
    return [
        ("x", TypeError, (x.int(), gate, up)),
        ("x", ValueError, (x[:, :3], gate, up)),
        ("x", ValueError, (torch.tensor(1.0), gate, up)),
        ("gate", ValueError, (x, gate[0], up)),
        ("gate", TypeError, (x, gate.to(double), up)),
        ("gate", ValueError, (x, gate.to("meta"), up)),
        ("up", ValueError, (x, gate, up[:7])),
        ("up", TypeError, (x, gate, up.half())),
        ("up", ValueError, (x, gate, up.to("meta"))),
        ("gate_bias", ValueError, (x, gate, up, gate_bias[:7])),
        ("gate_bias", TypeError, (x, gate, up, gate_bias.half())),
        ("up_bias", ValueError, (x, gate, up, None, up_bias[None])),
        ("up_bias", TypeError, (x, gate, up, None, up_bias.to(double))),
    ]


@pytest.mark.parametrize("argument, error, inputs", refusals())
def test_wrong_arguments_are_named(argument, error, inputs):
    with pytest.raises(error, match=f"argument `{argument}`: "):
        swiglu.forward(*inputs)


def test_shapes_of_another_layout_are_shown_as_they_were_given():
    x, gate, up, bias, _ = operands(3, 8, 4, bias=True)
    gate, up = gate.t(), up.t()
    for argument, given, words in (
        ("x", (x[:, :3], gate, up), r"has shape \[3, 3\], expected \[\.\.\., 4\] as `gate` has 4 rows"),
        ("gate", (x, gate[0], up), r"has shape \[8\], expected"),
        ("up", (x, gate, up[:, :7]), r"has shape \[4, 7\], expected \[4, 8\] as `gate`"),
        ("up", (x, gate, up[0]), r"has shape \[8\], expected"),
        ("up", (x, gate, up.half()), "is torch.float16"),
        ("gate_bias", (x, gate, up, bias[:4]), r"has shape \[4\], expected \[8\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"argument `{argument}`: {words}") as caught:
            swiglu.forward(*given, layout="separate_kn")
        assert caught.value.__suppress_context__


def test_wrong_words_are_named():
    x, gate, up, _, _ = operands(3, 8, 4)
    with pytest.raises(ValueError, match="argument `layout`: .*packed"):
        swiglu.forward(x, gate, up, layout="packed_nk")
    with pytest.raises(ValueError, match="argument `layout`: "):
        swiglu.split_packed(gate, layout="separate_nk")
    with pytest.raises(ValueError, match="argument `gate_order`: "):
        swiglu.split_packed(gate, layout="packed_nk", gate_order="first")
    with pytest.raises(ValueError, match="argument `weight`: "):
        swiglu.split_packed(torch.ones(3, 4), layout="packed_nk")


def test_meta_tensors_have_shapes_only():
    x, gate, up, _, _ = operands((2, 3), 8, 4, torch.bfloat16, "meta")
    for z in (
        swiglu.forward(x, gate, up),
        swiglu.swiglu_fused(torch.empty(2, 3, 16, dtype=torch.bfloat16, device="meta")),
    ):
        assert z.is_meta and z.shape == (2, 3, 8) and z.dtype is torch.bfloat16
    assert swiglu.swiglu_ffn(x, gate, up, gate.t()).shape == x.shape
    assert swiglu.SwiGLU(4, 8, device="meta")(x.float()).is_meta


@pytest.mark.gpu
def test_mixed_devices_are_refused():
    x, gate, up, _, _ = operands(3, 8, 4, device="cuda")
    with pytest.raises(ValueError, match="argument `gate`: "):
        swiglu.forward(x, gate.cpu(), up)
    with pytest.raises(ValueError, match="argument `x`|argument `up`"):
        swiglu.forward(x.cpu(), gate.cpu(), up)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, bias, device):
    inputs = [None if t is None else t.requires_grad_(grad) for t in operands((2, 3), 24, 16, device=device, bias=bias)]
    torch.library.opcheck(torch.ops.swiglu.forward.default, inputs)
    strided = torch.randn(2, 3, 20, device=device)[..., 2:18].requires_grad_(grad)
    torch.library.opcheck(torch.ops.swiglu.forward.default, [strided, *inputs[1:]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    def block(x, gate, up, gate_bias, up_bias):
        return swiglu.forward(x * 2, gate, up, gate_bias, up_bias).sum(-1)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (4, 9):
        inputs = [t.requires_grad_() for t in operands(m, 24, 16, device=device, bias=True)]
        expected, got = block(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    inputs = [t.requires_grad_() for t in operands(64, 96, 48, device=device, bias=True)]
    with torch.autocast(device, dtype=torch.bfloat16):
        z = swiglu.forward(*inputs)
        compiled = torch.compile(swiglu.forward, fullgraph=True, backend="aot_eager")(*inputs)
    assert z.dtype is torch.bfloat16
    torch.testing.assert_close(compiled, z)
    assert relative_error(z, reference(*(t.bfloat16() for t in inputs))) <= TOLERANCE[torch.bfloat16]
    z.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_in_every_run(device):
    inputs = operands(70, 136, 72, torch.bfloat16, device)
    first = swiglu.forward(*inputs)
    assert all(torch.equal(first, swiglu.forward(*inputs)) for _ in range(5))


class PassOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_of_torch_is_stepped_over():
    """Without gradients the call goes past the dispatcher, unless something waits there."""
    from torch._subclasses import FakeTensorMode

    inputs = operands(5, 12, 8, bias=True)
    expected = swiglu.forward(*inputs)
    gate, up, down = inputs[1], inputs[2], inputs[1].t()
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        assert torch.equal(swiglu.forward(*inputs), expected)
        swiglu.swiglu_fused(gate, up), swiglu.swiglu_fused(gate), swiglu.swiglu_ffn(*inputs[:3], down)
    ops = torch.ops.swiglu
    assert {ops.forward.default, ops.gate.default, ops.gate_packed.default, ops.ffn.default} <= set(seen)
    with FakeTensorMode() as mode:
        assert swiglu.forward(*map(mode.from_tensor, inputs)).shape == expected.shape
    negated = torch._neg_view(inputs[0])
    torch.testing.assert_close(swiglu.forward(negated, *inputs[1:]), swiglu.forward(-inputs[0], *inputs[1:]))
    plan = swiglu.prepare(8, 12, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="argument `x`: "):
        plan(negated, *inputs[1:])
    traced = torch.jit.trace(lambda x: swiglu.forward(x, *inputs[1:]), inputs[0])
    torch.testing.assert_close(traced(-inputs[0]), swiglu.forward(-inputs[0], *inputs[1:]))


def test_torch_func_and_forward_gradients():
    x, *weights = (t.double() for t in operands(5, 12, 8, bias=True))

    def call(x):
        return swiglu.forward(x, *weights)

    jacobian = torch.autograd.functional.jacobian(call, x)
    assert torch.autograd.gradcheck(call, x.clone().requires_grad_(), check_forward_ad=True)
    torch.testing.assert_close(torch.func.jacrev(call)(x), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(call)(x), jacobian)
    torch.testing.assert_close(torch.func.vmap(call)(x), call(x))


def double_fused(x, gate, up):
    return swiglu.swiglu_fused(x @ gate.t(), x @ up.t())


def ffn_of_one_weight(x, gate, up):
    return swiglu.swiglu_ffn(x, gate, up, gate.t())


@pytest.mark.filterwarnings("error:There is a performance drop", "ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("function", [swiglu.forward, ffn_of_one_weight, double_fused])
def test_torch_func_and_forward_gradients_within_compiled_code(function):
    from torch.autograd import forward_ad

    x, gate, up, _, _ = operands(5, 12, 8)

    def call(x):
        return function(x, gate, up)

    def tangent(call):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x))).tangent

    for transformed in (
        lambda x: torch.func.jvp(call, (x,), (x,))[1],
        torch.func.grad(lambda x: call(x).sum()),
        torch.func.vmap(call),
        lambda x: torch.func.jvp(torch.func.grad(lambda x: call(x).sum()), (x,), (x,))[1],
    ):
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), transformed(x))
    # What was compiled without forward gradients is of no use with them, nor the other way round.
    compiled = torch.compile(call, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), call(x))
        torch.testing.assert_close(tangent(compiled), tangent(call))


RAW = {
    "forward": lambda x, gate, up: torch.ops.swiglu.forward(x, gate, up),
    "forward_saving": lambda x, gate, up: torch.ops.swiglu.forward_saving(x, gate, up)[0],
    "ffn": lambda x, gate, up: torch.ops.swiglu.ffn(x, gate, up, gate.t(), None, None, None),
    "ffn_saving": lambda x, gate, up: torch.ops.swiglu.ffn_saving(x, gate, up, gate.t(), None, None, None)[0],
    "gate": lambda x, gate, up: torch.ops.swiglu.gate(x @ gate.t(), x @ up.t()),
    "gate_packed": lambda x, gate, up: torch.ops.swiglu.gate_packed(x @ torch.cat([up, gate]).t(), True),
    "backward": lambda x, gate, up: torch.ops.swiglu.backward(
        x @ gate.t(), x, gate, up, None, None, None, None, None, [True, True, True, False, False, False]
    )[0],
    "gate_backward": lambda x, gate, up: torch.ops.swiglu.gate_backward(x, x.sin(), x.cos())[0],
    "gate_packed_backward": lambda x, gate, up: torch.ops.swiglu.gate_packed_backward(x[:, :4], x, True),
}


def tangent_of(call, x, direction):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent


@pytest.mark.filterwarnings("error:There is a performance drop", "ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("name", RAW)
def test_operations_called_by_their_names_have_all_derivatives(name, device):
    """The public functions leave these to torch; operations arrive on their own by exported programs and through graphs."""
    x, gate, up = (t.double() for t in operands(5, 12, 8, device=device)[:3])
    direction = torch.randn_like(x)

    def call(x):
        return RAW[name](x, gate, up)

    columns = [(call(x + h) - call(x - h)) / 2e-6 for h in 1e-6 * torch.eye(40, device=device).double().view(40, 5, 8)]
    jacobian = torch.stack(columns, -1).view(*columns[0].shape, 5, 8)
    along = torch.einsum("mnij,ij->mn", jacobian, direction)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(torch.func.jvp(call, (x,), (direction,))[1], along)
    close(torch.func.linearize(call, x)[1](direction), along)
    close(torch.func.jacrev(call)(x), jacobian)
    close(torch.func.jacfwd(call)(x), jacobian)
    close(torch.func.vmap(call)(torch.stack([x, direction])), torch.stack([call(x), call(direction)]))
    gradient = torch.func.grad(lambda x: call(x).sum())
    close(torch.func.hessian(lambda x: call(x).sum())(x), torch.func.jacfwd(gradient)(x))
    for context in (contextlib.nullcontext, torch.no_grad, PassOn):
        with context():
            close(tangent_of(call, x, direction), along)
    close(tangent_of(call, x.clone().requires_grad_(), direction), along)
    close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_tangents_of_tensors_without_memory_and_of_exported_programs():
    x, gate, up, _, _ = operands(5, 12, 8)
    bare = [t.to("meta") for t in (x, gate, up)]
    assert tangent_of(lambda x: torch.ops.swiglu.forward(x, *bare[1:]), bare[0], bare[0]).shape == (5, 12)

    class Block(torch.nn.Module):
        def forward(self, x):
            return swiglu.swiglu_ffn(x, gate, up, gate.t())

    expected = torch.func.jvp(Block(), (x,), (x,))[1]
    program = torch.export.export(Block(), (x,)).module()
    torch.testing.assert_close(torch.func.jvp(program, (x,), (x,))[1], expected)
    torch.testing.assert_close(tangent_of(program, x, x), expected)


@pytest.mark.parametrize("function", [swiglu.forward, ffn_of_one_weight, double_fused])
def test_forward_derivatives_through_a_recorded_graph(function, device):
    x, gate, up, _, _ = operands(5, 12, 8, device=device)
    y = function(x.requires_grad_(), gate, up)
    dy, direction = torch.randn_like(y), torch.randn_like(y)

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    torch.testing.assert_close(torch.func.jvp(gradient, (dy,), (direction,))[1], gradient(direction))
    torch.testing.assert_close(tangent_of(gradient, dy, direction), gradient(direction))


def test_gradients_of_the_backward_alone_are_refused():
    x, gate, up, _, _ = operands(5, 12, 8)
    needs = [True, False, False, False, False, False]
    (dx,) = torch.ops.swiglu.backward(x @ gate.t(), x.requires_grad_(), gate, up, *[None] * 5, needs)
    with pytest.raises(NotImplementedError, match="swiglu.backward has no gradients"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_run_by_torch(layout):
    _, gate, up, _, _ = operands(1, 12, 8)
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    functions = [
        lambda x: swiglu.forward(x, gate, up),
        lambda x: swiglu.swiglu_ffn(x, gate, up, gate.t()),
        lambda x: swiglu.swiglu_fused(x, x),
    ]
    if layout is torch.jagged:  # of the others torch takes no halves
        functions.append(lambda x: swiglu.swiglu_fused(x, gate_order="up_first"))
    for function in functions:
        for got, part in zip(function(nested).unbind(), parts, strict=True):
            torch.testing.assert_close(got, function(part), rtol=1e-5, atol=1e-6)
    sum(part.sum() for part in swiglu.forward(nested, gate, up).unbind()).backward()
    assert nested.grad.is_nested


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    inputs = operands(256, 512, 256, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x = inputs[0] + 1
        z = swiglu.forward(x, *inputs[1:])
    stream.synchronize()
    assert_right(z, x, *inputs[1:])


@pytest.mark.gpu
def test_other_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = operands(16, 64, 32, device="cuda:1")
    with torch.cuda.device(0):
        assert_right(swiglu.forward(*inputs), *inputs)
        assert torch.cuda.current_device() == 0


@pytest.fixture
def precision():
    """Torch's switches of precision, which end as they began."""
    matmul, of_all = torch.backends.cuda.matmul, torch.backends
    has_words = hasattr(of_all, "fp32_precision")  # since torch 2.9
    before = (of_all.fp32_precision, matmul.fp32_precision) if has_words else None
    legacy = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(legacy)
    if has_words:
        of_all.fp32_precision, matmul.fp32_precision = before


def by_word(scope, word):
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("needs a torch with fp32_precision")
    scope.fp32_precision = word


SWITCHES = {
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), True),
    "allow_tf32": (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
    "matmul": (lambda: by_word(torch.backends.cuda.matmul, "tf32"), True),
    "matmul_ieee": (lambda: by_word(torch.backends.cuda.matmul, "ieee"), False),
    "everything": (lambda: by_word(torch.backends, "tf32"), True),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_word_of_fp32_follows_torch(switch, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    turn, allows_tf32 = SWITCHES[switch]
    turn()
    assert dtype_word(torch.float32, 0) == ("tf32" if allows_tf32 else "f32")
    assert dtype_word(torch.float32, -1) == "f32" and dtype_word(torch.bfloat16, 0) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dtype_word(torch.float32, 0) == "f32"


@pytest.mark.gpu
@pytest.mark.parametrize("switch", SWITCHES)
def test_tf32_follows_torch(switch, precision):
    inputs = operands(64, 256, 512, device="cuda")
    turn, allows_tf32 = SWITCHES[switch]
    turn()
    error = relative_error(swiglu.forward(*inputs), reference(*inputs))
    assert 1e-5 < error < 1e-3 if allows_tf32 else error <= TOLERANCE[torch.float32]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    x, gate, up, *_ = operands(5, 12, 8)
    expected = swiglu.forward(x, gate, up)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # who waits for the parent's threads waits for ever
        code = 1
        try:
            code = 0 if all(torch.equal(swiglu.forward(x, gate, up), expected) for _ in range(3)) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
