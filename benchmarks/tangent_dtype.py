"""What low-precision tangents cost and what they lose: bfloat16 and float16 against float32, the primal in float32.

    python benchmarks/tangent_dtype.py [--quick] [--models fc,lenet5,...] [--output FOLDER]

For each model, kind of perturbation and k: seconds of one gradient in units of backprop, all by turns in one run, and against
the float32 estimate with the same tangents the relative error of the directional derivatives, |d - d32| / |d32|, and the cosine
of the estimates; medians over seeds. Writes tangent_dtype.json and tangent_dtype.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]  # frog_cuda as it lies here, installed or not

import torch  # noqa: E402
from report_tables import Record, table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import frog_cuda as frog  # noqa: E402
from frog_cuda.experiments.models import FullyConnected, LeNet5, MLPMixer, ResNet18, VisionTransformer  # noqa: E402
from frog_cuda.experiments.timing import interleaved_medians  # noqa: E402

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
MODELS: dict[str, tuple[Any, int, tuple[int, int, int]]] = {  # class, batch, shape of an image
    "fc": (FullyConnected, 64, GREY),
    "lenet5": (LeNet5, 64, GREY),
    "resnet18": (ResNet18, 32, COLOUR),
    "vit": (VisionTransformer, 32, COLOUR),
    "mixer": (MLPMixer, 32, COLOUR),
}
KINDS: dict[str, dict[str, Any]] = {
    "activity": dict(perturb="activity"),
    "weight, LowRank(1)": dict(perturb="weight", tangents=frog.tangents.LowRank(1)),
}
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, inputs and targets; statistics of BatchNorm given, as the derivatives of each sample are its own only then."""
    make, batch, shape = MODELS[name]
    torch.manual_seed(0)
    return make(shape, 10).eval(), torch.randn(batch, *shape), torch.randint(0, 10, (batch,))


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def losses(model: nn.Module, kind: str, k: int, x: Tensor, y: Tensor, seeds: Sequence[int]) -> list[Record]:
    """Error of the derivatives and cosine of the estimates, for each low dtype."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LOW}
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    for seed in seeds:

        def estimate(dtype: torch.dtype | None, seed: int = seed) -> tuple[Tensor, Tensor]:
            fg = frog.ForwardGradient(model, loss_fn, k=k, seed=seed, tangent_dtype=dtype, **KINDS[kind])
            fg.derivatives(x, y)
            assert fg.last is not None
            return fg.last.directional_derivatives, flat(fg.gradients())

        d, g = estimate(None)
        for name, dtype in LOW.items():
            low_d, low_g = estimate(dtype)
            error = ((low_d - d).norm() / d.norm()).item()
            found[name].append((error, torch.nn.functional.cosine_similarity(low_g, g, dim=0).item()))
    return [
        {"dtype": name, "error": statistics.median(e for e, _ in pairs), "cosine": statistics.median(c for _, c in pairs)}
        for name, pairs in found.items()
    ]


def seconds(model: nn.Module, kind: str, ks: Sequence[int], x: Tensor, y: Tensor, quick: bool) -> dict[str, float]:
    """Median seconds: of backprop, and by "k dtype" of a forward gradient."""
    loss_fn = nn.CrossEntropyLoss(reduction="none")

    def backprop() -> None:
        model.zero_grad()
        loss_fn(model(x), y).mean().backward()

    def forward(fg: frog.ForwardGradient) -> None:
        model.zero_grad()
        fg(x, y)

    calls: dict[str, Any] = {"backprop": backprop}
    for k in ks:
        for name, dtype in {"float32": None, **LOW}.items():
            fg = frog.ForwardGradient(model, loss_fn, k=k, tangent_dtype=dtype, **KINDS[kind])
            calls[f"{k} {name}"] = lambda fg=fg: forward(fg)
    return interleaved_medians(calls, torch.device("cpu"), rounds=1 if quick else 8, limit=8.0, burst=1)


def measure(names: Sequence[str], ks: Sequence[int], quick: bool) -> list[Record]:
    records: list[Record] = []
    for name in names:
        model, x, y = problem(name)
        for kind in KINDS:
            taken = seconds(model, kind, ks, x, y, quick)
            for k in ks:
                records.append({"model": name, "kind": kind, "k": k, "dtype": "float32", "error": 0.0, "cosine": 1.0})
                records += [
                    {"model": name, "kind": kind, "k": k, **loss}
                    for loss in losses(model, kind, k, x, y, range(1 if quick else 3))
                ]
            for record in records:
                if (record["model"], record["kind"]) == (name, kind):
                    record["x backprop"] = taken[f"{record['k']} {record['dtype']}"] / taken["backprop"]
    return records


def wrong(record: Record) -> bool:
    """Whether a low-precision estimate is not that of float32 at all. Rounding bfloat16 at each of some dozen layers leaves
    errors of some percent; a wrong derivative has an error near 1."""
    return not (record["error"] < 0.25 and record["cosine"] > 0.9)


def markdown(machine: Record, records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        loss = ("", "") if r["dtype"] == "float32" else (f"{r['error']:.1e}", f"{r['cosine']:.5f}")
        rows.append([r["model"], r["kind"], str(r["k"]), r["dtype"], f"{r['x backprop']:.2f}", *loss])
    head = ["model", "perturbed", "k", "tangents", "x backprop", "error of d", "cosine"]
    return (
        "# Low-precision tangents\n\nWritten by `benchmarks/tangent_dtype.py`, whose head says what the columns are. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, frog_cuda {machine['frog_cuda']}.\n\n"
        f"{table(head, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round: shows that it runs, and no more")
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas; default %(default)s")
    parser.add_argument("--k", default="1,4,16", help="numbers of tangents; default %(default)s")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    options = parser.parse_args()
    names, ks = options.models.split(","), [int(k) for k in options.k.split(",")]
    if unknown := set(names) - set(MODELS):
        parser.error(f"--models: {', '.join(sorted(unknown))}; accepted are {', '.join(MODELS)}")
    from run import cpu_model

    machine = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "frog_cuda": frog.__version__,
    }
    records = measure(names, ks, options.quick)
    text = markdown(machine, records)
    print(text)
    bad = [r for r in records if wrong(r)]
    if bad:
        sys.exit(f"wrong: {bad}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "tangent_dtype.json").write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    (options.output / "tangent_dtype.md").write_text(text)


if __name__ == "__main__":
    main()
