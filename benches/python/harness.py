"""What the scripts here share: their flags, the race that times, float64 as the judge, tables and raw output.

Protocol: every provider is held to float64 first; every round times every provider once, in random order; a figure
is the median over the rounds, a ratio the median of the ratios of a round (over 1: ours is faster). On a GPU the L2
is overwritten before every sample and the launches queue behind a pause, so that the host's pace does not count; with
``--host`` there is no pause, and it does. With ``--sustained S`` a sample is one provider alone for S seconds, call after
call, at the clock that its own power leaves it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative, of the whole; gate, up and their product may each be rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
OURS = "ours"
WARM_UPS = 25  # the interpreter, too, is slower the first times


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every script has."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--dtype", choices=DTYPES, default=None, help="default: bf16 on a GPU, fp32 on the CPU")
    flags.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: shows that it runs")
    flags.add_argument("--rounds", type=int, default=None)
    flags.add_argument("--threads", type=int, default=None, help="of torch, on the CPU")
    flags.add_argument("--host", action="store_true", help="the host's pace counts: no pause before a sample, on a GPU")
    flags.add_argument("--sustained", type=float, metavar="S", help="seconds of one provider a sample, on a GPU")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", help="JSON file for the raw rows")
    return flags


def parse(flags: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    args = flags.parse_args(argv)
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    args.dtype = DTYPES[args.dtype or ("fp32" if args.device.type == "cpu" else "bf16")]
    if args.sustained is not None and (args.sustained <= 0 or args.host or args.device.type == "cpu"):
        flags.error("--sustained takes seconds over 0, on a GPU, without --host")
    args.rounds = args.rounds or (3 if args.quick else 8 if args.sustained else 30)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.threads or args.quick:
        torch.set_num_threads(args.threads or 1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    return args


def numbers(text: str) -> list[int]:
    """``64,256`` as a flag's value."""
    return [int(word) for word in text.split(",")]


def liger(device: torch.device):
    """Liger's swiglu module where it is installed and ``device`` a GPU, else None."""
    try:
        return importlib.import_module("liger_kernel.ops.swiglu") if device.type == "cuda" else None
    except ImportError:
        return None


def need_liger(device: torch.device):
    """The same; ImportError without it."""
    module = liger(device)
    if module is None:
        raise ImportError("liger_kernel is not installed, or there is no GPU")
    return module


def hold(name: str, got: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """The largest relative error; ArithmeticError where it is more than rounding."""
    worst = 0.0
    for value, wanted in zip(got, expected, strict=True):
        error = ((value.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[value.dtype]:
            raise ArithmeticError(f"{name}: relative error {error:.1e} over {TOLERANCE[value.dtype]:.0e}")
        worst = max(worst, error)
    return worst


def race(providers: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, dict]:
    """Times every provider once a round. Of each: ``us``, ``p10_us``, ``p90_us`` and, beside "ours", ``ratio``."""
    clock = _clock(args)
    for call in providers.values():
        for _ in range(WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(args.rounds):
        for name in random.sample(list(providers), len(providers)):
            times[name].append(clock(providers[name]))
    figures = {}
    for name, taken in times.items():
        ordered = sorted(taken)
        last = len(ordered) - 1
        figures[name] = {
            "us": statistics.median(taken),
            "p10_us": ordered[round(0.1 * last)],
            "p90_us": ordered[round(0.9 * last)],
        }
        if OURS in times and name != OURS:
            figures[name]["ratio"] = statistics.median(peer / own for peer, own in zip(taken, times[OURS]))
    return figures


def _clock(args: argparse.Namespace) -> Callable[[Callable[[], object]], float]:
    """What times a call."""
    if args.device.type == "cpu":
        return _cpu_sample
    if args.sustained:
        return lambda call: _sustained_sample(call, args.sustained)
    return _paced_sample if args.host else _gpu_sample


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


_flush: dict[int, torch.Tensor] = {}


def _gpu_sample(call: Callable[[], object]) -> float:
    _overwrite_l2()
    torch.cuda._sleep(4_000_000)  # some 2 ms: longer than any call takes to be queued
    return _between_events(call)


def _paced_sample(call: Callable[[], object]) -> float:
    _overwrite_l2()
    torch.cuda.synchronize()
    return _between_events(call)


def _sustained_sample(call: Callable[[], object], seconds: float) -> float:
    def repeated(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                call()

        return run

    once = _between_events(repeated(5)) / 5
    calls = math.ceil(seconds * 1e6 / once)
    repeated(math.ceil(calls / 3))()  # clocks follow the power
    return _between_events(repeated(calls)) / calls


def _overwrite_l2() -> None:
    device = torch.cuda.current_device()
    if device not in _flush:
        bytes_ = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        _flush[device] = torch.empty(bytes_, dtype=torch.uint8, device="cuda")
    _flush[device].zero_()


def _between_events(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def in_graphs(providers: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Each call as the replay of a CUDA graph; one that cannot be captured is left out with its reason."""
    replays: dict[str, Callable[[], object]] = {}
    for name, call in providers.items():
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            replays[name] = graph.replay
        except Exception as error:  # whatever a peer's own code raises
            torch.cuda.synchronize()
            print(f"{name} in a graph: left out, {type(error).__name__}: {str(error)[:300]}", flush=True)
    return replays


def peak_mb(call: Callable[[], object], device: torch.device) -> float | None:
    """What one call allocates at most, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def release(device: torch.device) -> None:
    """Gives cached memory back, so that the next shape finds it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def table(title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """Prints ``columns`` (key to format) of ``rows``; a missing value is a dash."""
    cells = [[format(row[key], spec) if key in row else "-" for key, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    print(f"\n{title}")
    for line in (list(columns), *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def print_means(rows: list[dict]) -> None:
    """The geometric mean of every provider's ratios, a way at a time."""
    for way, name in dict.fromkeys((row["way"], row["provider"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["way"], row["provider"]) == (way, name) and "ratio" in row]
        if ratios:
            print(f"{way}, {name}: geometric mean {geometric_mean(ratios):.3f} over {len(ratios)} shapes")


def write(args: argparse.Namespace, script: str, rows: list[dict]) -> None:
    """The raw rows with all that they depend on, to ``--out``."""
    if not args.out:
        return
    argv = [os.path.basename(word) if word == args.out else word for word in sys.argv[1:]]  # no machine's folders
    found = {"script": script, "argv": argv, "rows": rows, "environment": environment(args.device)}
    with open(args.out, "w") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


def environment(device: torch.device) -> dict[str, str | int | None]:
    import swiglu

    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "swiglu": swiglu.__version__,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    for name in ("liger-kernel", "quack-kernels", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts
