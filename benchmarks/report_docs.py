"""docs/benchmarks.md: gradients of models, where backprop wins, and scaling; every number comes from the JSON of results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import plots
import scaling
from cases import MORE, OURS
from memory import UPDATE
from report_tables import Record, find, in_order, milliseconds, table

OUR_NAMES = [m.name for m in (*OURS, *MORE)]
ORDER = [
    "backprop",
    "checkpointed backprop",
    "forward only",
    "JAX jit, grad",
    "layers alone",
    *OUR_NAMES,
    "MeZO",
    "vmap(jvp)",
    "loop of forward_ad",
    "JAX jit, vmap(jvp)",
]

#: how JAX was timed
APART = " JAX, whose threads get in PyTorch's way, was timed by itself: all its rounds, then all of backprop's."
IN_TURNS = (
    " JAX's threads got in PyTorch's way, as it took turns, too: backprop was up to {slower:.1f} times slower beside it, and "
    "JAX's ratios are so much too low."
)

INTRODUCTION = """# Benchmarks

One gradient of each model, by this package and by what could be used instead. `make bench` measures and writes this page,
its plots and `benchmarks/results/`; `make bench ARGS=--quick` takes minutes. A run adds to the results that are there, so it
can be done in pieces: `make bench ARGS="--models vit --parts gradients,memory"`. The run fails where a timed result is wrong.

{about}. Numbers: [{file}](../benchmarks/results/{file}). Measured from {first} to {last}
(UTC){load}. Figures aimed at, operators and
attention are in [the report beside it](../benchmarks/results/{report}).

## How to read it

- Models: `fc` and a width w are 784-w-w-10 ReLU nets at batch 64; LeNet5 at batch 64; ResNet18, vision transformer and
  MLP-Mixer for images of 3x32x32 at batch 32; `gpt` and a length T are decoders of 4 layers of width 128, with 1024 tokens in a
  batch. Float32. Batch normalisation keeps no running statistics, which `vmap` cannot write.
- **x backprop**: time, the median over rounds in which a method and backprop took turns, so that other load on the machine
  meets both. **ms**: median; other load adds to it.{jax}
- **FLOPs**: of matrix products, in units of backprop's. Counted by `torch.utils.flop_counter` as a method runs; closed form
  (marked c) where the counter cannot see: compiled operators, `torch.compile` and JAX (`benchmarks/floors.py`).
- **peak MiB**: by how much one call raises the resident set of a fresh process, the gradient included. ", update_" behind a
  method: a step of SGD that keeps no gradient.
- **cosine** to the true gradient, mean over calls with other tangents and its standard error, and **cosine per second**, by
  which backprop, whose cosine is 1, can be compared with an estimate; the seconds are those of backprop times the ratio.
  ResNet18's batch norm takes out what all samples share, tangents too: its activity rows tell the time, and own tangents
  (`shared_across_batch=False`) are what a training would use.
- **weight**: weight perturbation (full-rank normal or Rademacher tangents, or of rank one); **activity**: activity
  perturbation with local weight gradients; these project (P_U). **MeZO** (arXiv 2305.17333): central difference along a vector
  replayed from its seed, parameters perturbed in place, mean of k. **vmap(jvp)** and the **loop** of `forward_ad` draw normal
  tangents with `torch.randn`, mean of k; JAX likewise with its own generator, compiled before it is timed.
  **Checkpointed backprop** keeps the inputs of blocks only.

A cosine takes no more than this, on a model of your own:

