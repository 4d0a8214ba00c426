"""The forward beside what a PyTorch user would take instead, on one GPU, in one process.

usage: python benches/peers.py [--m 512,2048,8192] [--kn 2048x8192,4096x14336] [--providers ours,cublas_gemm,...]
                               [--mode eager,graph] [--rounds 40] [--compile-mode MODE] [--out FILE.json]

Protocol: random bf16 data; input sets that together exceed three times the L2 are used in turn; every provider is
held to float64 first; a sample is about a millisecond of launches queued behind a pause of the GPU, with no wait in
between; every round times every provider once, in random order; a figure is the median of the ratios of a round.
`eager` calls from Python, `graph` replays the same calls from a CUDA graph. A ratio over 1 means that we are faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import signal
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

DTYPE = torch.bfloat16
TOLERANCE = 2.0e-3
# A provider that rounds gate and up to bf16 before the activation may be off by more than one rounding.
TOLERANCE_TWO_STEPS = 6.0e-3
SAMPLE_US = 1000.0
SHAPES = [(2048, 8192), (4096, 11008), (4096, 14336), (3584, 18944), (8192, 28672)]


# ---- Triton peers ----


@triton.jit
def gate_kernel(pre, z, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(pre + row * 2 * n + column, mask=inside).to(tl.float32)
    up = tl.load(pre + row * 2 * n + n + column, mask=inside).to(tl.float32)
    tl.store(z + row * n + column, (gate * tl.sigmoid(gate) * up).to(z.dtype.element_ty), mask=inside)


def triton_gate(pre, z):
    m, n = z.shape
    gate_kernel[(m, triton.cdiv(n, 1024))](pre, z, n, BLOCK=1024)


FEW_TOKENS = 64


def dual_configs():
    blocks = [(128, 128, 64, 3, 8), (128, 128, 64, 4, 8), (128, 128, 32, 4, 8), (128, 64, 64, 4, 4), (128, 64, 64, 4, 8),
              (128, 64, 128, 3, 8), (64, 128, 64, 4, 4), (64, 128, 64, 4, 8), (256, 64, 64, 3, 8), (256, 64, 64, 4, 8),
              (16, 32, 128, 5, 4), (16, 32, 256, 4, 4), (16, 64, 128, 4, 4), (16, 64, 256, 3, 4), (16, 64, 128, 5, 8),
              (16, 128, 64, 5, 4), (16, 128, 128, 3, 8), (64, 32, 128, 5, 4), (64, 64, 128, 3, 4), (64, 64, 64, 6, 4)]  # fmt: skip
    return [
        triton.Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, num_stages=stages, num_warps=warps)
        for bm, bn, bk, stages, warps in blocks
    ]


def worth_trying(configs, named_args, **_):
    """Tiles of few tokens for few tokens, the others for many."""
    m = named_args["m"]
    fits = (lambda bm: bm == 16) if m <= 16 else (lambda bm: bm <= 64) if m <= FEW_TOKENS else (lambda bm: bm >= 64)
    return [config for config in configs if fits(config.kwargs["BM"])]


@triton.autotune(configs=dual_configs(), key=["m", "n", "k"], prune_configs_by={"early_config_prune": worth_trying})
@triton.jit
def dual_kernel(x, w, z, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    # Blocks of GROUP row tiles walk over the columns together, so that weights are read from L2.
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    rows_here = min(tiles_m - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    tile_m, tile_n = group * GROUP + within % rows_here, within // rows_here
    rows, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns past the end compute what nobody stores.
    x_at = x + (rows % m).to(tl.int64)[:, None] * k + depth[None, :]
    gate_at = w + (columns % n).to(tl.int64)[None, :] * k + depth[:, None]
    up_at = gate_at + n.to(tl.int64) * k
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, k // BK):
        tile = tl.load(x_at)
        gate = tl.dot(tile, tl.load(gate_at), gate)
        up = tl.dot(tile, tl.load(up_at), up)
        x_at += BK
        gate_at += BK
        up_at += BK
    out = (gate * tl.sigmoid(gate) * up).to(z.dtype.element_ty)
    z_at = z + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(z_at, out, mask=(rows[:, None] < m) & (columns[None, :] < n))


def triton_dual(x, w, z):
    (m, k), n = x.shape, z.shape[1]
    assert k % 128 == 0, "the kernel has no edge along k"
    dual_kernel[lambda c: (triton.cdiv(m, c["BM"]) * triton.cdiv(n, c["BN"]),)](x, w, z, m, n, k)


# ---- providers: a function of an input set that leaves its result in `z` or returns it ----


def ours_static(m, k, n, args):
    return ours(m, k, n, args, static_weights=True)


def ours(m, k, n, args, static_weights=False):
    import swiglu

    plan = swiglu.prepare(k, n, dtype=DTYPE, device="cuda", layout="packed_nk", static_weights=static_weights)
    print(f"  ours runs {plan.config(m)}", flush=True)
    return lambda s: plan(s.x, s.gate, s.up, out=s.z)


def ours_preact(m, k, n, args):
    from swiglu._op import run_saving

    return lambda s: run_saving(s.x, s.gate, s.up, None, None)[0]


def cublas_gemm(m, k, n, args):
    return lambda s: torch.mm(s.x, s.packed_t, out=s.pre)


def cublas_triton_gate(m, k, n, args):
    def run(s):
        torch.mm(s.x, s.packed_t, out=s.pre)
        triton_gate(s.pre, s.z)
        return s.z

    return run


def cublas_liger_gate(m, k, n, args):
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda s: LigerFusedGateUpSiLUMulFunction.apply(torch.mm(s.x, s.packed_t, out=s.pre))


def triton_dual_gemm(m, k, n, args):
    def run(s):
        triton_dual(s.x, s.packed, s.z)
        return s.z

    return run


def torch_compile(m, k, n, args):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up), mode=args.compile_mode)
    return lambda s: compiled(s.x, s.gate, s.up)


def liger_silu_mul(m, k, n, args):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda s: LigerSiLUMulFunction.apply(F.linear(s.x, s.gate), F.linear(s.x, s.up))


def liger_gemm_swiglu(m, k, n, args):
    from liger_kernel.ops.mlp import gemm_swiglu

    def run(s):
        out = gemm_swiglu(s.x[None], s.gate, s.up, 1.0, False)
        return out[0] if isinstance(out, tuple) else out

    return run


def quack_gated(m, k, n, args):
    from quack.gemm_interface import gemm_gated

    def run(s):
        gemm_gated(s.x, s.interleaved_t, activation="swiglu", postact_out=s.z, store_preact=False)
        return s.z

    return run


def quack_gated_preact(m, k, n, args):
    from quack.gemm_interface import gemm_gated

    def run(s):
        gemm_gated(s.x, s.interleaved_t, activation="swiglu", postact_out=s.z, preact_out=s.pre)
        return s.z

    return run


PROVIDERS = {
    f.__name__: f
    for f in (
        ours,
        ours_static,
        ours_preact,
        cublas_gemm,
        cublas_triton_gate,
        cublas_liger_gate,
        triton_dual_gemm,
        torch_compile,
        liger_silu_mul,
        liger_gemm_swiglu,
        quack_gated,
        quack_gated_preact,
    )  # fmt: skip
}
GEMM_ALONE = "cublas_gemm"


class InputSet:
    """One set of operands; QuACK wants gate and up rows in turn."""

    def __init__(self, m, k, n, interleave):
        self.x = torch.randn(m, k, device="cuda", dtype=DTYPE)
        self.packed = torch.randn(2 * n, k, device="cuda", dtype=DTYPE).div_(math.sqrt(k))
        self.packed_t = self.packed.t()
        self.gate, self.up = self.packed[:n], self.packed[n:]
        if interleave:
            self.interleaved_t = torch.stack([self.gate, self.up], 1).reshape(2 * n, k).t()
        self.pre = torch.empty(m, 2 * n, device="cuda", dtype=DTYPE)
        self.z = torch.empty(m, n, device="cuda", dtype=DTYPE)


def error_of(name, run, s):
    """Relative error against float64 on up to 256 rows, every column, from poisoned memory."""
    s.z.fill_(torch.nan)
    s.pre.fill_(torch.nan)
    got = run(s)
    m, n = s.z.shape
    rows = torch.linspace(0, m - 1, min(m, 256), device="cuda").long()
    x = s.x[rows].double()
    if name == GEMM_ALONE:
        got, expected = got[rows].double(), torch.cat([x @ part.double().t() for part in (s.gate, s.up)], 1)
    else:
        got = got.reshape(m, n)[rows].double()
        expected = F.silu(x @ s.gate.double().t()) * (x @ s.up.double().t())
    # Of the whole, and of the worst row: a wrong tile hides in neither.
    difference = got - expected
    worst = (difference.norm(dim=1) / expected.norm(dim=1)).max()
    return (difference.norm() / expected.norm()).item(), worst.item()


class Subject:
    """A provider that was found right, and how it is timed."""

    def __init__(self, name, run, sets):
        self.name, self.run, self.sets, self.turn = name, run, sets, 0
        self.graph = None
        for _ in range(3):
            self.step()
        torch.cuda.synchronize()
        start, end = events()
        torch.cuda._sleep(2_000_000)
        host = time.perf_counter()
        start.record()
        for _ in range(10):
            self.step()
        end.record()
        self.host_us = (time.perf_counter() - host) * 1e5
        end.synchronize()
        self.count = max(1, round(SAMPLE_US / (start.elapsed_time(end) * 100)))
        self.times = {"eager": [], "graph": []}

    def step(self):
        self.run(self.sets[self.turn % len(self.sets)])
        self.turn += 1

    def capture(self):
        # Whole turns, so that a replay goes on where the last one ended.
        self.graph_count = math.ceil(self.count / len(self.sets)) * len(self.sets)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.graph_count):
                self.step()
        graph.replay()
        torch.cuda.synchronize()
        self.graph = graph

    def sample(self, mode, pause_us):
        start, end = events()
        torch.cuda._sleep(int(pause_us * 1900))
        start.record()
        if mode == "eager":
            for _ in range(self.count):
                self.step()
        else:
            self.graph.replay()
        end.record()
        return start, end


def events():
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def race(subjects, modes, rounds):
    """Fills `times`, microseconds a call, one per round."""
    # Long enough for the slowest caller to queue a whole sample; the same for all, so that clocks are too.
    pause = {"eager": min(4000.0, 1.2 * max(s.host_us * s.count for s in subjects)), "graph": 100.0}
    warm_up = 3
    for round_ in range(rounds + warm_up):
        runs = [(s, mode) for s in subjects for mode in modes if mode == "eager" or s.graph]
        random.shuffle(runs)
        taken = [(s, mode, s.sample(mode, pause[mode])) for s, mode in runs]
        torch.cuda.synchronize()
        for s, mode, (start, end) in taken:
            if round_ >= warm_up:
                calls = s.count if mode == "eager" else s.graph_count
                s.times[mode].append(start.elapsed_time(end) * 1e3 / calls)


def quantiles(values):
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.1, 0.9)]


def measure(m, k, n, args):
    """Rows of one shape."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    set_bytes = 2 * (m * k + 2 * n * k + m * n)
    sets = [
        InputSet(m, k, n, any("quack" in p for p in args.providers))
        for _ in range(max(2, math.ceil(3 * l2 / set_bytes)))
    ]
    subjects, rows = [], []
    for name in args.providers:
        row = {"m": m, "k": k, "n": n, "provider": name, "sets": len(sets)}
        rows.append(row)
        began = time.perf_counter()
        try:
            run = PROVIDERS[name](m, k, n, args)
            errors = [error_of(name, run, s) for s in (sets[0], sets[-1])]
            row["error"], row["worst_row_error"] = (max(e[i] for e in errors) for i in (0, 1))
            limit = TOLERANCE if name in ("ours", "ours_static", "ours_preact", GEMM_ALONE) else TOLERANCE_TWO_STEPS
            if not row["worst_row_error"] <= limit:
                raise ArithmeticError(f"relative error {row['worst_row_error']:.1e} over {limit:.0e}")
            subject = Subject(name, run, sets)
        except Exception as error:  # a peer that is missing or fails is reported, and the others go on
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
            print(f"  {name}: {row['failed'].splitlines()[0]}", flush=True)
            continue
        row["setup_s"] = round(time.perf_counter() - began, 1)
        print(f"  {name}: error {row['error']:.1e}, set up in {row['setup_s']} s", flush=True)
        if "graph" in args.mode:
            try:
                subject.capture()
            except Exception as error:
                row["graph_failed"] = f"{type(error).__name__}: {error}"[:400]
                print(f"  {name} in a graph: {row['graph_failed'].splitlines()[0]}", flush=True)
                torch.cuda.synchronize()
        subjects.append(subject)
    if subjects:
        race(subjects, args.mode, args.rounds)
    base = next((s for s in subjects if s.name == "ours"), None)
    for s in subjects:
        row = next(row for row in rows if row["provider"] == s.name)
        row["host_us"], row["launches"] = round(s.host_us, 2), s.count
        for mode in args.mode:
            if not s.times[mode]:
                continue
            us = statistics.median(s.times[mode])
            row[mode] = {"us": us, "p10_p90_us": quantiles(s.times[mode]), "tflops": 4e-6 * m * n * k / us}
            if base and base.times[mode]:
                ratios = [peer / own for peer, own in zip(s.times[mode], base.times[mode])]
                row[mode] |= {"ratio": statistics.median(ratios), "p10_p90_ratio": quantiles(ratios)}
    return rows


