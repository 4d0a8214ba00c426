"""Patching what is built like Hugging Face's blocks, without transformers: recognising, refusing, undoing, copying."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import kept_numbers
from torch import nn

import swiglu


class MLP(nn.Module):
    def __init__(self, k=8, n=12, names=("gate_proj", "up_proj", "down_proj"), act=None, bias=False):
        super().__init__()
        self.names = names
        for name, (inputs, outputs) in zip(names, ((k, n), (k, n), (n, k))):
            setattr(self, name, nn.Linear(inputs, outputs, bias))
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Scaled(MLP):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Clamped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7))


class Dropped(MLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Noisy(MLP):
    """Other than a block only while it does not train."""

    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x) + 1


class Inline(MLP):
    def __init__(self):
        super().__init__(names=("w1", "w3", "w2"))
        del self.act_fn

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def gradients(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def assert_runs_ours(module, x):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        module(x)
    assert any(name.startswith("swiglu::") for name in seen)


@pytest.mark.parametrize("save", ["preactivations", "nothing"])
@pytest.mark.parametrize("build", [MLP, lambda: MLP(names=("w1", "w3", "w2"), bias=True), Inline])
def test_same_results_same_weights_and_back(build, save):
    module, x = build(), torch.randn(2, 3, 8)
    model = nn.ModuleDict({"mlp": module, "other": nn.Linear(8, 8)})
    before, parameters = gradients(module, x), dict(model.named_parameters())
    original, names = type(module), list(model.state_dict())
    report = swiglu.patch(model, save=save)
    assert report.replaced == {"mlp": original.__name__} and not report.refused
    assert isinstance(module, original) and type(module) is not original
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == names
    assert_runs_ours(module, x)
    for got, expected in zip(gradients(module, x), before):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not swiglu.patch(model, save=save).replaced
    assert swiglu.unpatch(model) == 1 and type(module) is original
    assert all(torch.equal(got, expected) for got, expected in zip(gradients(module, x), before))
    assert swiglu.unpatch(model) == 0


def hooked():
    module = MLP()
    module.forward = module.forward
    return module


def with_dropout():
    module = MLP()
    module.dropout = nn.Dropout(0.5)
    return module


class Quantised(torch.Tensor):
    """Stands in for a weight that only its own functions understand."""


def with_quantised_weight():
    module = MLP()
    weight = module.up_proj.weight.detach().as_subclass(Quantised)
    module.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    return module


def with_zeros():
    module = MLP()
    nn.init.zeros_(module.down_proj.weight)
    return module


def with_low_rank():
    class LoRA(nn.Linear):
        pass

    module = MLP()
    module.up_proj = LoRA(8, 12, bias=False)
    return module


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: MLP(act=nn.GELU()), "its activation is GELU, not SiLU"),
        (lambda: MLP(act=torch.tanh), "its activation is tanh, not SiLU"),
        (with_low_rank, "up_proj is LoRA, not nn.Linear"),
        (with_quantised_weight, "up_proj's weight is Quantised, not a plain tensor"),
        (with_zeros, "tells nothing"),
        (with_dropout, "parts that a SwiGLU block has not: dropout"),
        (hooked, "its forward was replaced before"),
        (Scaled, "its output is not down"),
        (Swapped, "its output is not down"),
        (Clamped, "its output is not down"),
        (lambda: Clamped().half(), "its output is not down"),
        (Dropped, "its output is not down"),
        (lambda: Dropped().eval(), "its output is not down"),
        (Noisy, "its output is not down"),
        (lambda: MLP(act=lambda x: F.silu(x.clamp(max=7))), "its activation is <lambda>, not SiLU"),
        (lambda: MLP(names=("w1", "w2", "w3")), "probe tokens do not pass"),
        (lambda: MLP().to("meta"), "meta device"),
    ],
)
def test_what_is_not_one_is_left_alone_with_the_reason(build, reason):
    model = nn.Sequential(build())
    original = type(model[0])
    report = swiglu.patch(model)
    assert not report.replaced and reason in report.refused["0"]
    assert type(model[0]) is original
    assert reason in str(report)


class Computed(MLP):
    """Of another formula than a block's, by a little."""

    def __init__(self, formula):
        super().__init__(k=16, n=32)
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


def swish(beta):
    return lambda m, x: m.down_proj(m.gate_proj(x) * torch.sigmoid(beta * m.gate_proj(x)) * m.up_proj(x))


