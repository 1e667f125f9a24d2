"""What low-precision tangents lose: bfloat16, float16 and float8 (e4m3) against float32, the primal in float32.

    python benchmarks/tangent_dtype.py [--models fc1024,vit,...] [--k 1,4,16] [--output FOLDER]

For each model, kind of perturbation and k, against the float32 estimate with the same tangents: the relative error of the
directional derivatives, |d - d32| / |d32|, and the cosine of the estimates; medians over three seeds. Writes tangent_dtype.json
and tangent_dtype.md. What such tangents cost is a matter of run.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]  # frog_cuda as it lies here, installed or not

import torch  # noqa: E402
from cases import Activity, ForwardGradient, WeightLowRank, cosine, distance  # noqa: E402
from problems import Problem  # noqa: E402
from report_tables import Record, table  # noqa: E402
from run import listed, machine  # noqa: E402
from torch import Tensor  # noqa: E402

MODELS = ["fc1024", "lenet5", "resnet18", "vit", "mixer", "gpt256"]
KINDS: list[type[ForwardGradient]] = [Activity, WeightLowRank]
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}
SEEDS = range(3)


def estimate(
    problem: Problem, kind: type[ForwardGradient], k: int, seed: int, dtype: torch.dtype | None
) -> list[dict[str, Tensor]]:
    """Directional derivatives and gradient."""
    method = kind(problem, k)
    method.fg.seed, method.fg.tangent_dtype = seed, dtype
    method()
    assert method.fg.last is not None
    return [{"d": method.fg.last.directional_derivatives}, method.gradients()]


def losses(problem: Problem, kind: type[ForwardGradient], k: int) -> list[Record]:
    """Error of the derivatives and cosine of the estimates, for each low dtype."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LOW}
    for seed in SEEDS:
        d, g = estimate(problem, kind, k, seed, None)
        for name, dtype in LOW.items():
            low_d, low_g = estimate(problem, kind, k, seed, dtype)
            found[name].append((distance(low_d, d), cosine(low_g, g)))
    return [
        {
            "model": problem.name,
            "kind": kind.name,
            "k": k,
            "dtype": name,
            "error": statistics.median(error for error, _ in pairs),
            "cosine": statistics.median(c for _, c in pairs),
        }
        for name, pairs in found.items()
    ]


def wrong(record: Record) -> bool:
    """Whether a low-precision estimate is not that of float32 at all. Rounding bfloat16 at each of some dozen layers leaves
    errors of some percent; a wrong derivative has an error near 1."""
    return not (record["error"] < 0.25 and record["cosine"] > 0.9)


def markdown(about: Record, records: Sequence[Record]) -> str:
    rows = [[r["model"], r["kind"], str(r["k"]), r["dtype"], f"{r['error']:.1e}", f"{r['cosine']:.5f}"] for r in records]
    return (
        "# Low-precision tangents\n\nWritten by `benchmarks/tangent_dtype.py`, whose head says what the columns are. "
        f"{about['cpu']}, {about['simd']}, torch {about['torch']}, frog_cuda {about['frog_cuda']}.\n\n"
        f"{table(['model', 'perturbed', 'k', 'tangents', 'error of d', 'cosine'], rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=listed, default=MODELS, help=f"separated by commas; default {','.join(MODELS)}")
    parser.add_argument("--k", type=listed, default=["1", "4", "16"], help="numbers of tangents; default 1,4,16")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    options = parser.parse_args()
    records = [
        record
        for problem in map(Problem, options.models)
        for kind in KINDS
        for k in map(int, options.k)
        for record in losses(problem, kind, k)
    ]
    about = machine()
    text = markdown(about, records)
    print(text)
    bad = [r for r in records if wrong(r)]
    if bad:
        sys.exit(f"wrong: {bad}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "tangent_dtype.json").write_text(json.dumps({"machine": about, "records": records}, indent=1) + "\n")
    (options.output / "tangent_dtype.md").write_text(text)


if __name__ == "__main__":
    main()