def table(rows, mode, providers):
    """Ours in microseconds, then each peer's time over ours."""
    others = [p for p in providers if p != "ours"]
    print(f"\n{mode}: ours in us; the others as their time over ours (over 1: we are faster)")
    print(f"{'M':>6} {'K':>6} {'N':>6} {'ours':>9} " + " ".join(f"{p:>18}" for p in others))
    for m, k, n in dict.fromkeys((r["m"], r["k"], r["n"]) for r in rows):
        of = {r["provider"]: r.get(mode) for r in rows if (r["m"], r["k"], r["n"]) == (m, k, n)}
        cells = [f"{of[p]['ratio']:18.3f}" if of.get(p) and "ratio" in of[p] else f"{'-':>18}" for p in others]
        own = f"{of['ours']['us']:9.1f}" if of.get("ours") else f"{'-':>9}"
        print(f"{m:6} {k:6} {n:6} {own} " + " ".join(cells))
    for p in others:
        ratios = [r[mode]["ratio"] for r in rows if r["provider"] == p and "ratio" in r.get(mode, {})]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"  geometric mean, {p}: {mean:.3f} over {len(ratios)} shapes")


def versions():
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    for name in ("swiglu", "liger_kernel", "quack"):
        try:
            module = __import__(name)
            found[name] = getattr(module, "__version__", "installed")
        except Exception as error:
            found[name] = f"not importable: {type(error).__name__}: {error}"[:200]
    return found


