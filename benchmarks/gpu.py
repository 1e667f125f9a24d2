"""What frog_cuda reaches on one GPU: operators against ceilings measured in the same run, whole gradients against backprop.

    python benchmarks/gpu.py                  on the GPU; writes benchmarks/results/gpu-<name>.json and prints one table
    python benchmarks/gpu.py --seconds 500    the same with time for all models
    python benchmarks/gpu.py --device cpu --tiny   the same program on small sizes: shows that it runs, says nothing of a GPU

Times are medians of device events (on the CPU: of a clock), after warm-up. A figure is bytes or FLOPs that the task needs at
least, over that time; the ceilings are a copy and matrix products of the same machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # frog_cuda as it lies here, installed or not

import alternatives  # noqa: E402
import cases  # noqa: E402
import torch  # noqa: E402
from problems import Problem  # noqa: E402
from torch import Tensor  # noqa: E402

import frog_cuda as frog  # noqa: E402
from frog_cuda import ops  # noqa: E402

Row = dict[str, Any]


class Machine:
    """A device, and how time is taken on it."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.rounds = 3 if tiny else 15

    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"

    def seconds(self, fn: Callable[[], object], *, clock: bool = False) -> float:
        """Median time of one call, of so many as fit half a second; by the clock where ``fn`` waits for the result itself."""
        fn()
        self.wait()
        once = _clock(lambda: (fn(), self.wait()))
        rounds = max(3, min(self.rounds, int(0.5 / once)))
        if clock or self.device.type != "cuda":
            return statistics.median(_clock(fn) for _ in range(rounds))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        torch.cuda.synchronize()
        for start, end in events:
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, fn: Callable[[], object]) -> int:
        """Bytes allocated at most during a call, beyond what there was before; 0 where that is not known."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def measured(self, fn: Callable[[], object]) -> Row:
        """Time and peak memory of a call, or why it failed, so that the rest is measured all the same."""
        try:
            return {"seconds": self.seconds(fn), "peak_bytes": self.peak(fn)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)


def _clock(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


# ---- ceilings


def ceilings(m: Machine) -> dict[str, float]:
    """Bytes/s of a copy (read and written), FLOP/s of bf16 and TF32 matrix products, on random data."""
    n = 1 << 12 if m.tiny else 1 << 29
    a, b = m.rand(n), torch.empty(n, device=m.device)
    found = {"copy": 8 * n / m.seconds(lambda: b.copy_(a))}
    size = 64 if m.tiny else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        x, y = m.rand(size, size, dtype=dtype), m.rand(size, size, dtype=dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        found[name] = 2 * size**3 / m.seconds(lambda x=x, y=y: x @ y)  # type: ignore[misc]
        torch.backends.cuda.matmul.allow_tf32 = before
    return found


# ---- operators


def operators(m: Machine) -> Iterator[Row]:
    """One row for each: what it needs at least, and in which ceiling it is counted."""

    def row(name: str, fn: Callable[[], object], *, bytes_: float = 0, flops: float = 0, ceiling: str = "copy") -> Row:
        found = m.measured(fn)
        rate = None if "error" in found else (bytes_ if ceiling == "copy" else flops) / found["seconds"]
        return {"operator": name, "rate": rate, "ceiling": ceiling, **found}

    for k in (4, 16):
        width = 64 if m.tiny else 4096
        rows = 8 if m.tiny else max(1, (1 << 30) // (2 * (k + 1) * 4 * width))  # 1 GiB read and written
        x, dx, one = m.rand(rows, width), m.rand(k, rows, width), torch.ones(width, device=m.device)
        size = 2 * 4 * x.numel() * (k + 1)
        yield row(f"gelu k={k}", partial(ops.pointwise_jvp, x, dx, function="gelu"), bytes_=size)
        yield row(f"softmax k={k}", partial(ops.softmax_jvp, x, dx, -1), bytes_=size)
        norm = partial(ops.normalization_jvp, x, dx, one, None, one, groups=rows, weight_groups=1)
        yield row(f"layer norm k={k}", norm, bytes_=size)
    n = 1 << 14 if m.tiny else 100_000_000
    state, c = torch.tensor([1, 0], device=m.device), m.rand(16)
    for name in ("rademacher", "normal"):
        yield row(f"sample {name} k=4", partial(ops.sample_tangents, state, 4, n, distribution=name), bytes_=16 * n)
        yield row(f"combine {name} k=16", partial(ops.tangent_combine, state, c, n, distribution=name), bytes_=4 * n)
        gram = partial(ops.tangent_gram, state, 16, n, distribution=name)
        yield row(f"gram {name} k=16", gram, flops=2 * 256 * n, ceiling="bf16")
    for k in (16, 64):
        v = m.rand(k, 2 * k).double()
        project = partial(ops.cholesky_project, v @ v.T, m.rand(k, 1).double())
        yield row(f"cholesky_project k={k}", project, bytes_=8 * k * k)
    size, batch, k = (64, 8, 4) if m.tiny else (4096, 512, 16)
    for dtype in (torch.bfloat16, torch.float32):
        x, w = m.rand(batch, size, dtype=dtype), m.rand(size, size, dtype=dtype)
        for name in ("rademacher", "normal"):
            linear = partial(ops.linear_jvp, x, None, w, state=state, k=k, distribution=name, weight_offset=0)
            flops = 2 * batch * size * size * (k + 1)
            yield row(f"linear, {name} weights, {dtype}", linear, flops=flops, ceiling="bf16")
    side, channels, batch, k = (6, 8, 2, 2) if m.tiny else (28, 256, 32, 4)
    for dtype in (torch.bfloat16, torch.float32):
        x = m.rand(batch, channels, side, side, dtype=dtype)
        moved = torch.empty(k, *x.shape, dtype=dtype, device=m.device)
        places = dict(kernel=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1])
        flops = 2 * batch * side**2 * channels**2 * 9 * k
        for name in ("rademacher", "normal"):
            convolve = partial(ops.sampled_convolution_, moved, x, state, distribution=name, add=False, **places)
            yield row(f"convolution 3x3, {name} weights, {dtype}", convolve, flops=flops, ceiling="bf16")
    b, h, t, d = (1, 2, 64, 16) if m.tiny else (4, 16, 4096, 64)
    for k in (1, 4):
        q, key, value = (m.rand(b, h, t, d, dtype=torch.bfloat16) for _ in range(3))
        dq, dkey, dvalue = (m.rand(k, b, h, t, d, dtype=torch.bfloat16) for _ in range(3))
        # the value: 2 products of T x T x D; each tangent: dq k^T, q dk^T, (p ds) v, p dv
        flops = 2 * b * h * t * t * d * (2 + 4 * k)
        attention = partial(ops.attention_jvp, q, dq, key, dkey, value, dvalue)
        yield row(f"attention k={k}", attention, flops=flops, ceiling="bf16")


# ---- whole gradients


NETS, TINY = ["fc1024", "resnet18-128", "vit-128", "gpt2-small", "fc256", "fc4096"], ["fc16", "tiny-resnet18", "tiny-gpt"]
KS, TINY_KS = (1, 2, 4, 16), (1, 2)
#: relative error of an estimate
BOUND = cases.BOUND_BF16


def variant(kind: type[cases.Method], name: str, **options: Any) -> type[cases.Method]:
    """The same method with other options of ``ForwardGradient``."""
    return type(kind.__name__, (kind,), {"name": f"{kind.name}{name}", "options": {**kind.options, **options}})  # type: ignore[attr-defined]


class GraphedBackprop(cases.Backprop):
    """Captured once, replayed at each call."""

    name = "backprop, CUDA graph"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super().__call__()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        problem.model.zero_grad()
        with torch.cuda.graph(self.graph):
            self.evaluate().backward()

    def __call__(self) -> None:
        self.graph.replay()


Plan = tuple[str, type[cases.Method], int]
#: of the first round: gradients that docs/gpu-status.md has aims for
AIMED_AT = (cases.Activity, cases.ActivityBf16)
FIRST_KS = (1, 4, 16)


def plans(names: Sequence[str], ks: Sequence[int], gpu: bool, compiles: bool) -> list[Plan]:
    """Model, method and k in the order of measuring: time may run out, so what is aimed at comes first, for every model.

    JAX comes last, and compiles a function for each k: its threads and its memory stay until the process ends.
    """

    def ours(kinds: Sequence[type[cases.ForwardGradient]], ks: Iterable[int]) -> Iterator[tuple[type[cases.Method], int]]:
        for k in ks:
            for kind in kinds:
                yield kind, k
                if gpu:
                    yield variant(kind, ", CUDA graph", cuda_graph=True), k

    first: list[Plan] = []
    more: list[Plan] = []
    compiled: list[Plan] = []
    last: list[Plan] = []
    for name in names:
        first.append((name, cases.Backprop, 0))
        first += [(name, GraphedBackprop, 0)] if gpu else []
        first += [(name, *plan) for plan in ours(AIMED_AT, [k for k in ks if k in FIRST_KS])]
        more += [(name, *plan) for plan in ours(AIMED_AT, [k for k in ks if k not in FIRST_KS])]
        more += [(name, *plan) for plan in ours((cases.WeightRademacher, cases.WeightLowRank), ks)]
        more.append((name, cases.CheckpointedBackprop, 0))
        more += [(name, alternatives.VmapJvp, k) for k in ks]
        if compiles:
            compiled.append((name, alternatives.compiled(cases.Backprop), 0))
        if name.startswith("fc"):
            last.append((name, alternatives.JaxGrad, 0))
            last += [(name, alternatives.JaxVmapJvp, k) for k in ks]
    return first + more + compiled + last


def gradients(m: Machine, deadline: float, compiles: bool) -> Iterator[Row]:
    """Products in TF32 on both sides. Rows that the time did not suffice for are missing."""
    names, ks = (TINY, TINY_KS) if m.tiny else (NETS, KS)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    problem, base = None, dict[str, float]()
    for name, kind, k in plans(names, ks, m.device.type == "cuda", compiles):
        if time.monotonic() > deadline:
            return
        if problem is None or problem.name != name:
            problem = Problem(name, device=m.device)
        found = gradient(m, problem, kind, k)
        if kind is cases.Backprop and "seconds" in found:
            base[name] = found["seconds"]
        ratio = found["seconds"] / base[name] if "seconds" in found and name in base else None
        yield {"model": name, "method": kind.name, "k": k, "ratio": ratio, **found}


def gradient(m: Machine, problem: Problem, kind: type[cases.Method], k: int) -> Row:
    """Time, peak memory, and the error of the gradient against backprop, where k tangents of all parameters fit into memory."""
    if kind.stores_tangents and 4 * k * problem.n > 1 << 33:
        return {"left_out": f"k tangents would take {4 * k * problem.n / 2**30:.0f} GiB"}
    found: Row = {}
    try:
        method = kind(problem, k) if k else kind(problem)
        found = {"seconds": m.seconds(method, clock=method.name.startswith("JAX")), "peak_bytes": m.peak(method)}
        if isinstance(method, cases.ForwardGradient) and k * problem.n < 1 << 28:
            del method  # a captured graph keeps its memory
            found["gradient_error"] = gradient_error(problem, kind, k)
            if not found["gradient_error"] <= BOUND:
                found["wrong"] = f"relative error {found['gradient_error']:.3g}, bound {BOUND}"
    except (cases.Unsuitable, torch.OutOfMemoryError) as error:
        why = str(error).splitlines()[0][:300]
        found |= {"unchecked": why} if "seconds" in found else {"left_out": why}
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        problem.restore()
    return found


def gradient_error(problem: Problem, kind: type[cases.Method], k: int) -> float:
    """Of a call in full float32, for what TF32 rounds, kinks of ReLUs multiply; the median of three if the first is large.

    The method is made anew: a graph replays products in the precision that it was captured in.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn) if problem.x.is_cuda else ()
    before = [s.allow_tf32 for s in switches]
    for s in switches:
        s.allow_tf32 = False
    try:
        method = kind(problem, k)
        assert isinstance(method, cases.ForwardGradient)
        for _ in range(2 if method.options.get("cuda_graph") else 0):  # the first call warms up, the second captures
            method()
        errors = [cases.ForwardGradient._error(method)]
        if not errors[0] <= BOUND:
            errors += [cases.ForwardGradient._error(method) for _ in range(2)]
        return statistics.median(e if e == e else float("inf") for e in errors)
    finally:
        for s, allowed in zip(switches, before, strict=True):
            s.allow_tf32 = allowed


