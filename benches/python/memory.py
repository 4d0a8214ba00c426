"""What a stack of blocks keeps for its backward, and on a GPU the peak of one training step.

usage: python benches/python/memory.py [--layers 32] [--m 4096] [--k 4096] [--n 11008] [--device cuda] [--quick]

`kept` counts the bytes that autograd holds after the forward, weights aside; it needs no GPU.
"""

from __future__ import annotations

import sys

import harness
import torch
from torch import nn

import swiglu


class Plain(nn.Module):
    def __init__(self, k, n):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(k, n, False), nn.Linear(k, n, False), nn.Linear(n, k, False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ForwardOnly(swiglu.SwiGLU):
    """The fused layer with torch's GEMM behind it: the activation is kept, the pre-activations are not."""

    def forward(self, x):
        return self.w_down(swiglu.forward(x, self.w_gate.weight, self.w_up.weight, save="nothing"))


def liger_block(function):
    def build(k, n):
        block = Plain(k, n)
        block.forward = lambda x: block.down(function.apply(block.gate(x), block.up(x)))
        return block

    return build


def providers(args) -> dict:
    found = {
        harness.OURS: lambda k, n: swiglu.SwiGLU(k, n),
        "ours, nothing kept": lambda k, n: swiglu.SwiGLU(k, n, save="nothing"),
        "ours, forward + linear": ForwardOnly,
        "torch": Plain,
    }
    if (liger := harness.liger(args.device)) is not None:
        found["liger"] = liger_block(liger.LigerSiLUMulFunction)
    return found


def measure(name: str, build, args) -> dict:
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        blocks = nn.ModuleList(build(args.k, args.n) for _ in range(args.layers)).to(args.dtype)
        x = torch.randn(args.m, args.k).to(args.dtype).requires_grad_()
    # An operation may save views: what counts is the storage. Kept alive, so that no address comes twice.
    weights = {parameter.untyped_storage().data_ptr() for parameter in blocks.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = x
        for block in blocks:
            y = y + block(y)
    row = {"provider": name, "layers": args.layers, "m": args.m, "k": args.k, "n": args.n}
    row["kept_mb"] = sum(size for size, _ in kept.values()) / 1e6
    kept.clear()
    y.float().square().mean().backward()
    if not all(p.grad is not None and p.grad.isfinite().all() for p in blocks.parameters()):
        raise ArithmeticError(f"{name}: a gradient is missing or not finite")
    if args.device.type == "cuda":
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return row


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    for flag, value in (("--layers", 32), ("--m", 4096), ("--k", 4096), ("--n", 11008)):
        flags.add_argument(flag, type=int, default=value)
    args = harness.parse(flags, argv)
    if args.quick:
        args.layers, args.m, args.k, args.n = 3, 64, 32, 88
    rows = [measure(name, build, args) for name, build in providers(args).items()]
    columns = {"provider": "", "layers": "d", "m": "d", "k": "d", "n": "d", "kept_mb": ".3f", "peak_mb": ".1f"}
    harness.table("memory; peak: of one step, weights and their gradients included", rows, columns)
    harness.write(args, "memory.py", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