def dropped(p):
    return lambda m, x: F.dropout(MLP.forward(m, x), p, m.training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "formula, is_one",
    [
        (swish(1.0), True),
        (swish(1.02), False),
        (lambda m, x: MLP.forward(m, x) * 1.019, False),
        (lambda m, x: MLP.forward(m, x) * 0.999, False),
        (lambda m, x: MLP.forward(m, x) + 0.001 * x, False),
        (dropped(0.0), True),
        (dropped(0.001), False),
        (dropped(1e-7), False),
    ],
)
def test_small_differences_are_refused_too(formula, is_one, dtype):
    report = swiglu.patch(Computed(formula).to(dtype).train())
    assert bool(report.replaced) == is_one, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_another_order_of_the_sums_is_no_difference(dtype):
    """Of the projections, of the down projection in two parts, and of silu in float32."""

    class Split(MLP):
        def forward(self, x):
            gate = torch.cat([self.gate_proj(row[None]) for row in x.flatten(0, -2)]).view(*x.shape[:-1], -1)
            z = F.silu(gate.float()).to(x.dtype) * self.up_proj(x)
            half, weight = z.shape[-1] // 2, self.down_proj.weight
            return F.linear(z[..., :half], weight[:, :half]) + F.linear(z[..., half:], weight[:, half:])

    assert swiglu.patch(Split(128, 344).to(dtype)).replaced


class NeedsAWord(MLP):
    def __init_subclass__(cls, *, word, **kwargs):
        super().__init_subclass__(**kwargs)


class Frozen(MLP):
    def __setattr__(self, name, value):
        if name.startswith("_swiglu"):
            raise RuntimeError("frozen")
        super().__setattr__(name, value)


@pytest.mark.parametrize("build, reason", [(NeedsAWord, "word"), (Frozen, "frozen")])
def test_a_class_that_refuses_is_left_alone_and_the_others_are_patched(build, reason):
    model, x = nn.Sequential(MLP(), build(), MLP()), torch.randn(3, 8)
    plain = model(x)
    report = swiglu.patch(model)
    assert list(report.replaced) == ["0", "2"] and reason in report.refused["1"]
    assert type(model[1]) is build
    torch.testing.assert_close(model(x), plain)
    assert swiglu.unpatch(model) == 2


def test_a_graph_of_fx_is_left_alone():
    graph, x = torch.fx.symbolic_trace(MLP()), torch.randn(3, 8)
    plain = graph(x)
    assert "torch.fx" in swiglu.patch(graph).refused[""]
    graph.recompile()
    assert torch.equal(graph(x), plain)


def test_the_default_device_is_no_matter():
    module = MLP()
    with torch.device("meta"):
        assert swiglu.patch(module).replaced


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [MLP, Dropped])
def test_the_probe_draws_no_random_numbers_and_leaves_modes_alone(build, training):
    module = build().train(training)
    module.act_fn.train(not training)
    state = torch.get_rng_state()
    assert bool(swiglu.patch(module).replaced) == (build is MLP)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training == module.up_proj.training == training != module.act_fn.training


def test_large_values_that_overflow_tell_nothing():
    module = MLP(64, 64).half()
    with torch.no_grad():
        module.down_proj.weight.mul_(500)
    x = 100 * torch.ones(1, 64, dtype=torch.float16)
    assert not module(x).isfinite().all() and swiglu.patch(module).replaced


def test_other_devices_are_refused(monkeypatch):
    """A device like Intel's or Apple's, which this machine has not: played by parameters that say so."""
    module, foreign = MLP(), torch.device("xpu")
    monkeypatch.setattr(nn.Parameter, "device", property(lambda self: foreign), raising=False)
    report = swiglu.patch(module)
    assert report.refused[""] == "its weights are on xpu, and the kernels on CPU and CUDA devices alone"


def kept(module, x):
    return kept_numbers(lambda: module(x), [x, *module.parameters()])


def test_patched_again_it_takes_the_new_save():
    model, x = nn.Sequential(MLP()), torch.randn(3, 8)
    swiglu.patch(model)
    assert kept(model[0], x) == 2 * 3 * 12
    assert swiglu.patch(model, save="nothing").replaced == {"0": "MLP"}
    assert kept(model[0], x) == 0 and kept(copy.deepcopy(model[0]), x) == 0
    assert swiglu.unpatch(model) == 1 and "_swiglu_save" not in vars(model[0])


