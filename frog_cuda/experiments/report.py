"""``python -m frog_cuda report``: what came of the paper's experiments, as a page beside what the paper says of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .._files import replace
from . import UsageError, require
from .descent import FUNCTIONS
from .findings import EXPECTED, Cell, Findings, Model, Table, key, read, versions
from .functions import by_seed
from .plots import angles_figure, approximation_figures, curves_figure, errors_figure, functions_figure
from .statements import QUESTIONS, STATEMENTS, Statement

__all__ = ["add_arguments", "figures", "page", "run"]

#: data sets of the paper's sections 4.4 and 4.5, and networks trained on them
OF_THE_PAPER = {"mnist": ("fc width=256", "fc width=1024", "fc width=4096", "resnet18", "vit"), "cifar10": ("resnet18", "vit")}
MISSING = "**Missing:** no results in"

INTRODUCTION = """\
# Reproduction of the paper

`{command}` wrote this page
from the files of results; all figures and verdicts are computed from them.
Commands and settings are explained in [experiments.md](experiments.md), how estimates are made in
[forward_gradients.md](forward_gradients.md).

The paper is Flügel et al., *Beyond Backpropagation: Optimization with Multi-Tangent Forward Gradients*, arXiv 2410.17764,
section 4. Its statements are given in our words. A statement is checked by comparing pairs of results, such as those of 2 and
of 4 tangents: it holds, or holds in so many pairs of all. Means over the seeds are compared, and no allowance is made for
chance. Statements marked *ours* are not the paper's.

The paper trains on MNIST and CIFAR10. Here the handwritten digits of scikit-learn stand in for them (1797 images of 8 x 8
pixels), with smaller ResNet18 and ViT, so that anyone can run everything on a CPU. What is true of them need not be true of
MNIST.