# ---- the command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see the program run")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no gradient after so long; default %(default)s")
    parser.add_argument("--compile", action="store_true", help="backprop under torch.compile as well: minutes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available; --device cpu --tiny shows that the program runs")
    machine = Machine(args.device, args.tiny)
    top = ceilings(machine)
    result: Row = {"device": machine.name(), "frog_cuda": frog.build_info(), "cuda": torch.version.cuda, "ceilings": top}
    result |= {"operators": [], "gradients": []}
    file = args.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine.name().lower())}.json"
    deadline = time.monotonic() + args.seconds
    try:
        for kind, rows in (("operators", operators(machine)), ("gradients", gradients(machine, deadline, args.compile))):
            for row in rows:
                result[kind].append(row)
                file.write_text(json.dumps(result, indent=1))  # what was measured stays, whatever happens next
    finally:
        print(table(result), flush=True)
    sys.exit(any("error" in row or "wrong" in row for kind in ("operators", "gradients") for row in result[kind]))


def table(result: Row) -> str:
    top = result["ceilings"]
    lines = [f"{result['device']}, torch {result['frog_cuda']['torch']}, CUDA {result['cuda']}"]
    lines += [
        f"ceilings: copy {top['copy'] / 1e12:.2f} TB/s, bf16 {top['bf16'] / 1e12:.0f}, TF32 {top['tf32'] / 1e12:.0f} TFLOP/s"
    ]
    lines += ["", f"{'operator':44} {'ms':>9} {'of ceiling':>11} {'peak MiB':>9}"]
    for row in result["operators"]:
        share = "" if row["rate"] is None else f"{row['rate'] / top[row['ceiling']]:6.1%} {row['ceiling']:4}"
        lines.append(f"{row['operator']:44} {_cells(row, share)}")
    lines += ["", f"{'model':14} {'method':44} {'k':>3} {'ms':>9} {'backprops':>11} {'peak MiB':>9}"]
    models = list(dict.fromkeys(row["model"] for row in result["gradients"]))
    for row in sorted(result["gradients"], key=lambda row: models.index(row["model"])):  # measured in several rounds
        ratio = "" if row["ratio"] is None else f"{row['ratio']:11.2f}"
        lines.append(f"{row['model']:14} {row['method']:44} {row['k']:3} {_cells(row, ratio)}")
    return "\n".join(lines)


def _cells(row: Row, share: str) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    wrong = f"  wrong: {row['wrong']}" if "wrong" in row else ""
    return f"{row['seconds'] * 1e3:9.3f} {share} {row['peak_bytes'] >> 20:9}{wrong}"


if __name__ == "__main__":
    main()