def test_unpatched_under_a_class_that_was_put_on_top():
    """As fully_shard does it."""
    module, x = MLP(), torch.randn(3, 8)
    plain = module(x)
    swiglu.patch(module)
    on_top = type("Sharded", (type(module),), {})
    module.__class__ = on_top
    assert_runs_ours(module, x)
    assert swiglu.unpatch(module) == 1 and swiglu.unpatch(module) == 0
    assert type(module) is on_top and torch.equal(module(x), plain)
    with pytest.raises(AssertionError):
        assert_runs_ours(module, x)
    assert swiglu.patch(module).replaced == {"": "MLP"}
    assert_runs_ours(module, x)


class Experts(nn.Module):
    """As transformers' eager ones; a number that is too large stands for an expert of another rank."""

    def __init__(self, experts=6, k=8, n=12):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * n, k))
        self.down_proj = nn.Parameter(torch.randn(experts, k, n))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        result = torch.zeros_like(hidden_states)
        for expert in range(self.gate_up_proj.shape[0]):
            token, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, -1)
            out = F.linear(self._apply_gate(torch.cat([gate, up], -1)), self.down_proj[expert])
            result.index_add_(0, token, out * top_k_weights[token, place, None])
        return result

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_are_asked_for_once(tokens, dtype, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    module, x = Experts(), torch.randn(tokens, 8)
    # 0 and 1 are nobody's choice, 6 is no expert here.
    index = torch.stack([torch.randperm(5)[:3] + 2 for _ in range(7)])[:tokens].to(dtype)
    weights = torch.rand(tokens, 3, requires_grad=True)
    leaves = [weights, *module.parameters()]

    def train():
        y = module(x, index, weights)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = train()
    assert swiglu.patch(module).replaced
    for got, wanted in zip(train(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    waits = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    lists = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or to_list(tensor))
    with Recorder():
        module(x, index, weights)
    assert not waits and len(lists) == 1
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 8)


def test_copies_and_pickles_stay_patched():
    module, x = MLP(), torch.randn(3, 8)
    swiglu.patch(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))
        assert twin.gate_proj.weight.data_ptr() != module.gate_proj.weight.data_ptr()
        assert swiglu.unpatch(twin) == 1 and type(twin) is MLP


def test_a_weight_that_becomes_foreign_later_is_called_not_fused():
    module, x = MLP(), torch.randn(3, 8)
    plain = module(x)
    swiglu.patch(module)
    module.up_proj.weight = nn.Parameter(module.up_proj.weight.detach().as_subclass(Quantised), requires_grad=False)
    y = module(x)
    torch.testing.assert_close(torch.Tensor(y), plain)


def test_calls_by_keyword_and_with_more_than_the_tokens():
    class Named(MLP):
        def forward(self, hidden_states, scale=None):
            y = super().forward(hidden_states)
            return y if scale is None else y * scale

    module, x = Named(), torch.randn(3, 8)
    plain, scaled = module(x), module(x, 2.0)
    assert swiglu.patch(module).replaced
    torch.testing.assert_close(module(hidden_states=x), plain)
    torch.testing.assert_close(module(x, scale=2.0), scaled)
    with pytest.raises(TypeError, match="hidden_states"):
        module()


def test_hooks_casts_and_late_changes_are_followed():
    module, x = MLP(), torch.randn(3, 8)
    plain, seen = module(x), []
    swiglu.patch(module)
    module.register_forward_hook(lambda *_: seen.append("block"))
    module.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    torch.testing.assert_close(module(x), plain)
    assert seen == ["up", "block"]
    assert module.double()(x.double()).dtype is torch.float64
    module.up_proj = nn.Sequential(nn.Linear(8, 12, bias=False, dtype=torch.float64))
    assert module(x.double()).shape == x.shape


def test_compiles_whole():
    module, x = MLP(), torch.randn(3, 8)
    plain = module(x)
    swiglu.patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain)
    for got, expected in zip(gradients(compiled, x), gradients(module, x)):
        torch.testing.assert_close(got, expected)


def test_wrong_words_are_named():
    with pytest.raises(ValueError, match="argument `save`: "):
        swiglu.patch(MLP(), save="all")
