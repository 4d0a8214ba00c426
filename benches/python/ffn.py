"""The whole feed-forward block beside its peers: forward, and forward with backward, with the memory that a step takes.

usage: python benches/python/ffn.py [--kn 2048x8192,4096x14336] [--m 2048,8192] [--compile] [--quick] [--out FILE.json]
       python benches/python/ffn.py --m 1 --ways forward --graph                                    # decode
       python benches/python/ffn.py --kn 2048x2048,4096x4096 --m 64,256,1024 --host                 # launch-bound

A provider that is not installed, fails or is wrong is left out with its reason. `peak_mb` is what one call allocates at most
beside operands and weights, its results included. The gradients of all three weights and of x are computed by everybody.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import harness
import torch
import torch.nn.functional as F
from plot import plot
from torch import Tensor

import swiglu

WAYS = ("forward", "forward + backward")


@dataclass
class Block:
    """A provider with its weights: ``call`` of x and them, and its gradients as those of gate, up and down."""

    call: Callable[..., Tensor]
    weights: list[Tensor]
    separate: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda gradients: gradients


def plain(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def nothing_kept(*operands):
    return swiglu.swiglu_ffn(*operands, save="nothing")


def compiled(weights, args) -> Block:
    if not args.compile:
        raise ImportError("asked for by --compile")
    torch._dynamo.reset()  # every shape a graph of its own, not one with free sizes
    return Block(torch.compile(plain), weights)


def liger(weights, args) -> Block:
    silu_mul = harness.need_liger(args.device).LigerSiLUMulFunction.apply
    return Block(lambda x, gate, up, down: F.linear(silu_mul(F.linear(x, gate), F.linear(x, up)), down), weights)


def liger_mlp(weights, args) -> Block:
    harness.need_liger(args.device)
    from liger_kernel.transformers import LigerSwiGLUMLP

    n, k = weights[0].shape
    with torch.device("meta"):
        mlp = LigerSwiGLUMLP(SimpleNamespace(hidden_size=k, intermediate_size=n, hidden_act="silu"))
    own = [torch.nn.Parameter(weight) for weight in weights]
    mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight = own
    return Block(lambda x, *_: mlp(x), own)


def quack(weights, args) -> Block:
    """QuACK's block; gate and up rows stand in turn in its weight."""
    from quack.mlp import mlp_func

    gate, up, down = weights
    both = torch.stack([gate, up], 1).flatten(0, 1)
    return Block(
        lambda x, both, down: mlp_func(x, both, down, activation="swiglu", tuned=args.quack_tuned),
        [both, down],
        lambda gradients: (gradients[0], gradients[1][::2], gradients[1][1::2], gradients[2]),
    )


def static_weights(*operands):
    with swiglu.static_weights():
        return swiglu.swiglu_ffn(*operands)


PROVIDERS = {
    harness.OURS: lambda weights, args: Block(swiglu.swiglu_ffn, weights),
    "ours, nothing kept": lambda weights, args: Block(nothing_kept, weights),
    "ours, static weights": lambda weights, args: Block(static_weights, weights),
    "torch": lambda weights, args: Block(plain, weights),
    "torch.compile": compiled,
    "liger": liger,
    "liger mlp": liger_mlp,
    "quack": quack,
}


def calls_of(block: Block, way: str, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    if way == "forward":

        def forward():
            with torch.no_grad():
                return (block.call(x, *block.weights),)

        return forward
    # A module's parameters are leaves already.
    leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, *block.weights)]
    return lambda: torch.autograd.grad(block.call(*leaves), leaves, dy)


def expected_of(x: Tensor, weights: list[Tensor], dy: Tensor, ways: list[str]) -> dict[str, tuple[Tensor, ...]]:
    """In float64."""
    wide = [t.double().requires_grad_(WAYS[1] in ways) for t in (x, *weights)]
    y = plain(*wide)
    gradients = torch.autograd.grad(y, wide, dy.double()) if y.requires_grad else ()
    return dict(zip(WAYS, ((y.detach(),), gradients)))


def measure(m: int, k: int, n: int, args) -> list[dict]:
    def weight(rows, columns):
        return torch.randn(rows, columns, device=args.device, dtype=args.dtype).div_(columns**0.5)

    weights = [weight(n, k), weight(n, k), weight(k, n)]
    x, dy = (torch.randn(m, k, device=args.device, dtype=args.dtype) for _ in range(2))
    expected = expected_of(x, weights, dy, args.ways)
    calls, rows = {way: {} for way in args.ways}, []
    for name in args.providers:
        try:
            block = PROVIDERS[name](weights, args)
            for way in args.ways:
                call = calls_of(block, way, x, dy)
                got = call()
                harness.hold(name, got if way == "forward" else block.separate(got), expected[way])
                calls[way][name] = call
        except Exception as error:  # a peer that is missing or fails is reported, and the others go on
            for of in calls.values():
                of.pop(name, None)
            print(f"M {m} K {k} N {n}, {name}: left out, {type(error).__name__}: {str(error)[:300]}", flush=True)
    got = expected = None
    harness.release(args.device)
    for way, of in calls.items():
        memory = {name: harness.peak_mb(call, args.device) for name, call in of.items()}
        if args.graph:
            of = harness.in_graphs(of)
        for name, figure in harness.race(of, args).items():
            gemms = 3 if way == "forward" else 9
            row = {"way": way, "m": m, "k": k, "n": n, "provider": name, **figure}
            row["tflops"] = gemms * 2 * m * n * k / figure["us"] * 1e-6
            rows.append(row | ({} if memory[name] is None else {"peak_mb": memory[name]}))
    del calls
    harness.release(args.device)
    return rows


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--m", type=harness.numbers)
    flags.add_argument("--kn", default=None, help="KxN,...")
    flags.add_argument(
        "--ways", type=lambda text: text.split(","), default=list(WAYS), help="default: " + ",".join(WAYS)
    )
    flags.add_argument("--providers", type=lambda text: text.split(","), default=list(PROVIDERS), help="default: all")
    flags.add_argument("--compile", action="store_true", help="torch.compile as a provider")
    flags.add_argument("--quack-tuned", action="store_true", help="QuACK tunes itself first, for minutes a shape")
    flags.add_argument("--graph", action="store_true", help="replay CUDA graphs of the calls")
    flags.add_argument("--plot", help="picture of time over ours, .svg or .png")
    args = harness.parse(flags, argv)
    unknown = {*args.providers} - {*PROVIDERS} | {*args.ways} - {*WAYS}
    if unknown:
        flags.error(
            f"unknown: {', '.join(sorted(unknown))}; providers are {', '.join(PROVIDERS)}; ways {', '.join(WAYS)}"
        )
    ms = args.m or ([16] if args.quick else [2048, 8192])
    shapes = args.kn or ("32x64" if args.quick else "2048x8192,4096x14336,8192x28672")
    shapes = [tuple(map(int, word.split("x"))) for word in shapes.split(",")]
    rows = []
    for k, n in shapes:
        for m in ms:
            rows += measure(m, k, n, args)
            harness.write(args, "ffn.py", rows)  # a run that is cut off leaves what it has
    columns = {"way": "", "m": "d", "k": "d", "n": "d", "provider": "", "us": ".1f", "tflops": ".2f", "ratio": ".3f"}
    title = "the block; TFLOP/s of its 3 or 9 GEMMs, recomputed ones not counted; ratio: the provider's time over ours"
    harness.table(title, rows, columns | {"peak_mb": ".1f"})
    harness.print_means(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
