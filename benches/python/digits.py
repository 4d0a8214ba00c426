"""Training to read digits, the same network with different SwiGLU layers: time per phase, accuracy, what was learnt.

usage: python benches/python/digits.py [--mnist FOLDER] [--epochs 10] [--hidden 512] [--device cuda] [--quick]

The data are scikit-learn's handwritten digits (1797 of 8 x 8), or MNIST's four IDX files from a folder. They lie on
the device beforehand, so that an epoch is the network's time. Every arm starts from the same numbers and sees the
same batches; `learnt` counts the parameters that changed, so that a frozen layer shows.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import harness
import idx
import torch
import torch.nn.functional as F
from torch import nn

import swiglu


class Plain(nn.Module):
    """Two linears and the gate: what the others replace."""

    def __init__(self, k: int, n: int, silu_mul=None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False)
        self.silu_mul = silu_mul or (lambda a, b: F.silu(a) * b)

    def forward(self, x):
        return self.silu_mul(self.a(x), self.b(x))


def packed(frozen: bool):
    def build(k: int, n: int) -> nn.Module:
        layer = swiglu.FusedSwiGLU(k, n)
        layer.Wf.requires_grad_(not frozen)
        return layer

    return build


def arms(args) -> dict:
    found = {
        harness.OURS: packed(frozen=False),
        "ours, frozen": packed(frozen=True),
        "torch": Plain,
        "relu": lambda k, n: nn.Sequential(nn.Linear(k, n, bias=False), nn.ReLU()),
    }
    if (liger := harness.liger(args.device)) is not None:
        found["liger"] = lambda k, n: Plain(k, n, liger.LigerSiLUMulFunction.apply)
    return found


def network(build, pixels: int, hidden: int, seed: int) -> nn.Sequential:
    """One SwiGLU layer and a classifier, starting from the same numbers in every arm."""
    torch.manual_seed(seed)
    classifier = nn.Linear(hidden, 10)
    weights = [torch.empty(hidden, pixels).uniform_(-(pixels**-0.5), pixels**-0.5) for _ in range(2)]
    layer = build(pixels, hidden)
    with torch.no_grad():
        if isinstance(layer, swiglu.FusedSwiGLU):
            layer.Wf.copy_(torch.cat([weight.t() for weight in weights], 1))
        else:
            for parameter, weight in zip(layer.parameters(), weights):
                parameter.copy_(weight)
    return nn.Sequential(layer, classifier)


class Clock:
    """Milliseconds per phase; waits for the GPU at every lap."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, {}
        self.lap()

    def lap(self, phase: str | None = None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if phase is not None:
            self.spent[phase] = self.spent.get(phase, 0.0) + (now - self.last) * 1e3
        self.last = now


def train(name: str, build, data, args) -> list[dict]:
    x, y, x_test, y_test = data
    net = network(build, x.shape[1], args.hidden, args.seed).to(args.device, args.dtype)
    start = {key: value.clone() for key, value in net.named_parameters()}
    optimizer = torch.optim.Adam((p for p in net.parameters() if p.requires_grad), lr=1e-3)
    order = torch.Generator().manual_seed(args.seed)
    rows = []
    for epoch in range(1, args.epochs + 1):
        clock, losses = Clock(args.device), []
        for batch in torch.randperm(len(x), generator=order).to(args.device).split(args.batch):
            inputs, labels = x[batch], y[batch]
            clock.lap("load")
            loss = F.cross_entropy(net(inputs).float(), labels)
            clock.lap("forward")
            optimizer.zero_grad()
            loss.backward()
            clock.lap("backward")
            optimizer.step()
            clock.lap("optimizer")
            losses.append(loss.detach())
        with torch.no_grad():
            clock.lap()
            correct = sum(
                (net(part).argmax(1) == label).sum() for part, label in zip(x_test.split(1000), y_test.split(1000))
            )
            clock.lap("inference")
        spent = {f"{phase}_ms": ms for phase, ms in clock.spent.items()}
        rows.append({
            "arm": name,
            "epoch": epoch,
            "train_ms": sum(spent.values()) - spent["inference_ms"],
            **spent,
            "loss": torch.stack(losses).mean().item(),
            "accuracy": correct.item() / len(x_test),
            "learnt": sum(not torch.equal(start[key], value) for key, value in net.named_parameters()),
            "parameters": len(start),
        })  # fmt: skip
    return rows


def load(args) -> tuple:
    if args.mnist:
        data = idx.mnist(Path(args.mnist))
    else:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            sys.exit("the digits need scikit-learn (pip install scikit-learn), or give --mnist FOLDER")
        digits = load_digits()
        x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        test, training = order[:360], order[360:]
        data = x[training], y[training], x[test], y[test]
    x, y, x_test, y_test = (part.to(args.device) for part in data)
    return x.to(args.dtype), y, x_test.to(args.dtype), y_test


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--mnist", metavar="FOLDER", help="the four IDX files, .gz or not")
    flags.add_argument("--epochs", type=int, default=10)
    flags.add_argument("--hidden", type=int, default=512)
    flags.add_argument("--batch", type=int, default=64)
    args = harness.parse(flags, argv)
    if args.quick:
        args.epochs, args.hidden = min(args.epochs, 8), 64
    data = load(args)
    for build in arms(args).values():  # kernels are compiled and memory is found before the clock runs
        network(build, data[0].shape[1], args.hidden, args.seed).to(args.device, args.dtype)(data[0][: args.batch])
    rows = [row for name, build in arms(args).items() for row in train(name, build, data, args)]
    phases = ("train_ms", "load_ms", "forward_ms", "backward_ms", "optimizer_ms", "inference_ms")
    columns = {"arm": "", "epoch": "d", **dict.fromkeys(phases, ".1f")}
    columns |= {"loss": ".4f", "accuracy": ".4f", "learnt": "d", "parameters": "d"}
    shown = [row for row in rows if row["epoch"] in (1, args.epochs)]
    harness.table("first and last epoch", shown, columns)
    harness.write(args, "digits.py", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
