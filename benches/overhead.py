"""What a call costs the host, in microseconds, beyond the bare launch: `python benches/overhead.py`, on a GPU."""

import time

import torch
import torch.nn.functional as F

import swiglu

REPEATS, TRIES = 300, 40


def cost(call):
    """The best of several tries, each short enough not to wait for the GPU's queue."""
    best = float("inf")
    for _ in range(TRIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        best = min(best, (time.perf_counter() - start) / REPEATS)
    return best * 1e6


def main():
    x, gate, up = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((1, 64), (64, 64), (64, 64)))
    z, weight = torch.empty_like(x), torch.nn.Parameter(gate)
    plan = swiglu.prepare(64, 64, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    addresses = (x.data_ptr(), 64, gate.data_ptr(), 64, up.data_ptr(), 64, 0, 0, z.data_ptr(), 64)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    with torch.no_grad():
        bare = cost(lambda: plan._native.launch(stream, 1, *addresses))
        print(f"bare launch: {bare:.2f}")
        for name, call in {
            "plan(out=z)": lambda: plan(x, gate, up, out=z),
            "plan": lambda: plan(x, gate, up),
            "forward": lambda: swiglu.forward(x, gate, up),
            "torch.ops.swiglu.forward": lambda: torch.ops.swiglu.forward(x, gate, up),
            "swiglu_fused": lambda: swiglu.swiglu_fused(gate, up),
            "swiglu_ffn": lambda: swiglu.swiglu_ffn(x, gate, up, gate),
            "silu(linear) * linear": lambda: F.silu(F.linear(x, gate)) * F.linear(x, up),
        }.items():
            print(f"{name}: {cost(call) - bare:.2f} over it")
    print(f"forward, recording gradients: {cost(lambda: swiglu.forward(x, weight, weight)) - bare:.2f} over it")

    def linears(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    for name, function, count in (
        ("forward", swiglu.forward, 3),
        ("swiglu_ffn", swiglu.swiglu_ffn, 4),
        ("linears", linears, 4),
    ):
        leaves = [t.detach().requires_grad_() for t in (x, gate, up, gate)[:count]]
        y = function(*leaves)
        backward = cost(lambda y=y, leaves=leaves: torch.autograd.grad(y, leaves, y, retain_graph=True))
        print(f"backward of {name}: {backward - bare:.2f} over it")


main()
