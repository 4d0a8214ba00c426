"""Backwards and down projections by the runtime's steps: on a GPU the real ones, on the CPU the stand-in."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import operands, relative_error
from test_ffn import TOLERANCE, ffn_operands, float64
from torch.utils.checkpoint import checkpoint

import swiglu
from swiglu import _recorded, _steps, _straight

OPS = torch.ops.swiglu
SAVE = ["preactivations", "nothing"]


@pytest.fixture
def steps(monkeypatch, launched):
    """The names of the steps launched; memory that nobody wrote is not a number."""
    poison_new_memory(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield launched
    torch.use_deterministic_algorithms(False)


def poison_new_memory(monkeypatch):
    """What is made past the dispatcher too is not a number until it is written."""
    from torch._C._dynamo import guards

    if _straight.native is not None:
        makers = [
            lambda *given, make=make: make(*given).fill_(float("nan"))
            for make in (guards._empty_strided_cpu, guards._empty_strided_cuda)
        ]
        monkeypatch.setattr(_straight, "native", _straight.read_by(*makers))


def lay(tensor, order):
    """The same numbers in another memory order."""
    return tensor.t().contiguous().t() if order == "kn" else tensor


def check_gradients(inputs, got, expected):
    for tensor, gradient, wanted in zip(inputs, got, expected, strict=True):
        assert gradient.dtype is tensor.dtype and gradient.shape == tensor.shape
        # Roundings of one number do not average out, and weigh more where silu' is near 0.
        few = 8 * torch.finfo(tensor.dtype).eps if tensor.numel() < 4 else 0
        assert relative_error(gradient, wanted) <= max(TOLERANCE[tensor.dtype], few)


SIZES = [(8, 64, 32, 48), (33, 17, 19, 23), (1, 8, 16, 8), (130, 200, 72, 72), (3, 1, 1, 1)]


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("orders", [("nk", "nk"), ("kn", "kn"), ("nk", "kn"), ("kn", "nk")], ids="-".join)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("m, n, k, out", SIZES)
def test_block(m, n, k, out, dtype, orders, save, device, steps):
    x, w_gate, w_up, w_down, *biases = ffn_operands(m, n, k, dtype, device, True, out)
    weights = lay(w_gate, orders[0]), lay(w_up, orders[0]), lay(w_down, orders[1])
    inputs = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    dy = torch.randn(m, out, device=device).to(dtype)
    expected, gradients = float64(inputs, dy)
    y = swiglu.swiglu_ffn(*inputs, save=save)
    assert relative_error(y, expected) <= TOLERANCE[dtype]
    got = torch.autograd.grad(y, inputs, dy)
    check_gradients(inputs, got, gradients)
    assert steps == ["down", "dgated", "down_weight_grad", "input_grad", "weight_grad"]
    # In the memory order of their weights, unless both orders describe it.
    assert all(d.stride() == w.stride() for d, w in zip(got[1:4], weights) if min(w.shape) > 1)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("order", ["nk", "kn"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("m, n, k, out", SIZES)
def test_forward(m, n, k, out, dtype, order, save, device, steps):
    x, gate, up, *biases = operands(m, n, k, dtype, device, bias=True)
    inputs = [t.detach().requires_grad_() for t in (x, lay(gate, order), lay(up, order), *biases)]
    dz = torch.randn(m, n, device=device).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    z = F.silu(F.linear(wide[0], wide[1], wide[3])) * F.linear(wide[0], wide[2], wide[4])
    got = torch.autograd.grad(swiglu.forward(*inputs, save=save), inputs, dz)
    check_gradients(inputs, got, torch.autograd.grad(z, wide, dz.double()))
    assert steps == ["gate_backward", "input_grad", "weight_grad"]


@pytest.mark.parametrize("save", SAVE)
def test_any_subset_of_the_block(save, device, steps):
    dy = torch.randn(2, 5, 24, device=device)
    inputs = ffn_operands((2, 5), 40, 16, device=device, bias=True, out=24)
    _, expected = float64(inputs, dy)
    for wanted in list(itertools.product([False, True], repeat=7))[1:]:
        given = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted)]
        y = swiglu.swiglu_ffn(*given, save=save)
        del steps[:]
        y.backward(dy)
        for tensor, want, gradient in zip(given, wanted, expected):
            assert (tensor.grad is not None) == want
            if want:
                assert relative_error(tensor.grad, gradient) <= TOLERANCE[torch.float32]
        need_x, need_gate, need_up, need_down = wanted[:4]
        if need_gate == need_up and (need_x or need_gate):
            asked = [
                ("dgated", True),
                ("down_weight_grad", need_down),
                ("input_grad", need_x),
                ("weight_grad", need_gate),
            ]
            assert steps == [name for name, launched in asked if launched]
        else:  # torch's GEMMs around the gate
            assert set(steps) <= {"gate", "gate_backward"}


@pytest.mark.parametrize("save", SAVE)
def test_any_subset_of_the_forward(save, device, steps):
    dz = torch.randn(5, 24, device=device)
    inputs = operands(5, 24, 16, device=device, bias=True)
    wide = [t.double().requires_grad_() for t in inputs]
    z = F.silu(F.linear(wide[0], wide[1], wide[3])) * F.linear(wide[0], wide[2], wide[4])
    expected = torch.autograd.grad(z, wide, dz.double())
    for wanted in list(itertools.product([False, True], repeat=5))[1:]:
        given = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted)]
        z = swiglu.forward(*given, save=save)
        del steps[:]
        z.backward(dz)
        for tensor, want, gradient in zip(given, wanted, expected):
            assert (tensor.grad is not None) == want
            if want:
                assert relative_error(tensor.grad, gradient) <= TOLERANCE[torch.float32]
        need_x, need_gate, need_up = wanted[:3]
        if need_gate == need_up and (need_x or need_gate):
            asked = [("gate_backward", True), ("input_grad", need_x), ("weight_grad", need_gate)]
            assert steps == [name for name, launched in asked if launched]


@pytest.mark.parametrize("save", SAVE)
def test_strides(save, device, steps):
    """Rows apart, expanded gradients, weights that are views, and such that no row stride describes."""
    _, w_gate, w_up, w_down, *_ = ffn_operands((6, 5), 40, 24, device=device)
    views = [
        torch.randn(6, 5, 31, device=device)[..., 3:27].transpose(0, 1),
        torch.randn(30, 56, device=device)[:, 7:31],
    ]
    gates = [(w_gate, w_up), torch.cat([w_gate, w_up]).chunk(2), (lay(w_gate, "kn"), w_up)]
    gates += [torch.randn(24, 80, device=device).t().chunk(2), (torch.randn(40, 48, device=device)[:, ::2], w_up)]
    downs = [w_down, torch.randn(40, 30, device=device)[:, 3:27].t(), torch.randn(24, 80, device=device)[:, ::2]]
    for x, (gate, up), down in itertools.product(views, gates, downs):
        inputs = [t.detach().requires_grad_() for t in (x, gate, up, down)]
        y = swiglu.swiglu_ffn(*inputs, save=save)
        for dy in (torch.randn(1, device=device).expand(y.shape), torch.randn(*y.shape, 2, device=device)[..., 0]):
            expected, gradients = float64([*inputs, None, None, None], dy)
            assert relative_error(y, expected) <= TOLERANCE[torch.float32]
            check_gradients(inputs, torch.autograd.grad(y, inputs, dy, retain_graph=True), gradients[:4])
    assert {"down", "dgated", "input_grad", "weight_grad", "down_weight_grad"} == set(steps)


@pytest.mark.parametrize("gate_order", ["gate_first", "up_first"])
@pytest.mark.parametrize("layout", ["packed_nk", "packed_kn"])
@pytest.mark.parametrize("save", SAVE)
def test_a_packed_weight_gets_one_gradient_without_a_copy(save, layout, gate_order, device, steps):
    from torch.utils._python_dispatch import TorchDispatchMode

    x, gate, up, down, *_ = ffn_operands(9, 40, 24, device=device)
    dy = torch.randn(9, 24, device=device)
    _, expected = float64([x, gate, up, down, None, None, None], dy)
    order = [0, 1] if gate_order == "gate_first" else [1, 0]
    packed, wanted = (torch.cat([pair[i] for i in order]) for pair in ((gate, up), expected[1:3]))
    if layout == "packed_kn":
        packed, wanted = packed.t().contiguous(), wanted.t()
    packed.requires_grad_()

    def block():
        return swiglu.swiglu_ffn(x, *swiglu.split_packed(packed, layout=layout, gate_order=gate_order), down, save=save)

    y, seen = block(), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    y.backward(dy)
    assert packed.grad.stride() == packed.stride() and "weight_grad" in steps
    assert packed.grad.untyped_storage().nbytes() == packed.untyped_storage().nbytes()
    assert relative_error(packed.grad, wanted) <= TOLERANCE[torch.float32]
    # Where a mode waits, and where both halves have another use, copies are right too.
    with Recorder():
        (through,) = torch.autograd.grad(block(), packed, dy)
    assert OPS.backward.default in seen and torch.equal(through, packed.grad)
    (twice,) = torch.autograd.grad(block() + block(), packed, dy)
    torch.testing.assert_close(twice, 2 * packed.grad)
    halves = swiglu.split_packed(packed, layout=layout)
    (one,) = torch.autograd.grad(halves[0].sum(), packed)
    assert one.sum() == halves[0].numel()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 16), (33, 129), (1, 1)])
def test_gate(shape, dtype, device, steps):
    gate, up, dz = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    z_wide = F.silu(wide[0]) * wide[1]
    expected = torch.autograd.grad(z_wide, wide, dz.double())
    pair = [t.detach().requires_grad_() for t in (gate, up)]
    packed = torch.cat([up, gate], -1).requires_grad_()
    for z, leaves, wanted in (
        (swiglu.swiglu_fused(*pair), pair, expected),
        (swiglu.swiglu_fused(packed, gate_order="up_first"), [packed], [torch.cat(expected[::-1], -1)]),
    ):
        assert relative_error(z, z_wide) <= TOLERANCE[dtype]
        check_gradients(leaves, torch.autograd.grad(z, leaves, dz), wanted)
    # Vectors are torch's: each length would have a plan of its own.
    two_ways = (["gate", "gate", "gate_backward", "gate_backward"], ["gate", "gate_backward"] * 2)
    assert steps in two_ways if gate.dim() > 1 else not steps


def test_gate_of_strided_and_empty_tensors(device, steps):
    base = torch.randn(6, 5, 40, device=device)
    expanded = torch.randn(1, 1, 16, device=device).expand(6, 5, 16)
    for gate, up in (
        (base[..., :16], base[..., 20:36]),
        (base[..., 0:32:2], base[..., 1:32:2]),
        (base.transpose(0, 1)[..., :16], base.transpose(0, 1)[..., 16:32]),
        (expanded, base[..., :16]),
        (base[0, 0, ::2], base[0, 0, 1::2]),
        (base[0, 0, 0], base[0, 0, 1]),
        (base[:0], base[:0]),
        (base[..., :0], base[..., :0]),
    ):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        z = swiglu.swiglu_fused(gate, up)
        assert z.is_contiguous() and torch.allclose(z, F.silu(gate) * up, atol=1e-6)
        dz = torch.randn((), device=device).expand(z.shape)
        got, expected = (
            torch.autograd.grad(f(gate, up), (gate, up), dz) for f in (swiglu.swiglu_fused, swiglu.swiglu_torch)
        )
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("m", [0, (2, 0, 3), (), (2, 1, 3)])
def test_leading_dimensions(m, save, device, steps):
    inputs = [t.requires_grad_() for t in ffn_operands(m, 12, 8, device=device, bias=True)]
    y = swiglu.swiglu_ffn(*inputs, save=save)
    y.sum().backward()
    _, expected = float64(inputs, torch.ones_like(y))
    z = swiglu.forward(*inputs[:3], save=save)
    assert all(t is not None and t.isfinite().all() for t in torch.autograd.grad(z.sum(), inputs[:3]))
    for tensor, gradient in zip(inputs, expected):
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save", SAVE)
def test_twice_through_the_graph_checkpointed_and_a_weight_used_twice(save, device, steps):
    x, gate, _, down, *_ = ffn_operands(5, 12, 8, device=device)
    x, gate, down = (t.requires_grad_() for t in (x, gate, down))

    def block(x):
        return swiglu.swiglu_ffn(swiglu.swiglu_ffn(x, gate, gate, down, save=save), gate, gate, down, save=save)

    y = block(x).sum()
    first = torch.autograd.grad(y, (x, gate, down), retain_graph=True)
    again = torch.autograd.grad(y, (x, gate, down))
    third = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), (x, gate, down))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, third))
    wide = [t.detach().double().requires_grad_() for t in (x, gate, down)]
    out = wide[0]
    for _ in range(2):
        out = F.linear(F.silu(out @ wide[1].t()) * (out @ wide[1].t()), wide[2])
    for got, expected in zip(first, torch.autograd.grad(out.sum(), wide)):
        assert relative_error(got, expected) <= TOLERANCE[torch.float32]


def test_a_backward_that_broke_off_is_not_taken_up_again(device, steps, monkeypatch):
    inputs = [t.requires_grad_() for t in ffn_operands(5, 12, 8, device=device)[:4]]
    y = swiglu.swiglu_ffn(*inputs).sum()
    step = _steps._native.step

    def without_memory(*given):
        if given[4] == "input_grad":
            raise MemoryError
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(_steps._native, "step", without_memory)
        with pytest.raises(MemoryError):
            y.backward()
    # What was saved holds gradients by now.
    with pytest.raises(RuntimeError, match="broke off|second time"):
        y.backward()


@pytest.mark.parametrize("block", [False, True])
def test_saved_tensors_are_overwritten_only_by_the_last_backward(block, device, steps, monkeypatch):
    inputs = [t.requires_grad_() for t in ffn_operands(5, 12, 8, device=device)[: 4 if block else 3]]
    groups = []
    step = _steps._native.step
    monkeypatch.setattr(_steps._native, "step", lambda *given: groups.append(given[10:12]) or step(*given))

    def train(call, retain_graph=False):
        y = call()
        del groups[:]
        gradients = torch.autograd.grad(y.sum(), inputs, retain_graph=retain_graph)
        return gradients, groups[0][0] == groups[0][1][:4]

    function = swiglu.swiglu_ffn if block else swiglu.forward
    op = OPS.ffn_saving if block else OPS.forward_saving
    kept, is_kept_in_place = train(lambda: function(*inputs), retain_graph=True)
    last, is_last_in_place = train(lambda: function(*inputs))
    # Outputs of the operation are its caller's.
    other, is_other_in_place = train(lambda: op(*inputs, *[None] * (7 - len(inputs) if block else 2))[0])
    assert (is_kept_in_place, is_last_in_place, is_other_in_place) == (False, True, False)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, last, other))


def _offload(lay):
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lay)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("block", [False, True])
def test_what_goes_by_address_and_what_leaves_it(block, save, device, steps, monkeypatch):
    from torch.autograd import forward_ad
    from torch.utils._python_dispatch import TorchDispatchMode

    class PassOn(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    inputs = [t.requires_grad_() for t in ffn_operands(6, 12, 8, device=device, bias=True, out=10)]
    *operands, gate_bias, _, down_bias = inputs
    leaves = operands if block else operands[:3]
    dy = torch.randn(6, 10 if block else 12, device=device)
    left, general = [], _recorded.gradients
    monkeypatch.setattr(_recorded, "gradients", lambda *given: left.append(given) or general(*given))

    def call(down_bias=None, gate_bias=None):
        if block:
            return swiglu.swiglu_ffn(*leaves, gate_bias, None, down_bias, save=save)
        return swiglu.forward(*leaves, gate_bias, save=save)

    def backward(y, wanted=leaves, dy=dy, **options):
        del left[:], steps[:]
        found = torch.autograd.grad(y, wanted, dy, **options)
        return found, not left

    backward(call())  # prepares what it has no plan of yet
    expected, by_address = backward(call(), retain_graph=True)
    assert by_address and "input_grad" in steps

    def check(found, is_by_address=False):
        assert found[1] == is_by_address
        for a, b in zip(found[0], expected, strict=True):
            torch.testing.assert_close(a, b)

    # By address too: views, biases without gradients, the bias of the down projection, hooks that give everything back as it lay.
    check(backward(call(), dy=dy.t().contiguous().t()), True)
    check(backward(call(gate_bias=torch.zeros(12, device=device))), True)
    with _offload(lambda t: t.clone()):
        y = call()
    check(backward(y), True)
    if block:
        (*found, d_bias), by_address = backward(call(down_bias), [*leaves, down_bias])
        assert by_address and torch.allclose(d_bias, dy.sum(0), atol=1e-5)
        check((found, by_address), True)
    # Not by address: other strides than the forward's, from a hook or under a leaf; lazy negation; modes; many vectors.
    with _offload(lambda t: t.t().contiguous().t()):
        y = call()
    check(backward(y))
    y, weight = call(), operands[1].data
    operands[1].data = lay(weight, "kn")
    check(backward(y))
    y = call()
    operands[1].data = weight.double()
    with pytest.raises(RuntimeError):
        backward(y)
    operands[1].data = weight
    with _offload(lambda t: torch._neg_view(-t)):
        y = call()
    check(backward(y))
    check(backward(call(), dy=torch._neg_view(-dy)))
    y = call()
    with PassOn():
        check(backward(y))
    batched, by_address = backward(call(), dy=dy.expand(2, 6, -1), is_grads_batched=True)
    check(([gradient[1] for gradient in batched], by_address))
    # Nor gradients to be differentiated again, of biases beside the gate, or of one of its weights.
    check(backward(call(), create_graph=True))
    (*found, _), by_address = backward(call(gate_bias=gate_bias), [*leaves, gate_bias], retain_graph=True)
    assert not by_address
    operands[2].requires_grad_(False)
    check(([*backward(call(), leaves[:2])[0], *expected[2:]], not left))
    operands[2].requires_grad_()
    monkeypatch.setattr(_recorded, "gradients", lambda *given: left.append(given) or (None,) * 6)
    y = call()
    with forward_ad.dual_level():
        assert not backward(y, dy=forward_ad.make_dual(dy, dy), allow_unused=True)[1]


def test_a_subclass_from_a_hook_leaves_the_addresses(device, steps, monkeypatch):
    class Wrapped(torch.Tensor):
        pass

    inputs = [t.requires_grad_() for t in ffn_operands(6, 12, 8, device=device)[:4]]
    expected = torch.autograd.grad(swiglu.swiglu_ffn(*inputs).sum(), inputs)  # prepares
    left, general = [], _recorded.gradients
    monkeypatch.setattr(_recorded, "gradients", lambda *given: left.append(given) or general(*given))
    with _offload(lambda t: t.as_subclass(Wrapped)):
        y = swiglu.swiglu_ffn(*inputs)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), expected):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)
    assert left


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vectors_of_torch_func_through_a_recorded_graph(device, steps):
    x, gate, up, _, _ = operands(3, 6, 4, device=device)
    z = swiglu.forward(x.requires_grad_(), gate, up)
    vectors = torch.randn(5, 3, 6, device=device)
    batched = torch.func.vmap(lambda v: torch.autograd.grad(z, x, v, retain_graph=True)[0])(vectors)
    one_by_one = torch.stack([torch.autograd.grad(z, x, v, retain_graph=True)[0] for v in vectors])
    torch.testing.assert_close(batched, one_by_one)


def test_what_is_differentiated_again_is_torchs(device, steps):
    inputs = [t.requires_grad_() for t in ffn_operands(3, 12, 8, device=device)[:4]]
    y = swiglu.swiglu_ffn(*inputs)
    del steps[:]
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    assert "dgated" not in steps
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    plain = F.linear(F.silu(wide[0] @ wide[1].t()) * (wide[0] @ wide[2].t()), wide[3])
    first = torch.autograd.grad(plain.square().sum(), wide, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), wide)
    for got, wanted in zip(second, expected):
        assert relative_error(got, wanted) <= 1e-4


def test_gradients_of_many_vectors_at_once(device, steps):
    x, gate, up, _, _ = operands(3, 6, 4, device=device)
    z = swiglu.forward(x.requires_grad_(), gate, up)
    vectors = torch.eye(18, device=device).view(18, 3, 6)
    (batched,) = torch.autograd.grad(z, x, vectors, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(z, x, v, retain_graph=True)[0] for v in vectors])
    torch.testing.assert_close(batched, one_by_one)


@pytest.mark.parametrize("orders", ["nk", "kn"])
@pytest.mark.parametrize("saved", [False, True])
def test_opcheck(saved, orders, device, steps):
    x, gate, up, down, gate_bias, up_bias, _ = ffn_operands((2, 3), 24, 16, device=device, bias=True)
    gate, up, down = (lay(w, orders) for w in (gate, up, down))
    pre = [torch.randn(2, 3, 24, device=device) for _ in range(2)] if saved else [None, None]
    dz = torch.randn(2, 3, 24, device=device)
    for needs in ([True] * 6, [True, False, False, False, False, False], [False, True, True, True, False, True]):
        block = (torch.randn_like(x), x, gate, up, down, gate_bias, up_bias, *pre, needs)
        without = (dz, x, gate, up, None, gate_bias, up_bias, *pre, [n and i != 3 for i, n in enumerate(needs)])
        for inputs in (block, without):
            torch.library.opcheck(OPS.backward.default, inputs)
    assert steps
    inputs = [t.requires_grad_() for t in (x, gate, up, gate_bias, up_bias)]
    torch.library.opcheck(OPS.forward_saving.default, inputs)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_one_operation_for_the_backward(dynamic, save, device, steps):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(module, _inputs):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module)

    def block(*inputs):
        return swiglu.swiglu_ffn(*inputs, save=save) + swiglu.forward(*inputs[:3], *inputs[4:6], save=save)

    compiled = torch.compile(
        block, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    for m in (4, 9):
        inputs = [t.requires_grad_() for t in ffn_operands(m, 24, 16, device=device, bias=True, out=24)]
        expected, got = block(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(a, b)
    forward, backward = graphs[:2]
    assert backward.count(OPS.backward.default) == 2 and torch.ops.aten.mm.default not in backward
    assert OPS.backward.default not in forward


@pytest.mark.parametrize("save", SAVE)
def test_compiles_with_inductor(save, device, steps):
    mlp = swiglu.SwiGLU(24, 40, True, device=device, save=save)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    expected, got = mlp(x), torch.compile(mlp, fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    leaves = [x, *mlp.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected))):
        torch.testing.assert_close(a, b)
    assert steps.count("dgated") == 2


def test_hooks_that_lay_saved_tensors_otherwise(device, steps):
    inputs = [t.requires_grad_() for t in ffn_operands(6, 12, 8, device=device)[:4]]
    expected = torch.autograd.grad(swiglu.swiglu_ffn(*inputs).sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu(), lambda t: t.to(device).t().contiguous().t()):
        y = swiglu.swiglu_ffn(*inputs)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), expected):
        torch.testing.assert_close(a, b)


def test_autocast(device, steps):
    inputs = [t.requires_grad_() for t in ffn_operands(64, 96, 48, device=device, bias=True)]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = swiglu.swiglu_ffn(*inputs)
    y.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in inputs) and "dgated" in steps


@pytest.mark.skipif(_straight.native is None, reason="promises of static weights need DLPack's exchange API")
@pytest.mark.parametrize("order", ["nk", "kn"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_launched_was_prepared(training, order, device, steps, monkeypatch):
    """With a down projection to a size of its own, a gate by itself, and static weights."""
    prepared, launched = set(), set()
    step = _steps._native.step
    monkeypatch.setattr(_steps._native, "prepare_step", lambda *given: prepared.add(given[2:]))
    monkeypatch.setattr(_steps._native, "step", lambda *given: launched.add(given[4:8]) or step(*given))
    _steps.prepare(0, "f32", order == "kn", 40, 16, 24, training, True)
    x, *weights = ffn_operands(5, 40, 16, device=device, out=24)[:4]
    given = [t.detach().requires_grad_(training) for t in (x, *(lay(w, order) for w in weights))]
    y = swiglu.swiglu_ffn(*given)
    z = swiglu.swiglu_fused(*torch.randn(2, 5, 40, device=device).requires_grad_(training))
    if training:
        y.sum().backward()
        z.sum().backward()
        swiglu.forward(*given[:3]).sum().backward()
    with torch.no_grad(), swiglu.static_weights():
        swiglu.swiglu_ffn(*given)
    assert launched == prepared


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("block", [False, True])
def test_flops_are_counted(block, save, device, steps):
    from torch.utils.flop_counter import FlopCounterMode

    m, n, k, out = 6, 12, 8, 10
    inputs = [t.requires_grad_() for t in ffn_operands((2, m // 2), n, k, device=device, out=out)[: 4 if block else 3]]
    call = swiglu.swiglu_ffn if block else swiglu.forward
    of_gate, of_down = 2 * m * n * k, 2 * m * n * out if block else 0
    recomputed = 2 if save == "nothing" else 0
    with FlopCounterMode(display=False) as counter:
        y = call(*inputs, save=save)
    assert counter.get_total_flops() == 2 * of_gate + of_down
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), inputs)
    assert counter.get_total_flops() == (4 + recomputed) * of_gate + 2 * of_down
    assert "input_grad" in steps
    y = call(*(t.detach().requires_grad_(index == 0) for index, t in enumerate(inputs)), save=save)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == (2 + recomputed) * of_gate + of_down


@pytest.mark.parametrize("first", ["swiglu", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first):
    script = (
        f"import {first}, torch, swiglu; from torch.utils.flop_counter import FlopCounterMode\n"
        "x, w = torch.randn(3, 4), torch.randn(5, 4)\n"
        "with FlopCounterMode(display=False) as counter: swiglu.forward(x, w, w)\n"
        "assert counter.get_total_flops() == 4 * 3 * 4 * 5, counter.get_total_flops()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_leaves_the_counter_and_triton_alone():
    script = (
        "import sys, torch; before = set(sys.modules); import swiglu\n"
        "new = set(sys.modules) - before\n"
        "assert not new & {'torch.utils.flop_counter', 'triton', 'torch._dynamo'}, new"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
def test_graph_of_a_training_step():
    device = "cuda"
    inputs = [t.requires_grad_() for t in ffn_operands(64, 256, 128, torch.bfloat16, device)[:4]]
    swiglu.prepare(128, 256, dtype=torch.bfloat16, device=device, training=True)
    dy = torch.randn(64, 128, device=device, dtype=torch.bfloat16)

    def train():
        return torch.autograd.grad(swiglu.swiglu_ffn(*inputs), inputs, dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(F.linear(inputs[0], inputs[1]).sum(), inputs[:2])  # torch's own first time
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = train()
    for _ in range(3):
        with torch.no_grad():
            inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        for a, b in zip(got, train()):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_other_gpus():
    device = "cuda"
    inputs = [t.requires_grad_() for t in ffn_operands(256, 512, 256, torch.bfloat16, device)[:4]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = swiglu.swiglu_ffn(inputs[0] + 1, *inputs[1:])
        got = torch.autograd.grad(y.sum(), inputs)
    stream.synchronize()
    _, expected = float64([inputs[0] + 1, *inputs[1:], None, None, None], torch.ones_like(y))
    check_gradients(inputs, got, expected[:4])
    if torch.cuda.device_count() > 1:
        other = [t.detach().to("cuda:1").requires_grad_() for t in inputs]
        with torch.cuda.device(0):
            torch.autograd.grad(swiglu.swiglu_ffn(*other).sum(), other)
            assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("save", SAVE)
def test_same_bits_in_every_run(save):
    device = "cuda"
    inputs = [t.requires_grad_() for t in ffn_operands(300, 1024, 512, torch.bfloat16, device)[:4]]
    dy = torch.randn(300, 512, device=device, dtype=torch.bfloat16)
    first, *others = (torch.autograd.grad(swiglu.swiglu_ffn(*inputs, save=save), inputs, dy) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_wrong_native_arguments_are_named():
    good = [0, "bf16", 0, 4, "gate", "k_major", 8, 8, (), (), (16, 8) * 2, (16, 8), 0]
    for place, wrong, argument in (
        (0, -1, "device"),
        (1, "bf17", "dtype"),
        (1, "e4m3", "dtype"),
        (3, 2**40, "x"),
        (4, "gates", "op"),
        (5, "k", "major"),
        (6, 2**40, "n"),
        (7, 2**40, "k"),
        (8, (16, 8) * 3, "left"),
        (10, (16, 8) * 3, "saved"),
        (11, (16, 8) * 4, "out"),
        (11, (16,), "out"),
    ):
        with pytest.raises(ValueError, match=f"argument `{argument}`: "):
            _steps._native.step(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(ValueError, match="argument `device`: "):
        _steps._native.prepare_step(-1, "bf16", "down", "k_major", 8, 8)


@pytest.mark.gpu
def test_wrong_steps_are_named_on_a_gpu():
    step = _steps._native.step
    given = (0, "bf16", torch.cuda.current_stream().cuda_stream, 4, "gate", "k_major", 8, 8)
    with pytest.raises(ValueError, match="`saved`.*is 0"):
        step(*given, (), (), (0, 8) * 2, (16, 8), 0)
    with pytest.raises(ValueError, match="forward.*no step|no step"):
        _steps._native.prepare_step(0, "bf16", "forward", "k_major", 8, 8)