```python
import torch
import torch.nn.functional as F
import frog_cuda as frog

model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
x, target = torch.randn(64, 20), torch.randint(0, 3, (64,))

F.cross_entropy(model(x), target).backward()
true = torch.cat([p.grad.flatten() for p in model.parameters()])
model.zero_grad()
frog.ForwardGradient(model, torch.nn.CrossEntropyLoss(reduction="none"), k=16)(x, target)
estimate = torch.cat([p.grad.flatten() for p in model.parameters()])
print(F.cosine_similarity(true, estimate, dim=0))
```"""


def _gradients(records: Sequence[Record], model: str) -> list[Record]:
    mine = [r for r in records if r["table"] == "gradient" and r["model"] == model and "ratio" in r]
    return sorted(mine, key=lambda r: (_place(r["method"]), r["part"] != "gradient", r["k"]))


def _place(method: str) -> tuple[int, str]:
    return (ORDER.index(method), "") if method in ORDER else (len(ORDER), method)


def _cosine(record: Record) -> str:
    if "cosine" not in record:
        return ""
    return f"{record['cosine']:.3g}" + (f" ± {record['cosine_error']:.1g}" if record.get("cosine_error") else "")


def _per_second(record: Record, base: Record) -> float:
    """The time by the ratio, which other load on the machine moves less than the time itself."""
    return float(record["cosine"] / (record["ratio"] * base["time"]))


def gradient_table(records: Sequence[Record], model: str) -> str:
    rows = []
    base = find(records, table="gradient", model=model, method="backprop") or {}
    for r in _gradients(records, model):
        grown = find(records, table="memory", model=model, method=r["method"], k=r["k"]) if r["part"] == "gradient" else None
        mark = " c" if r.get("flops_from") == "closed form" else ""
        rows.append(
            [
                r["method"] + (", derivatives" if r["part"] == "derivatives" else ""),
                str(r["k"] or ""),
                milliseconds(r["time"]),
                f"{r['ratio']:.2f}",
                f"{r['flops'] / base['flops']:.2f}{mark}" if "flops" in r and "flops" in base else "",
                "" if grown is None else f"{grown['bytes'] / 2**20:.1f}",
                _cosine(r),
                f"{_per_second(r, base):.3g}" if "cosine" in r and base else "",
            ]
        )
    return table(["method", "k", "ms", "x backprop", "FLOPs", "peak MiB", "cosine", "cosine / s"], rows)


def memory_table(records: Sequence[Record]) -> str:
    """Peaks that stand in no other table: steps without a gradient, and models of which only memory was measured."""
    rows = []
    for r in (r for r in records if r["table"] == "memory"):
        if r["method"].endswith(UPDATE) or not _gradients(records, r["model"]):
            base = find(records, table="memory", model=r["model"], method="backprop")
            share = "" if base is None else f"{r['bytes'] / base['bytes']:.2f}"
            rows.append([r["model"], r["method"], str(r["k"] or ""), f"{r['bytes'] / 2**20:.1f}", share])
    return table(["model", "method", "k", "peak MiB", "x backprop"], rows) if rows else ""


def left_out(records: Sequence[Record]) -> str:
    rows = [[r["model"], r["method"], str(r["k"] or ""), r["reason"]] for r in records if "reason" in r]
    rows = [row for row in rows if "written in JAX" not in row[3] and "is a group" not in row[3]]
    return table(["model", "method", "k", "reason"], rows) if rows else ""


# ---- where backprop wins


def comparison(records: Sequence[Record], model: str) -> Record | None:
    """Backprop beside this package's best case by cosine per second, of those whose cosine is known well enough to choose by
    it; cheapest in time, and smallest in memory."""
    base = find(records, table="gradient", model=model, method="backprop", part="gradient")
    ours = [r for r in _gradients(records, model) if r["method"] in OUR_NAMES and "cosine" in r]
    if base is None or "cosine" not in base or not ours:
        return None
    peaks = [r for r in records if r["table"] == "memory" and r["model"] == model]
    plain = find(peaks, method="backprop")
    small = [r for r in peaks if r["method"].removesuffix(UPDATE) in OUR_NAMES]
    smallest = min(small, key=lambda r: r["bytes"], default=None)
    known = [r for r in ours if r["cosine_samples"] >= LEAST_SAMPLES and r["cosine"] >= SURE * r["cosine_error"]]
    best = max(known, key=lambda r: _per_second(r, base), default=None)
    return {
        "best": best,
        "times": None if best is None else best["ratio"] * base["cosine"] / (best["cosine"] * base["ratio"]),
        "fastest": min(ours, key=lambda r: r["ratio"]),
        "slower": sum(r["ratio"] > 1 for r in ours),
        "cases": len(ours),
        "smallest": smallest,
        "memory": smallest["bytes"] / plain["bytes"] if smallest and plain else None,
    }


#: calls and standard errors from which on a mean cosine says something
LEAST_SAMPLES, SURE = 8, 4


def _called(record: Record) -> str:
    return f"{record['method']}, k = {record['k']}"


def backprop_wins(records: Sequence[Record], models: Sequence[str]) -> str:
    rows, worst, slower, cases = [], [], 0, 0
    for model in models:
        c = comparison(records, model)
        if c is None:
            continue
        slower, cases = slower + c["slower"], cases + c["cases"]
        chosen = ["none known well enough", "", ""]
        if c["best"] is not None:
            worst.append(c["times"])
            chosen = [_called(c["best"]), _cosine(c["best"]), f"{c['times']:.3g}"]
        rows.append(
            [
                model,
                *chosen,
                f"{c['fastest']['ratio']:.2f} ({_called(c['fastest'])})",
                "" if c["memory"] is None else f"{c['memory']:.2f} ({_called(c['smallest'])})",
            ]
        )
    if not rows:
        return ""
    verdict = f"{slower} of the {cases} cases of this package measured here take longer than backprop. "
    if worst:
        verdict += (
            f"Per second, backprop gives {min(worst):.3g} to {max(worst):.3g} times the cosine of this package's best case "
            f"(of those with at least {LEAST_SAMPLES} calls and a cosine of at least {SURE} standard errors). "
        )
    if worst and min(worst) > 1:
        verdict += (
            "Where the exact gradient can be had, backprop is the better buy. An estimate sees k directions of n: its cosine "
            "grows about as the square root of k, and its time as k."
        )
    note = (
        "What is left to forward gradients: less memory where activations are what fills it, models or losses that cannot be "
        "run backwards, hardware that runs forward passes only; and there, what the tables below compare: the same estimate "
        "for less than by MeZO, `vmap(jvp)` or a loop."
    )
    head = ["model", "best cosine per second", "its cosine", "backprop's is times better"]
    head += ["least time / backprop", "least memory / backprop"]
    return "\n\n".join([verdict, table(head, rows), note])


def page(file: str, machine: Record, records: Sequence[Record], images: Sequence[str]) -> str:
    """The whole page. ``file``: name of the JSON."""
    records = in_order(records)
    shown = [r for r in records if r["table"] in ("gradient", "memory", "scaling", "gram")]
    loads = [r["load"] for r in shown if "load" in r]
    load = f", with a median of {statistics.median(loads):.1f} programs running or waiting for a core" if loads else ""
    dates = sorted(r["measured"] for r in shown)
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    report = file.removesuffix("json") + "md"
    timed = [r for r in shown if r.get("method", "").startswith("JAX") and "ratio" in r]
    beside = [r for r in timed if r.get("in_turns") is not False]
    alone = {r["model"]: r["time"] for r in records if r.get("method") == "backprop" and r.get("part") == "gradient"}
    slower = max((r["against"] / alone[r["model"]] for r in beside), default=0.0)
    jax = (IN_TURNS.format(slower=slower) if beside else APART) if timed else ""
    parts = [INTRODUCTION.format(about=about, file=file, report=report, first=dates[0], last=dates[-1], load=load, jax=jax)]
    models = list(dict.fromkeys(r["model"] for r in records if r["table"] == "gradient"))
    if any(r["table"] == "gradient" and r["method"] == "backprop" and "cosine" not in r for r in records):
        parts.append("Cases without cosine and FLOPs are results of an earlier version of these benchmarks.")
    if wins := backprop_wins(records, models):
        parts += ["## Where backprop wins", wins]
    captions = {
        "time": "Time of one gradient against the number of tangents; the line at 1 is backprop",
        "memory": "Peak memory; the full line is backprop, the one of dashes and dots checkpointed backprop",
        "cosine": "Cosine to the true gradient against time, where two standard errors above 0; from left to right, k grows",
    }
    for name in images:
        parts.append(f"![{captions[name.removeprefix('benchmarks-').removesuffix('.png')]}]({name})")
    for model in models:
        if _gradients(records, model):
            parts += [f"## {model}", gradient_table(records, model)]
    if text := memory_table(records):
        parts += ["## More of memory", text]
    if scaling.fits(records):
        notes = "; ".join(f"{axis}: {note}" for axis, note in scaling.NOTES.items())
        parts += ["## Scaling", SCALING.format(notes=notes), scaling.fit_table(records)]
    if any(r["table"] == "gram" for r in records):
        parts += ["### The Gram matrix", GRAM, scaling.gram_table(records)]
    if text := left_out(records):
        parts += ["## Left out", "Methods that do not work for a model, or would take too long or too much memory there.", text]
    return "\n\n".join(parts) + "\n"


SCALING = (
    "Slopes fitted to the costs along one axis, and the same fit to the floating point operations of the same cases. Along "
    "k, what one more tangent costs; along the others, the exponent of a power. An exponent below the floor's: at small sizes "
    "time goes into other things than products. Models: {notes}."
)
GRAM = (
    "The projection needs the inner products of all k (k + 1) / 2 pairs of drawn tangents, k^2 n operations, where the rest of "
    "a step grows as k. Normal tangents of all weights, a step with the Gram matrix beside one without (mean)."
)


def write(folder: Path, file: str, machine: Record, records: Sequence[Record]) -> None:
    if not any(r["table"] in ("gradient", "memory", "scaling", "gram") for r in records):
        return
    folder.mkdir(parents=True, exist_ok=True)
    images = plots.write(folder, records)
    (folder / "benchmarks.md").write_text(page(file, machine, records, images))
