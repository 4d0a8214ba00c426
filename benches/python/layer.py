"""Gate, up and activation as one layer: forward and backward over B tokens and D = K = N, or over M at one K and N.

usage: python benches/python/layer.py [--b 64,256,1024] [--d 2048,4096] [--device cuda] [--quick] [--out FILE.json]
       python benches/python/layer.py --sweep [--k 4096] [--n 14336] [--plot FILE.svg]

The backward comes in two columns: dX alone (frozen weights), and dX with the gradients of both weights. Every
provider computes the whole sum over K and every gradient that the column names, and is held to float64 for it.
Liger's gate writes its gradients over what it saved: the first backward is held to float64, the timed ones run on
what it left.
"""

from __future__ import annotations

import sys

import harness
import torch
import torch.nn.functional as F
from plot import plot

import swiglu


def plain(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def nothing_kept(x, gate, up):
    return swiglu.forward(x, gate, up, save="nothing")


def providers(args) -> dict:
    functions = {harness.OURS: swiglu.forward, "ours, nothing kept": nothing_kept, "torch": plain}
    if (liger := harness.liger(args.device)) is not None:
        functions["liger"] = lambda x, gate, up: liger.LigerSiLUMulFunction.apply(F.linear(x, gate), F.linear(x, up))
    if args.compile:
        functions["torch.compile"] = torch.compile(plain)
    return functions


def measure(m: int, k: int, n: int, ways: list[str], functions: dict, args) -> list[dict]:
    x = torch.randn(m, k, device=args.device).to(args.dtype)
    gate, up = (torch.randn(n, k, device=args.device).div(k**0.5).to(args.dtype) for _ in range(2))
    dz = torch.randn(m, n, device=args.device).to(args.dtype)
    backward = ways != ["forward"]
    wide = [t.double().requires_grad_(backward) for t in (x, gate, up)]
    z_wide = plain(*wide)
    gradients = torch.autograd.grad(z_wide, wide, dz.double()) if backward else ()
    rows = []
    for way in ways:
        count = {"forward": 0, "dX": 1, "dX + dW": 3}[way]
        calls = {}
        for name, function in functions.items():
            if count == 0:
                calls[name] = lambda function=function: function(x, gate, up)
                harness.hold(name, [calls[name]()], [z_wide.detach()])
                continue
            operands = [t.clone().requires_grad_(i < count) for i, t in enumerate((x, gate, up))]
            z = function(*operands)
            calls[name] = lambda z=z, wanted=operands[:count]: torch.autograd.grad(z, wanted, dz, retain_graph=True)
            harness.hold(name, calls[name](), gradients[:count])
        figures = harness.race(calls, args)
        rows += [{"way": way, "m": m, "k": k, "n": n, "provider": name, **f} for name, f in figures.items()]
    return rows


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--b", type=harness.numbers)
    flags.add_argument("--d", type=harness.numbers)
    flags.add_argument("--sweep", action="store_true", help="forward over M at one K and N")
    flags.add_argument("--k", type=int, default=4096)
    flags.add_argument("--n", type=int, default=14336)
    flags.add_argument("--m", type=harness.numbers, help="of the sweep")
    flags.add_argument("--plot", help="picture of time over ours, .svg or .png")
    flags.add_argument("--compile", action="store_true", help="torch.compile as a provider")
    args = harness.parse(flags, argv)
    functions = providers(args)
    if args.sweep:
        k, n = (32, 64) if args.quick else (args.k, args.n)
        ms = args.m or ([1, 4, 16] if args.quick else [2**i for i in range(15)])
        rows = [row for m in ms for row in measure(m, k, n, ["forward"], functions, args)]
    else:
        bs = args.b or ([8] if args.quick else [64, 256, 1024])
        ds = args.d or ([64] if args.quick else [2048, 4096])
        ways = ["forward", "dX", "dX + dW"]
        rows = [row for b in bs for d in ds for row in measure(b, d, d, ways, functions, args)]
    columns = {"way": "", "m": "d", "k": "d", "n": "d", "provider": "", "us": ".1f", "ratio": ".3f"}
    harness.table("one layer; ratio: the provider's time over ours", rows, columns)
    harness.print_means(rows)
    harness.write(args, "layer.py", rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
