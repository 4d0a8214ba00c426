"""Plans: prepared ahead, called without copies, captured in graphs."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_right, operands

import swiglu


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["separate_nk", "separate_kn", "packed_nk", "packed_kn"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_every_layout(dtype, layout, device):
    x, gate, up, gate_bias, up_bias = operands(9, 40, 24, dtype, device, bias=True)
    plan = swiglu.prepare(24, 40, dtype=dtype, device=device, layout=layout)
    packed = torch.cat([gate, up])
    weights = {
        "separate_nk": lambda: (gate, up),
        "separate_kn": lambda: (gate.t().contiguous().t(), up.t().contiguous().t()),
        "packed_nk": lambda: swiglu.split_packed(packed, layout=layout),
        "packed_kn": lambda: swiglu.split_packed(packed.t().contiguous(), layout=layout),
    }[layout]()
    assert_right(plan(x, *weights, gate_bias, up_bias), x, gate, up, gate_bias, up_bias)
    out = torch.full((9, 56), torch.nan, dtype=dtype, device=device)
    assert plan(x, *weights, out=out[:, :40]).data_ptr() == out.data_ptr()
    assert_right(out[:, :40], x, gate, up)
    assert out[:, 40:].isnan().all()
    assert plan(x[:0], *weights).shape == (0, 40)


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_arguments_are_named(device):
    x, gate, up, bias, _ = operands(9, 40, 24, device=device, bias=True)
    plan = swiglu.prepare(24, 40, dtype=torch.float32, device=device)
    memory = torch.empty(9 * 40 + 9 * 24, device=device)
    overlapping = memory[: 9 * 24].view(9, 24)
    cases = [
        ("x", ValueError, (x[None], gate, up), {}),
        ("x", ValueError, (x[:, :23], gate, up), {}),
        ("x", ValueError, (torch.randn(24, 9, device=device).t(), gate, up), {}),
        ("x", TypeError, (x.half(), gate, up), {}),
        ("gate", ValueError, (x, gate.t(), up), {}),
        ("up", TypeError, (x, gate, up.double()), {}),
        ("up", ValueError, (x, gate, up.to("meta")), {}),
        ("gate_bias", ValueError, (x, gate, up, bias[:39]), {}),
        ("up_bias", ValueError, (x, gate, up, None, bias[None]), {}),
        ("out", ValueError, (x, gate, up), {"out": torch.empty(9, 41, device=device)}),
        ("out", ValueError, (overlapping, gate, up), {"out": memory[9 * 20 : 9 * 60].view(9, 40)}),
    ]
    for argument, error, inputs, options in cases:
        with pytest.raises(error, match=f"argument `{argument}`: "):
            plan(*inputs, **options)
    with pytest.raises(RuntimeError, match="gradients"):
        plan(x, gate.requires_grad_(), up)
    gate.requires_grad_(False)
    for out in (torch.empty(9, 40, device=device, requires_grad=True), torch.empty(9, 40, device=device)):
        if out.requires_grad:
            with pytest.raises(RuntimeError, match="gradients"):
                plan(x, gate, up, out=out)
        with torch.no_grad():
            assert plan(x, gate.requires_grad_(), up, out=out) is out
        gate.requires_grad_(False)


def test_what_has_no_address_is_named_and_tangents_are_not_lost(device):
    from torch.autograd import forward_ad

    x, gate, up, bias, _ = operands(9, 40, 24, device=device, bias=True)
    plan = swiglu.prepare(24, 40, dtype=torch.float32, device=device)
    good = {
        "x": x,
        "gate": gate,
        "up": up,
        "gate_bias": bias,
        "up_bias": bias,
        "out": torch.empty_like(plan(x, gate, up)),
    }
    for name, tensor in good.items():
        for wrong in (tensor.to_sparse(), tensor.tolist(), 3):
            with pytest.raises((TypeError, ValueError), match=f"argument `{name}`: "):
                plan(**{**good, name: wrong})
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward gradients: call swiglu.forward"):
            plan(**{**good, name: forward_ad.make_dual(tensor, tensor)})
    for name in ("x", "gate", "up"):
        with pytest.raises(TypeError, match=f"argument `{name}`: is None"):
            plan(**{**good, name: None})
    with forward_ad.dual_level():  # of operands that have none
        assert plan(**good) is good["out"]
    with pytest.raises(TypeError, match="argument `x`: .* torch.func"):
        torch.func.vmap(lambda x: plan(x, gate, up))(x[None])
    with pytest.raises(TypeError, match="argument `x`: .* torch.func"):
        torch.func.jvp(lambda x: plan(x, gate, up), (x,), (x,))
    with pytest.raises(TypeError, match="argument `gate`: .* torch.func"):
        torch.func.vmap(lambda gate: plan(x, gate, up))(gate[None])


@pytest.mark.parametrize("device", DEVICES)
def test_a_backward_is_told_that_what_it_saved_was_written(device):
    x, gate, up, _, _ = operands(9, 40, 24, device=device)
    plan = swiglu.prepare(24, 40, dtype=torch.float32, device=device)
    out = plan(x, gate, up)
    loss = (out * torch.ones_like(out).requires_grad_()).sum()
    plan(x, gate, up, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        plan(x, gate, up, out=torch.empty(9, 40, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_copies_and_pickles(device):
    x, gate, up, _, _ = operands(9, 40, 24, device=device)
    plan = swiglu.prepare(24, 40, dtype=torch.float32, device=device, layout="separate_kn")
    gate, up = (t.t().contiguous().t() for t in (gate, up))
    assert copy.deepcopy(plan) is plan and copy.deepcopy([plan])[0] is plan
    twin = pickle.loads(pickle.dumps(plan))
    assert (twin.device, twin.dtype) == (plan.device, plan.dtype) and twin.config(9) == plan.config(9)
    assert torch.equal(twin(x, gate, up), plan(x, gate, up))


def test_wrong_preparations_are_named():
    def refuses(argument, error, *sizes, **options):
        with pytest.raises(error, match=f"argument `{argument}`: "):
            swiglu.prepare(*sizes, **{"dtype": torch.float32, "device": "cpu", **options})

    refuses("dtype", TypeError, 8, 8, dtype=torch.float64)
    refuses("layout", ValueError, 8, 8, layout="nk")
    refuses("hidden_size", ValueError, -1, 8)
    refuses("intermediate_size", ValueError, 8, 2**28)
    refuses("hidden_size", ValueError, 2**29, 8, dtype=torch.bfloat16)
    refuses("out_features", ValueError, 8, 8, out_features=-1)
    refuses("device", ValueError, 8, 8, device="meta")
    refuses("device", ValueError, 8, 8, device="bogus")
    refuses("device", ValueError, 8, 8, device=None)
    refuses("hidden_size", TypeError, "8", 8)
    refuses("intermediate_size", TypeError, 8, 8.0)
    refuses("out_features", TypeError, 8, 8, out_features="8")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_largest_sizes_are_the_runtimes(dtype):
    most = 2**30 // dtype.itemsize - 1
    for sizes in ((most, 8), (8, most)):
        swiglu.prepare(*sizes, dtype=dtype, device="cpu")
    with pytest.raises(ValueError, match="argument `out_features`: "):
        swiglu.prepare(8, 8, dtype=dtype, device="cpu", out_features=most + 1)
    word = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    for name, sizes in (("n", (most + 1, 8)), ("k", (8, most + 1))):
        with pytest.raises(ValueError, match=f"argument `{name}` is"):
            swiglu._native.prepare(-1, word, "separate_nk", *sizes)


def test_threads_may_share_plans():
    cases = [operands(8, n, 24) for n in (33, 34, 33, 34)]
    results = [None] * len(cases)

    def work(index):
        results[index] = swiglu.forward(*cases[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for z, inputs in zip(results, cases):
        assert_right(z, *inputs)


@pytest.mark.parametrize(
    "call, words",
    [
        ("swiglu.prepare(8, 8, dtype=torch.float32, device='cuda')", "argument `device`: "),
        ("swiglu._native.prepare(0, 'bf16', 'separate_nk', 8, 8)", "GPU"),
        ("swiglu._native.prepare_step(0, 'bf16', 'down', 'k_major', 8, 8)", "GPU"),
    ],
)
def test_a_missing_gpu_is_a_sentence(call, words):
    unseen = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    script = f"import torch, swiglu; {call}"
    done = subprocess.run([sys.executable, "-c", script], env=unseen, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError") and (words in last or "driver" in last), done.stderr


def test_import_loads_nothing_of_cuda():
    script = (
        "import torch; maps = lambda: {l.split()[-1] for l in open('/proc/self/maps') if '.so' in l}\n"
        "before = maps(); import swiglu; after = maps() - before\n"
        "assert not any(name in path for path in after for name in ('libcuda', 'nvrtc', 'libcublas')), after"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("through", ["plan", "forward"])
def test_graph_replays(through):
    x, gate, up, _, _ = operands(64, 256, 128, torch.bfloat16, "cuda")
    plan = swiglu.prepare(128, 256, dtype=torch.bfloat16, device="cuda")
    call = plan if through == "plan" else swiglu.forward
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = call(x, gate, up)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        z.fill_(torch.nan)
        graph.replay()
        assert_right(z, x, gate, up)


@pytest.mark.gpu
def test_the_gate_alone_may_be_captured():
    # Sizes of its own: the next test's may not be prepared.
    gate, up = (torch.randn(64, 272, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    swiglu.prepare(144, 272, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = swiglu.swiglu_fused(gate, up)
    graph.replay()
    torch.testing.assert_close(z, swiglu.swiglu_torch(gate, up), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_capture_without_preparation_says_what_to_do():
    x, gate, up, _, _ = operands(64, 264, 136, torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match="swiglu.prepare"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(0)  # an empty graph would be warned about
            swiglu.forward(x, gate, up)
    torch.cuda.synchronize()
    assert_right(swiglu.forward(x, gate, up), x, gate, up)