```python
from frog_cuda.experiments.approximation import APPROACHES, closed_form

orthogonal = APPROACHES[-1]
cosine, length = closed_form(orthogonal, k=16, n=64)  # what the figures of section 4.1 are compared with
assert abs(cosine - 0.494) < 1e-3 and cosine == length
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m frog_cuda report``."""
    add = parser.add_argument
    add(
        "--results",
        type=Path,
        default=Path("results"),
        help="folder in which other commands made theirs, such as results/train (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        help="the page; figures are put in a folder of its name beside it (default: report.md in --results)",
    )


def run(args: argparse.Namespace) -> None:
    """Reads results, draws figures and writes the page.

    Raises:
        MissingPackages: matplotlib is not installed.
        UsageError: there are no results, or nowhere to write.
    """
    require("matplotlib.figure")
    output = args.results / "report.md" if args.output is None else args.output
    found = read(args.results)
    folder = output.with_suffix("")
    if folder == output:
        raise UsageError(f"--output is {str(output)!r}; expected a name with an ending, such as {output.name}.md")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures(found, folder)
        beside = (output.parent / "experiments.md").exists()
        replace(output, page(found, args.results, folder.name, command=args.command_line, beside_docs=beside))
    except OSError as error:
        raise UsageError(f"--output {str(output)!r} cannot be written: {error.strerror}") from error
    lines = [f"{s.name:<3} {verdict(s, found):<38} {s.text}" for s in STATEMENTS]
    print("\n".join([*lines, "", f"Page: {output}. Figures: {folder}."]))


def figures(found: Findings, folder: Path) -> None:
    """Draws all figures for which there are results: ``cosine.png``, ``norm_ratio.png``, ``functions.png``, ``angles.png``,
    ``errors.png`` and ``curves.png``.

    Raises:
        OSError: one cannot be written.
    """
    if found.approximation is not None:
        approximation_figures(found.approximation.rows, folder)
    if found.functions is not None:
        functions_figure(found.functions.rows, folder)
    if found.angles is not None and found.descent is not None:
        angles_figure(found.angles.rows, found.descent.rows, FUNCTIONS["styblinski-tang"].minimum, folder)
    if found.models:
        errors_figure(found.models, folder / "errors.png")
        curves_figure(found.models, folder / "curves.png")


def page(found: Findings, results: Path, folder: str, *, command: str, beside_docs: bool) -> str:
    """The page, as Markdown.

    Arguments:
        results: where the results are, for the text.
        folder: with the figures, beside the page.
        command: that makes the page.
        beside_docs: whether it stands beside the pages of docs/, and can link to them.
    """
    parts = [INTRODUCTION.replace("{command}", command), summary(found), questions(found)]
    parts += [section(found, results, folder) for section in (approximation, functions, angles, training)]
    parts += [gaps(found, results), provenance(found)]
    text = "\n".join(part.strip() + "\n" for part in parts)
    return text if beside_docs else re.sub(r"\[(\w+\.md)\]\(\1\)", r"`docs/\1`", text)


def verdict(statement: Statement, found: Findings) -> str:
    check = statement.check(found)
    return "no results" if check is None else check.verdict


def summary(found: Findings) -> str:
    """All statements with their verdicts."""
    lines = ["## Statements", "", "| | section | whose | statement | |", "|---|---|---|---|---|"]
    lines += [f"| {s.name} | {s.section} | {s.source} | {s.text} | {verdict(s, found)} |" for s in STATEMENTS]
    return "\n".join(lines)


def questions(found: Findings) -> str:
    """The research questions, answered by the statements that bear on them."""
    lines = ["## Research questions", ""]
    for number, text in QUESTIONS.items():
        mine = [s for s in STATEMENTS if s.question == number]
        groups: dict[str, list[str]] = {}
        for s in mine:
            groups.setdefault(verdict(s, found), []).append(s.name)
        told = "; ".join(f"{', '.join(names)}: {text}" for text, names in groups.items())
        lines.append(f"{number}. **{text}** {told}.")
    lines += ["", "Times and memory, the other part of the fourth answer, are measured in [benchmarks.md](benchmarks.md)."]
    return "\n".join(lines)


def evidence(found: Findings, number: str) -> list[str]:
    """The statements of a section, with the figures behind each verdict."""
    lines = []
    for s in STATEMENTS:
        if s.section != number:
            continue
        check = s.check(found)
        told = verdict(s, found).capitalize()
        lines.append(f"- **{s.name}. {s.text}** *{told}.* {'' if check is None else check.figures}".rstrip())
        if check is not None and check.but:
            shown = "; ".join(check.but[:12]) + (f"; and {len(check.but) - 12} more" if len(check.but) > 12 else "")
            lines.append(f"  Not in: {shown}.")
        if check is not None and check.caveat:
            lines.append(f"  **Not like for like.** {check.caveat}")
    return lines


def made_by(table: Table, *others: Table) -> list[str]:
    """Of one table or of several that a command wrote."""
    partly = "" if all(t.complete for t in (table, *others)) else " **The run is not complete.**"
    return [f"Made by `{table.command}`, seeds {table.settings['seed']} to {last_seed(table)}.{partly}", ""]


def last_seed(table: Table) -> int:
    return table.settings["seed"] + table.settings["seeds"] - 1


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def approximation(found: Findings, results: Path, folder: str) -> str:
    lines = ["## 4.1, Fig. 3: how close estimates come to the gradient", ""]
    table = found.approximation
    if table is None:
        return "\n".join([*lines, f"{MISSING} `{results}/approximation`; `python -m frog_cuda approximation` makes them."])
    ns = sorted({row["n"] for row in table.rows})
    n = 64 if 64 in ns else ns[-1]
    rows = {(row["approach"], row["k"]): row for row in table.rows if row["n"] == n}
    head = ["k", *(f"{name}, {what}" for name in ("mean", "orthogonal") for what in ("cosine", "closed form", "length"))]
    body = []
    for k in sorted({row["k"] for row in table.rows}):
        cells = [str(k)]
        for name in ("mean", "orthogonal"):
            row = rows[name, k]
            cells += [f"{row['cosine']:.4f}", f"{row['cosine_closed_form']:.4f}", f"{row['norm_ratio']:.3f}"]
        body.append(cells)
    lines += [*made_by(table), f"![Cosine between estimate and gradient]({folder}/cosine.png)", ""]
    lines += [f"![Length of the estimate]({folder}/norm_ratio.png)", "", *evidence(found, "4.1"), ""]
    lines += [f"In n = {n} dimensions; lengths in units of that of the gradient:", "", *grid(head, body)]
    return "\n".join(lines)


def functions(found: Findings, results: Path, folder: str) -> str:
    lines = ["## 4.2, Fig. 4: closed-form functions", ""]
    table = found.functions
    if table is None:
        return "\n".join([*lines, f"{MISSING} `{results}/functions`; `python -m frog_cuda functions` makes them."])
    lines += [*made_by(table), f"![Best values by dimension]({folder}/functions.png)", "", *evidence(found, "4.2"), ""]
    ns = sorted({row["n"] for row in table.rows})[::2]
    lines += ["Best value, mean over the seeds; in brackets, how many runs diverged (their best value before that):", ""]
    cases = dict.fromkeys((row["function"], row["approach"]) for row in table.rows)
    body = []
    for function, approach in cases:
        cells = [f"{FUNCTIONS[function].title}, {approach}"]
        for n in ns:
            mine = [r for r in table.rows if (r["function"], r["approach"], r["n"]) == (function, approach, n)]
            bests = [r["best"] for r in mine if r["best"] is not None]
            diverged = sum(r["ended"] == "diverged" for r in mine)
            text = f"{sum(bests) / len(bests):.3g}" if bests else "-"
            cells.append(text + (f" ({diverged})" if diverged else ""))
        body.append(cells)
    lines += grid(["", *(f"n = {n}" for n in ns)], body)
    rosenbrock = by_seed([row for row in table.rows if row["function"] == "rosenbrock"])
    if rosenbrock:
        lines += ["", "### Rosenbrock by seed (appendix C)", "", rosenbrock]
    return "\n".join(lines)


def angles(found: Findings, results: Path, folder: str) -> str:
    lines = ["## 4.3, Fig. 5: tangents at an angle", ""]
    if found.angles is None or found.descent is None:
        return "\n".join([*lines, f"{MISSING} `{results}/angles`; `python -m frog_cuda angles` makes them."])
    lines += made_by(found.angles, found.descent)
    lines += [f"Descent on Styblinski-Tang: seeds {found.descent.settings['seed']} to {last_seed(found.descent)}.", ""]
    lines += [f"![Cosine, length and best value by angle]({folder}/angles.png)", "", *evidence(found, "4.3"), ""]
    places = list(dict.fromkeys(row["angle"] for row in found.angles.rows))
    head = ["cosine; best value", *("normal" if a is None else f"{a} degrees" for a in places)]
    body = []
    for k in sorted({row["k"] for row in found.angles.rows}):
        for name in ("mean", "orthogonal"):
            cosines = {r["angle"]: r["cosine"] for r in found.angles.rows if r["approach"] == name and r["k"] == k}
            cells = [f"{name}, k = {k}"]
            for a in places:
                mine = [r for r in found.descent.rows if r["k"] == k and r["angle"] == a and r["approach"].startswith(name)]
                bests = [r["best"] for r in mine if r["best"] is not None]
                cosine = f"{cosines[a]:.3f}" if a in cosines else "-"
                cells.append(f"{cosine}; " + (f"{sum(bests) / len(bests):.0f}" if bests else "-"))
            body.append(cells)
    return "\n".join([*lines, *grid(head, body)])


def training(found: Findings, results: Path, folder: str) -> str:
    """Sections 4.4 and 4.5, which share their figures and tables."""
    lines = ["## 4.4 and 4.5, Fig. 6: neural networks", ""]
    if not found.models:
        return "\n".join([*lines, f"{MISSING} `{results}/train`; `python -m frog_cuda train` makes them."])
    seeds = sorted({seed for m in found.models for cell in m.cells.values() for seed in cell.seeds})
    lines += [
        f"Seeds {', '.join(map(str, seeds))}. A run ends when all epochs are done, or when the validation loss has not fallen "
        "for as many as the patience says. Tested are the weights with the lowest validation loss.",
        "",
        *grid(["", *OPTIONS, "parameters"], [_options(model) for model in found.models]),
        "",
    ]
    lines += [f"![Test error by number of tangents]({folder}/errors.png)", ""]
    lines += [f"![Validation loss by epoch]({folder}/curves.png)", ""]
    for number, title in (("4.4", "Fully connected networks"), ("4.5", "Larger networks")):
        lines += [f"### {number}: {title}", "", *evidence(found, number), ""]
    approaches = sorted({name for m in found.models for name in m.cells}, key=key)
    for title, cell_text in TABLES:
        lines += [f"{title}:", ""]
        body = [_row(m, approaches, cell_text) for m in found.models]
        lines += [*grid(["", *(_title(name) for name in approaches)], body), ""]
        if any(BY_HAND in text for row in body for text in row[1:]):
            lines += [f"{BY_HAND} Set by hand, not found by a search; how is told in [experiments.md](experiments.md).", ""]
    return "\n".join(lines)


#: settings that all runs of a network share, as a rule
OPTIONS = ("optimizer", "batch", "epochs", "patience")


def _options(model: Model) -> list[str]:
    runs = [run for cell in model.cells.values() for run in cell.runs]
    cells = [", ".join(sorted({str(run["settings"][name]) for run in runs})) for name in OPTIONS]
    return [_name(model), *cells, ", ".join(sorted({f"{run['parameters']:,}" for run in runs}))]


def _name(model: Model) -> str:
    return model.name if model.dataset == "digits" else f"{model.name}, {model.dataset}"


def _title(approach: str) -> str:
    return {"bp": "backprop", "mean k=1": "k=1"}.get(approach, approach)


def _row(model: Model, approaches: Sequence[str], text: Callable[[Cell], str]) -> list[str]:
    return [_name(model), *(text(model.cells[name]) if name in model.cells else "missing" for name in approaches)]


def _accuracy(cell: Cell) -> str:
    if cell.error is None:
        return f"- ({cell.diverged} of {len(cell.runs)} diverged)"
    text = f"{100 - cell.error:.1f} ± {cell.spread:.1f}"
    notes = [f"{cell.diverged} of {len(cell.runs)} diverged"] * bool(cell.diverged)
    notes += [f"{cell.unfinished} unfinished"] * bool(cell.unfinished) + [f"{len(cell.runs)} seeds"] * (len(cell.runs) != 3)
    return text + (f" ({', '.join(notes)})" if notes else "")


#: mark of a learning rate
BY_HAND = "†"


def _rates(cell: Cell) -> str:
    return ", ".join(f"{rate:g}" for rate in cell.rates) + (f" {BY_HAND}" if cell.by_hand else "")


#: tables of section 4.4 and 4.5: title, and what a cell says
TABLES: tuple[tuple[str, Callable[[Cell], str]], ...] = (
    ("Test accuracy in percent, mean and standard deviation over the seeds", _accuracy),
    ("Learning rate", _rates),
    ("Epochs until the run ended, by seed", lambda cell: ", ".join(map(str, cell.epochs))),
)


def gaps(found: Findings, results: Path) -> str:
    """What was not run."""
    lines = ["## What is missing", ""]
    parts = {"approximation": found.approximation, "functions": found.functions, "angles": found.angles and found.descent}
    lines += [f"- {name}: no results in `{results}/{name}`." for name, table in parts.items() if table is None]
    here = [m for m in found.models if m.dataset == "digits"]
    absent = [name for name in EXPECTED if not found.named(name)]
    lines += [f"- Training on digits: {', '.join(absent)}."] * bool(absent)
    wanted = ["bp", "mean k=1", *(f"{a} k={k}" for k in (2, 4, 16) for a in ("mean", "orthogonal"))]
    for model in here:
        without = [_title(name) for name in wanted if name not in model.cells]
        few = [_title(name) for name in wanted if name in model.cells and len(model.cells[name].runs) < 3]
        lines += [f"- {model.name}: {', '.join(without)}."] * bool(without)
        lines += [f"- {model.name}, fewer than three seeds: {', '.join(few)}."] * bool(few)
    for dataset, names in OF_THE_PAPER.items():
        not_run = [name for name in names if not found.named(name, dataset)]
        if not_run:
            where = "the commands are in [experiments.md](experiments.md)"
            lines.append(f"- Training on {dataset}: {', '.join(not_run)}; {where}.")
    return "\n".join(lines if len(lines) > 2 else [*lines, "Nothing."])


def provenance(found: Findings) -> str:
    """Commands and versions."""
    lines = ["## Commands", ""]
    tables = (found.approximation, found.functions, found.angles)
    commands = [t.command for t in tables if t is not None]
    commands += [run["command"] for m in found.models for cell in m.cells.values() for run in cell.runs]
    lines += [f"    {command}" for command in dict.fromkeys(commands)] or ["None."]
    made = versions(found)
    return "\n".join([*lines, "", *(f"Made by {v}." for v in made)])