def parse(argv):
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=words, default=["512", "2048", "8192"])
    parser.add_argument("--kn", type=words, default=[f"{k}x{n}" for k, n in SHAPES], help="KxN,...")
    parser.add_argument("--providers", type=words, default=list(PROVIDERS))
    parser.add_argument("--without", type=words, default=[], help="providers to leave out")
    parser.add_argument("--mode", type=words, default=["eager", "graph"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--compile-mode", default="max-autotune-no-cudagraphs", help="torch.compile's mode")
    parser.add_argument("--out", help="JSON file, written after every shape")
    args = parser.parse_args(argv)
    unknown = [p for p in args.providers + args.without if p not in PROVIDERS] + [
        x for x in args.mode if x not in ("eager", "graph")
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; providers are {', '.join(PROVIDERS)}, modes eager and graph")
    args.providers = [p for p in args.providers if p not in args.without]
    args.shapes = [(int(m), *map(int, kn.split("x"))) for kn in args.kn for m in args.m]
    return args


def main(argv):
    args = parse(argv)
    torch.manual_seed(0)
    random.seed(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    gpu, _, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().partition(", ")
    report = {
        "gpu": gpu,
        "driver": driver,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benches/peers.py", *argv]),
        "versions": versions(),
        "rows": [],
    }
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}), flush=True)
    # A run that is cut off by a time limit still shows what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for m, k, n in args.shapes:
            print(f"M {m} K {k} N {n}", flush=True)
            with torch.no_grad():
                report["rows"] += measure(m, k, n, args)
            torch.cuda.empty_cache()
            if args.out:
                with open(args.out, "w") as file:
                    json.dump(report, file, indent=1)
    finally:
        for mode in args.mode:
            table(report["rows"], mode, args.providers)


if __name__ == "__main__":
    main(sys.argv[1:])
