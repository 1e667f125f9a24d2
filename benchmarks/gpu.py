"""What frog_cuda reaches on one GPU: operators against ceilings measured in the same run, whole gradients against backprop.

    python benchmarks/gpu.py                  on the GPU; writes benchmarks/results/gpu-<name>.json and prints one table
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # frog_cuda as it lies here, installed or not

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frog_cuda as frog
from frog_cuda import ops
from frog_cuda.experiments import models

Row = dict[str, Any]


class Machine:
    """A device, and how time is taken on it."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.rounds = 3 if tiny else 15

    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"

    def seconds(self, fn: Callable[[], object], rounds: int | None = None) -> float:
        """Median time of one call."""
        rounds = rounds or self.rounds
        for _ in range(2):
            fn()
        if self.device.type != "cuda":
            return statistics.median(_clock(fn) for _ in range(rounds))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        torch.cuda.synchronize()
        for start, end in events:
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

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
    b, h, t, d = (1, 2, 64, 16) if m.tiny else (4, 16, 4096, 64)
    for k in (1, 4):
        q, key, value = (m.rand(b, h, t, d, dtype=torch.bfloat16) for _ in range(3))
        dq, dkey, dvalue = (m.rand(k, b, h, t, d, dtype=torch.bfloat16) for _ in range(3))
        # the value: 2 products of T x T x D; each tangent: dq k^T, q dk^T, (p ds) v, p dv
        flops = 2 * b * h * t * t * d * (2 + 4 * k)
        attention = partial(ops.attention_jvp, q, dq, key, dkey, value, dvalue)
        yield row(f"attention k={k}", attention, flops=flops, ceiling="bf16")


# ---- whole gradients


def nets(m: Machine) -> Iterator[tuple[str, nn.Module, Tensor]]:
    for width in (16,) if m.tiny else (256, 1024, 4096):
        net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        yield f"FC {width}", net.to(m.device), m.rand(4 if m.tiny else 64, 784)
    if not m.tiny:
        yield "ResNet18", models.ResNet18().to(m.device), m.rand(128, 3, 32, 32)
        yield "ViT", models.VisionTransformer().to(m.device), m.rand(128, 3, 32, 32)


def gradients(m: Machine) -> Iterator[Row]:
    for name, model, x in nets(m):
        target = torch.randint(10, (len(x),), device=m.device)

        def row(method: str, k: int, fn: Callable[[], object], backprop: float | None, name: str = name) -> Row:
            found = m.measured(fn)
            ratio = None if backprop is None or "error" in found else found["seconds"] / backprop
            return {"model": name, "method": method, "k": k, "ratio": ratio, **found}

        base = row("backprop", 0, partial(backprop, model, x, target), None)
        base["ratio"] = 1.0
        yield base
        if m.device.type == "cuda":
            yield row("backprop, CUDA graph", 0, _graphed(model, x, target), base.get("seconds"))
        loss = nn.CrossEntropyLoss(reduction="none")
        for perturb in ("activity", "weight"):
            for k in (1, 2, 4, 16):
                for graph in (False, True)[: 1 + (m.device.type == "cuda")]:
                    options = {"per_sample": not name.startswith("ResNet"), "cuda_graph": graph}
                    fg = frog.ForwardGradient(model, loss, k=k, perturb=perturb, **options)
                    step = partial(forward, fg, x, target)
                    yield row(f"{perturb}, CUDA graph" if graph else perturb, k, step, base.get("seconds"))
        if name.startswith("FC"):
            for k in (1, 4, 16):
                yield row("vmap(jvp)", k, partial(_vmap_jvp, model, x, target, k), base.get("seconds"))


def backprop(model: nn.Module, x: Tensor, target: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), target).backward()


def forward(fg: frog.ForwardGradient, x: Tensor, target: Tensor) -> None:
    fg.model.zero_grad()
    fg(x, target)


def _graphed(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backprop(model, x, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with torch.cuda.graph(graph):
        F.cross_entropy(model(x), target).backward()
    return graph.replay


def _vmap_jvp(model: nn.Module, x: Tensor, target: Tensor, k: int) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        tangents = {name: torch.randn(k, *p.shape, device=p.device) for name, p in parameters.items()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, values, x), target)

        value, d = torch.func.vmap(lambda v: torch.func.jvp(loss, (parameters,), (v,)))(tangents)
        for name, p in model.named_parameters():
            p.grad = ((d / k) @ tangents[name].flatten(1)).view_as(p)
    return value


# ---- the command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see the program run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available; --device cpu --tiny shows that the program runs")
    machine = Machine(args.device, args.tiny)
    top = ceilings(machine)
    result: Row = {"device": machine.name(), "frog_cuda": frog.build_info(), "cuda": torch.version.cuda, "ceilings": top}
    result |= {"operators": [], "gradients": []}
    file = args.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine.name().lower())}.json"
    for kind, rows in (("operators", operators(machine)), ("gradients", gradients(machine))):
        for row in rows:
            result[kind].append(row)
            file.write_text(json.dumps(result, indent=1))  # what was measured stays, whatever happens next
    print(table(result))
    sys.exit(any("error" in row for kind in ("operators", "gradients") for row in result[kind]))


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
    lines += ["", f"{'model':10} {'method':22} {'k':>3} {'ms':>9} {'backprops':>11} {'peak MiB':>9}"]
    for row in result["gradients"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:11.2f}"
        lines.append(f"{row['model']:10} {row['method']:22} {row['k']:3} {_cells(row, ratio)}")
    return "\n".join(lines)


def _cells(row: Row, share: str) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    return f"{row['seconds'] * 1e3:9.3f} {share} {row['peak_bytes'] >> 20:9}"


if __name__ == "__main__":
    main()
