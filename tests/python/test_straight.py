"""The straight way: what it gives is what the general way gives, and whatever is out of the ordinary leaves it."""

import contextlib
import itertools
import weakref

import pytest
import torch
from conftest import TOLERANCE, operands, reference, relative_error
from test_ffn import ffn_operands, float64
from test_forward import refusals
from torch.utils._python_dispatch import TorchDispatchMode

import swiglu
from swiglu import _library, _recorded, _straight

DTYPES = list(TOLERANCE)
needs_api = pytest.mark.skipif(_straight.native is None, reason="needs a torch with DLPack's exchange API")
pytestmark = needs_api


class General:
    """Counts the calls that go the general way."""

    def __init__(self, monkeypatch):
        self.calls = 0
        for name in ("run", "run_ffn", "run_keeping", "gradients"):
            monkeypatch.setattr(_recorded, name, self._counting(getattr(_recorded, name)))

    def _counting(self, function):
        def counted(*given):
            self.calls += 1
            return function(*given)

        return counted

    def meets(self, call):
        before = self.calls
        result = call()
        return result, self.calls > before


@pytest.fixture
def general(monkeypatch):
    return General(monkeypatch)


@contextlib.contextmanager
def without_the_api():
    before, _straight.native = _straight.native, None
    try:
        yield
    finally:
        _straight.native = before


def layouts(gate, up):
    n, k = gate.shape
    wide = torch.empty(2, n, k + 3, dtype=gate.dtype, device=gate.device)
    wide[0, :, 2 : k + 2], wide[1, :, 2 : k + 2] = gate, up
    apart = torch.empty(2, k, n + 5, dtype=gate.dtype, device=gate.device)
    apart[0, :, 1 : n + 1], apart[1, :, 1 : n + 1] = gate.t(), up.t()
    yield gate, up
    yield gate.t().contiguous().t(), up.t().contiguous().t()
    yield torch.cat([gate, up]).chunk(2)
    yield torch.cat([gate.t(), up.t()], 1).t().chunk(2)
    yield wide[0, :, 2 : k + 2], wide[1, :, 2 : k + 2]
    yield apart[0, :, 1 : n + 1].t(), apart[1, :, 1 : n + 1].t()
    yield torch.nn.Parameter(gate, False), torch.nn.Parameter(up, False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(24, 16), (1, 7), (7, 1), (1, 1)])
def test_gives_the_bits_of_the_general_way(n, k, dtype, bias, device, launched, general):
    rows = torch.randn(5, k + 4, device=device).to(dtype)
    inputs = [torch.randn(*shape, k, device=device).to(dtype) for shape in ((), (3,), (2, 3), (2, 1, 3, 2))]
    _, gate, up, *biases = operands(1, n, k, dtype, device, bias)
    down, down_bias = torch.randn(9, n, device=device).to(dtype), torch.randn(9, device=device).to(dtype)
    for x in (*inputs, rows[:, 2 : k + 2], rows[:1, 2 : k + 2], rows[::2, :k]):
        for weights in layouts(gate, up):
            for block in (False, True):
                given = (x, *weights, down, *biases, down_bias if bias else None) if block else (x, *weights, *biases)
                call = swiglu.swiglu_ffn if block else swiglu.forward
                with without_the_api():
                    expected = call(*given)
                got, is_general = general.meets(lambda: call(*given))
                assert not is_general and torch.equal(got, expected) and got.stride() == expected.stride()
                assert got.dtype is dtype and not got.requires_grad


SUBSETS = [(True,) * 4, (True, False, False, False), (False, True, True, False), (True, True, True, False)]


