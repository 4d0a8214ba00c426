"""Patched Hugging Face models beside the same models unpatched: logits, loss and every gradient."""

import copy

import pytest
import torch
from conftest import relative_error

import swiglu

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Model type: what differs from SMALL, and where its blocks are.
MODELS = {
    "llama": ({"mlp_bias": True}, "mlp"),
    "mistral": ({}, "mlp"),
    "qwen2": ({}, "mlp"),
    "qwen3": ({"head_dim": 8}, "mlp"),
    "phi3": ({}, "mlp"),
    "mixtral": (EXPERTS, "mlp.experts"),
    "qwen3_moe": ({"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, "mlp.experts"),
}  # fmt: skip
PATCHABLE = sorted(MODELS)
TOKENS = torch.arange(1, 41).view(2, 20) % 61


def build(kind, **options):
    different, _ = MODELS.get(kind, ({}, None))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **different, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config._experts_implementation = "eager"  # the others take no float64
    return model


def step(model):
    """Logits, loss and every gradient, in one order."""
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


def assert_near(got, expected, exact, slack):
    """Near the unpatched model, and no farther from float64 than it is, but for `slack`."""
    assert set(got) == set(expected) == set(exact)
    for name, value in got.items():
        theirs = relative_error(expected[name], exact[name])
        assert relative_error(value, exact[name]) <= 1.5 * theirs + slack, name


def blocks(report):
    return sorted(report.replaced)


@pytest.mark.parametrize("kind", PATCHABLE)
@pytest.mark.parametrize("save", ["preactivations", "nothing"])
def test_logits_loss_and_every_gradient(kind, save):
    model = build(kind)
    exact = step(copy.deepcopy(model).double())
    expected, names, tensors = step(model), list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    report = swiglu.patch(model, save=save)
    assert blocks(report) == [f"model.layers.{layer}.{MODELS[kind][1]}" for layer in range(2)], str(report)
    assert not report.refused
    assert list(model.state_dict()) == names and [p.data_ptr() for p in model.parameters()] == tensors
    got = step(model)
    assert_near(got, expected, exact, slack=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    assert swiglu.unpatch(model) == 2
    again = step(model)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", PATCHABLE)
def test_float64_agrees_to_the_last_digits(kind):
    model = build(kind).double()
    expected = step(model)
    swiglu.patch(model)
    for name, value in step(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral"])
def test_bfloat16(kind):
    model = build(kind).bfloat16()
    exact, expected = step(copy.deepcopy(model).double()), step(model)
    swiglu.patch(model)
    assert_near(step(model), expected, exact, slack=2e-3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_keep_their_implementation(implementation):
    model = build("mixtral")
    model.config._experts_implementation = implementation
    expected = step(model)
    swiglu.patch(model)
    got = step(model)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_gemma_is_refused_for_its_activation(kind):
    model = build(kind, head_dim=8)
    expected = model(input_ids=TOKENS).logits
    report = swiglu.patch(model)
    assert not report.replaced and len(report.refused) == 2
    assert all("its activation is" in reason and "not SiLU" in reason for reason in report.refused.values())
    assert torch.equal(model(input_ids=TOKENS).logits, expected)


def test_generation_training_and_checkpointing():
    model = build("llama")
    patched = copy.deepcopy(model)
    swiglu.patch(patched)
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(patched.generate(TOKENS, **kwargs), model.generate(TOKENS, **kwargs))
    patched.train().gradient_checkpointing_enable()
    model.train()
    expected, got = step(model), step(patched)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_saved_and_loaded_like_any_other(tmp_path):
    model = build("phi3")
    swiglu.patch(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].mlp).__name__ == "Phi3MLP"
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_compiles_whole():
    model = build("llama").eval()
    expected = model(TOKENS).logits
    swiglu.patch(model)
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x))
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_liger_blocks_take_their_configs_and_weights():
    config = build("llama", mlp_bias=False).config
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs, ours = LlamaMLP(config), swiglu.SwiGLUMLP(config)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
