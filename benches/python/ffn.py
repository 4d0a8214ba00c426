"""The whole feed-forward block: forward, and forward with backward, in both modes of what is kept.

usage: python benches/python/ffn.py [--m 512,2048,8192] [--kn 2048x8192,4096x14336] [--device cuda] [--quick]
"""

from __future__ import annotations

import sys

import harness
import torch
import torch.nn.functional as F

import swiglu


def plain(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def nothing_kept(*operands):
    return swiglu.swiglu_ffn(*operands, save="nothing")


def providers(args) -> dict:
    functions = {harness.OURS: swiglu.swiglu_ffn, "ours, nothing kept": nothing_kept, "torch": plain}
    if (liger := harness.liger()) is not None:
        silu_mul = liger.LigerSiLUMulFunction.apply
        functions["liger"] = lambda x, g, u, d: F.linear(silu_mul(F.linear(x, g), F.linear(x, u)), d)
    if args.compile:
        functions["torch.compile"] = torch.compile(plain)
    return functions


def measure(m: int, k: int, n: int, functions: dict, args) -> list[dict]:
    def weight(rows, columns):
        return torch.randn(rows, columns, device=args.device).div(columns**0.5).to(args.dtype)

    operands = [torch.randn(m, k, device=args.device).to(args.dtype), weight(n, k), weight(n, k), weight(k, n)]
    dy = torch.randn(m, k, device=args.device).to(args.dtype)
    wide = [t.double().requires_grad_() for t in operands]
    y_wide = plain(*wide)
    gradients = torch.autograd.grad(y_wide, wide, dy.double())
    leaves = [t.clone().requires_grad_() for t in operands]
    forward, both = {}, {}
    for name, function in functions.items():
        forward[name] = lambda function=function: function(*operands)
        both[name] = lambda function=function: torch.autograd.grad(function(*leaves), leaves, dy)
        harness.hold(name, [forward[name]()], [y_wide.detach()])
        harness.hold(name, both[name](), gradients)
    rows = []
    for way, calls in (("forward", forward), ("forward + backward", both)):
        for name, figure in harness.race(calls, args.device, args.rounds).items():
            gemms = 3 if way == "forward" else 9
            rate = gemms * 2 * m * n * k / figure["us"] * 1e-6
            rows.append({"way": way, "m": m, "k": k, "n": n, "provider": name, **figure, "tflops": rate})
    return rows


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--m", type=harness.numbers)
    flags.add_argument("--kn", default=None, help="KxN,...")
    flags.add_argument("--compile", action="store_true", help="torch.compile as a provider")
    args = harness.parse(flags, argv)
    ms = args.m or ([16] if args.quick else [512, 2048, 8192])
    shapes = args.kn or ("32x64" if args.quick else "2048x8192,4096x11008,4096x14336")
    shapes = [tuple(map(int, word.split("x"))) for word in shapes.split(",")]
    functions = providers(args)
    rows = [row for k, n in shapes for m in ms for row in measure(m, k, n, functions, args)]
    columns = {"way": "", "m": "d", "k": "d", "n": "d", "provider": "", "us": ".1f", "tflops": ".2f", "ratio": ".3f"}
    harness.table("the block; TFLOP/s of its 3 or 9 GEMMs, recomputed ones not counted", rows, columns)
    harness.write(args, "ffn.py", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