@pytest.mark.parametrize("save", ["preactivations", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gives_the_gradients_of_the_general_way(dtype, save, device, launched, general):
    x, gate, up, down, *_ = ffn_operands((2, 3), 24, 16, dtype, device, out=9)
    for weights in layouts(gate, up):
        for matrix in (down, down.t().contiguous().t()):
            for needed in SUBSETS:
                given = [t.detach().requires_grad_(need) for t, need in zip((x, *weights, matrix), needed)]
                leaves = [t for t in given if t.requires_grad]
                for block in (False, True):
                    if not block and needed[3]:
                        continue
                    call = swiglu.swiglu_ffn if block else swiglu.forward

                    def train(call=call, given=given, leaves=leaves, block=block):
                        y = call(*given[: 4 if block else 3], save=save)
                        return y, torch.autograd.grad(y, leaves, torch.ones_like(y).expand_as(y))

                    with without_the_api():
                        y, expected = train()
                    (got_y, got), is_general = general.meets(train)
                    assert not is_general and torch.equal(got_y, y)
                    for a, b in zip(got, expected, strict=True):
                        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("save", ["preactivations", "nothing"])
def test_z_is_free_when_the_gradients_of_gate_and_up_are_made(save, device, launched, general, monkeypatch):
    from torch._C._dynamo import guards

    made, alive_at = [], {}

    def recording(make):
        def recorded(shape, *given):
            alive_at[shape] = [other.shape for other in (ref() for ref in made) if other is not None]
            made.append(weakref.ref(tensor := make(shape, *given)))
            return tensor

        return recorded

    makers = map(recording, (guards._empty_strided_cpu, guards._empty_strided_cuda))
    monkeypatch.setattr(_straight, "native", _straight.read_by(*makers))
    x, gate, up, down, *_ = ffn_operands(6, 24, 16, device=device, out=9)
    inputs = [t.detach().requires_grad_() for t in (x, gate, up, down)]
    y = swiglu.swiglu_ffn(*inputs, save=save)
    got, is_general = general.meets(lambda: torch.autograd.grad(y, inputs, torch.ones_like(y)))
    z, of_gate, of_down = (6, 24), (24, 16), (9, 24)
    assert not is_general and all(g.isfinite().all() for g in got)
    assert z in alive_at[of_down] and z not in alive_at[of_gate] and of_down in alive_at[of_gate]


def test_the_first_call_prepares_and_its_backward_goes_straight_too(device, general, launched):
    x, *rest = operands(3, 8, 52 if device == "cpu" else 56, device=device)
    z, went_general = general.meets(lambda: swiglu.forward(x.requires_grad_(), *rest))
    assert not went_general
    assert not general.meets(lambda: z.backward(torch.ones_like(z)))[1]
    assert launched == ["gate_backward", "input_grad"]


def test_what_has_to_be_copied_or_is_empty_leaves_it(device, general):
    x, gate, up, bias, _ = operands((4, 6), 40, 24, device=device, bias=True)
    every_other = torch.randn(40, 48, device=device)[:, ::2]
    cases = [
        (x.transpose(0, 1), gate, up),
        (x[..., ::2], gate[:, ::2].contiguous(), up[:, ::2].contiguous()),
        (x[:1, :1].expand(4, 6, 24), gate, up),
        (x, every_other, up),
        (x, gate[:1].expand(40, 24), up),
        (x, gate.t().contiguous().t(), up),
        (x, gate, up, torch.randn(80, device=device)[::2], bias),
        (x[:0], gate, up),
        (x, gate[:0], up[:0]),
        (x.double(), gate.double(), up.double()),
    ]
    for given in cases:
        swiglu.forward(*given)  # prepares
        z, is_general = general.meets(lambda given=given: swiglu.forward(*given))
        assert is_general
        torch.testing.assert_close(z.double(), reference(*given), atol=1e-4, rtol=1e-4)
    many = x.view(*[1] * 9, 4, 6, 24)
    assert torch.equal(swiglu.forward(many, gate, up).view(4, 6, 40), swiglu.forward(x, gate, up))


@pytest.mark.parametrize("argument, error, inputs", refusals())
def test_wrong_arguments_have_the_words_of_the_general_way(argument, error, inputs):
    messages = set()
    for context in (contextlib.nullcontext, without_the_api):
        for recording in (False, True):
            given = [None if t is None else t.detach() for t in inputs]
            for tensor in given:
                if recording and tensor is not None and tensor.is_floating_point():
                    tensor.requires_grad_()
            with context(), pytest.raises(error) as caught:
                swiglu.forward(*given)
            messages.add(str(caught.value))
    assert len(messages) == 1 and f"`{argument}`" in messages.pop()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_no_tensors_at_all():
    x, gate, up, *_ = operands(3, 8, 4)
    names, good = ("x", "gate", "up"), (x, gate, up)
    contexts = (contextlib.nullcontext, torch.no_grad, without_the_api, PassOn)
    for context, layout, requires in itertools.product(contexts, ("nk", "kn"), (False, True)):
        weights = [(t.t() if layout == "kn" else t).detach().requires_grad_(requires) for t in good[1:]]
        operands_of_layout = [x, *weights]
        for place, name in enumerate(names):
            tensor = operands_of_layout[place].detach()
            for wrong in (None, 3, "x", [1.0], tensor.to_sparse(), tensor.to_mkldnn(), quantised(tensor)):
                given = [*operands_of_layout[:place], wrong, *operands_of_layout[place + 1 :]]
                with context(), pytest.raises(TypeError, match=f"argument `{name}`: "):
                    swiglu.forward(*given, layout=f"separate_{layout}")
    for name in ("b_gate", "w_down", "b_down"):
        given = {"w_down": gate.t(), name: [1.0]}
        with pytest.raises(TypeError, match=f"argument `{name}`: is list, expected a tensor"):
            swiglu.swiglu_ffn(*good, **given)
    for context in contexts:
        for given, name in (((None,), "gate"), ((None, up), "gate"), ((gate, 3), "up"), ((gate.to_sparse(),), "gate")):
            with context(), pytest.raises(TypeError, match=f"argument `{name}`: "):
                swiglu.swiglu_fused(*given)
    with pytest.raises(TypeError, match="argument `weight`: is None"):
        swiglu.split_packed(None, layout="packed_nk")
    for wrong in (None, 3, "x", object(), Torchlike()):
        assert _straight.native.are_plain(wrong) == (wrong is None)
        assert _straight.native.empty(wrong) is None


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


class Torchlike:
    def is_neg(self):
        return False


class PassOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_is_not_plain():
    from torch._subclasses import FakeTensorMode

    class Wrapped(torch.Tensor):
        pass

    x = torch.randn(4, 6)
    native = _straight.native
    plain = [x, torch.nn.Parameter(x), x.t(), x[:0], x.int(), x.requires_grad_(), torch.tensor(1.0), x.double()]
    assert native.are_plain(*plain) and native.are_plain() and native.are_plain(None, x, None)
    gone = torch.randn(4, 6)
    gone.untyped_storage().resize_(0)
    fake = FakeTensorMode().from_tensor(x.detach())
    conjugate = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    others = [x.as_subclass(Wrapped), torch._neg_view(x), conjugate, x.to("meta"), x.detach().to_sparse(), fake, gone]
    for other in others:
        assert not native.are_plain(x, other), other
        assert native.empty(other) is None
    seen = []
    torch.func.vmap(lambda row: seen.append(native.are_plain(row)) or row)(x.detach())
    assert seen == [False]
    assert native.are_plain(x)  # no exception of a failed read is left behind


@pytest.mark.parametrize("recording", [False, True])
def test_what_waits_in_the_dispatcher_is_not_stepped_over(recording, monkeypatch):
    inputs = operands(5, 12, 8)
    inputs = [None if t is None else t.requires_grad_(recording) for t in inputs]
    expected = swiglu.forward(*inputs)
    monkeypatch.setattr(_recorded, "call", lambda *given: pytest.fail("went straight"))
    with PassOn():
        assert torch.equal(swiglu.forward(*inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert swiglu.forward(*inputs).dtype is torch.bfloat16
    assert torch.equal(torch.compile(swiglu.forward, fullgraph=True, backend="aot_eager")(*inputs), expected)

    class Block(torch.nn.Module):
        def forward(self, x, gate, up):
            return swiglu.forward(x, gate, up)

    for strict in (False, True):
        program = torch.export.export(Block(), tuple(inputs[:3]), strict=strict)
        ops = {node.target for node in program.graph.nodes}
        assert ops & {torch.ops.swiglu.forward.default, torch.ops.swiglu.forward_saving.default}
        assert torch.equal(program.module()(*inputs[:3]), expected)


@pytest.mark.parametrize("recording", [False, True])
def test_a_profiler_sees_the_operations(recording):
    x, gate, up, _, _ = (None if t is None else t.requires_grad_(recording) for t in operands(5, 12, 8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = swiglu.swiglu_ffn(swiglu.forward(x, gate, up), gate.t(), up.t(), gate)
        swiglu.swiglu_fused(y)
    saving = "_saving" if recording else ""
    names = {event.key for event in profile.key_averages()}
    assert {f"swiglu::forward{saving}", f"swiglu::ffn{saving}", "swiglu::gate_packed"} <= names


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not tell that it exports")
def test_exported_programs_save_nothing_for_a_backward_and_have_one():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.layer = swiglu.SwiGLU(8, 12), swiglu.FusedSwiGLU(8, 8)

        def forward(self, x):
            return self.layer(self.block(x))

    module, x = Both(), torch.randn(5, 8)
    program = torch.export.export(module, (x,), strict=False)
    ops = {node.target for node in program.graph.nodes if "swiglu" in str(node.target)}
    assert ops == {torch.ops.swiglu.ffn.default, torch.ops.swiglu.forward.default}
    exported = program.module()
    parameters, ours = (list(m.parameters()) for m in (exported, module))
    for got, expected in zip(
        torch.autograd.grad(exported(x).sum(), parameters), torch.autograd.grad(module(x).sum(), ours), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("save", ["preactivations", "nothing"])
def test_compiled_training_saves_what_it_is_asked_to(save, monkeypatch):
    # As torch 2.7 to 2.13 have it under dynamo.
    monkeypatch.setattr(_library, "_tells_of_exports", lambda: True)
    x, gate, up, *_ = (None if t is None else t.requires_grad_() for t in operands(5, 12, 8))
    seen = set()

    def collecting(graph, _inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    def both(x, gate, up):
        return swiglu.swiglu_ffn(swiglu.forward(x, gate, up, save=save) @ gate, gate, up, up.t(), save=save)

    torch.compile(both, fullgraph=True, backend=collecting)(x, gate, up)
    saving = "_saving" if save == "preactivations" else ""
    assert {f"swiglu.forward{saving}.default", f"swiglu.ffn{saving}.default"} <= seen


def test_a_torch_without_the_exchange_api(monkeypatch):
    inputs = operands(5, 12, 8, bias=True)
    expected = swiglu.forward(*inputs)

    for tensor in (type("Oldest", (), {}), type("Other", (), {"__dlpack_c_exchange_api__": None, "is_neg": None})):
        with monkeypatch.context() as patch:
            patch.setattr(_straight, "Tensor", tensor)
            with pytest.raises((AttributeError, ValueError, TypeError)):
                _straight.read_by(None, None)
            assert _straight.find() is None
    with without_the_api():
        assert _straight.are_plain(*inputs) and not _straight.are_plain(torch._neg_view(inputs[0]))
        assert not _straight.are_plain(torch.nested.nested_tensor([inputs[0]]))
        assert torch.equal(swiglu.forward(*inputs), expected)
        made = _straight.empty(inputs[0], (3, 4), True)
        assert made.shape == (3, 4) and made.stride() == (1, 3)


def test_memory_exchanged_between_forward_and_backward(device, launched, general):
    inputs = [t.requires_grad_() for t in ffn_operands(6, 12, 8, device=device, out=10)[:4]]
    dy = torch.randn(6, 10, device=device)

    def expected():
        return float64([*inputs, None, None, None], dy)[1]

    swiglu.swiglu_ffn(*inputs).backward(dy)
    for index, other in (
        (0, torch.randn(6, 8, device=device)),  # the same lie elsewhere: its own address counts
        (0, torch.randn(8, 6, device=device).t()),
        (1, torch.randn(8, 12, device=device).t()),
        (3, torch.randn(12, 10, device=device).t()),
        (2, torch.randn(12, 16, device=device)[:, :8]),
    ):
        y = swiglu.swiglu_ffn(*inputs)
        before = inputs[index].data
        inputs[index].data = other
        got, is_general = general.meets(lambda: torch.autograd.grad(y, inputs, dy))
        assert is_general == (other.stride() != before.stride())
        assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(got, inputs))
        inputs[index].data = before
    for unpack in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
            y = swiglu.swiglu_ffn(*inputs)
        for a, b in zip(torch.autograd.grad(y, inputs, dy), expected()):
            assert relative_error(a, b) <= TOLERANCE[torch.float32]
