"""The elementwise gate alone, silu(gate) * up: microseconds and GB/s of memory traffic.

usage: python benches/python/gate.py [--m 2048,8192] [--n 11008,16384] [--device cuda] [--graph] [--quick]
                                    [--out FILE.json]

It has no arithmetic to speak of: the figure to hold it to is what a copy reaches, which is a row of the table.
"""

from __future__ import annotations

import sys

import harness
import torch
import torch.nn.functional as F

import swiglu


def measure(m: int, n: int, args) -> list[dict]:
    gate, up = (torch.randn(m, n, device=args.device).to(args.dtype) for _ in range(2))
    packed, dz = torch.cat([gate, up], 1), torch.randn(m, n, device=args.device).to(args.dtype)
    expected = F.silu(gate.double()) * up.double()
    item = gate.element_size()
    forward = {
        harness.OURS: lambda: swiglu.swiglu_fused(gate, up),
        "ours, packed": lambda: swiglu.swiglu_fused(packed),
        "torch": lambda: F.silu(gate) * up,
    }
    if (liger := harness.liger(args.device)) is not None:
        forward["liger"] = lambda: liger.LigerSiLUMulFunction.apply(gate, up)
    for name, call in forward.items():
        harness.hold(name, [call()], [expected])
    forward["copy"] = lambda: packed.clone()

    inputs = [t.requires_grad_() for t in (gate.clone(), up.clone())]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(F.silu(wide[0]) * wide[1], wide, dz.double())
    backward = {}
    functions = {harness.OURS: swiglu.swiglu_fused, "torch": swiglu.swiglu_torch}
    if liger is not None:  # it writes its gradients over what it saved: held to float64 once, timed on what is left
        functions["liger"] = liger.LigerSiLUMulFunction.apply
    for name, function in functions.items():
        z = function(*inputs)
        backward[name] = lambda z=z: torch.autograd.grad(z, inputs, dz, retain_graph=True)
        harness.hold(name, backward[name](), gradients)

    # Numbers read and written by what fuses everything: 2 + 1 forward, 3 + 2 backward, 2 + 2 for the copy.
    rows = []
    for way, providers, moved in (("forward", forward, 3), ("backward", backward, 5)):
        with torch.set_grad_enabled(way == "backward"):
            figures = harness.race(in_graphs(providers) if args.graph and way == "forward" else providers, args)
        for name, figure in figures.items():
            numbers = 4 if name == "copy" else moved
            rate = numbers * m * n * item / figure["us"] * 1e-3
            rows.append({"way": way, "m": m, "n": n, "provider": name, **figure, "gb_s": rate})
    return rows


def in_graphs(providers: dict) -> dict:
    """All but the copy: in a graph one of its sizes took half as long again."""
    replays = harness.in_graphs({name: call for name, call in providers.items() if name != "copy"})
    return replays | {"copy": providers["copy"]}


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--m", type=harness.numbers)
    flags.add_argument("--n", type=harness.numbers)
    flags.add_argument("--graph", action="store_true", help="replay CUDA graphs of the forward")
    args = harness.parse(flags, argv)
    ms = args.m or ([64] if args.quick else [2048, 8192])
    ns = args.n or ([128] if args.quick else [11008, 16384])
    rows = [row for m in ms for n in ns for row in measure(m, n, args)]
    columns = {"way": "", "m": "d", "n": "d", "provider": "", "us": ".1f", "gb_s": ".0f", "ratio": ".3f"}
    harness.table("silu(gate) * up; ratio: the provider's time over ours", rows, columns)
    harness.write(args, "gate.py", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
