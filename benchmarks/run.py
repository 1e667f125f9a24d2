"""Runs the benchmarks and writes benchmarks/results/<machine>.json and .md, and docs/benchmarks.md with its plots.

    python benchmarks/run.py [--quick] [--parts gradients,memory] [--models fc1024,vit] [--k 1,4] [--compile fc256,vit]
                             [--fresh] [--report-only] [--output FOLDER] [--docs FOLDER]

A run adds to the results that are there, case by case, so that it can be done in pieces; --fresh begins anew. Every record says
when it was measured. Exits with 1 where a timed result was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
sys.path[:0] = [str(ROOT), str(FOLDER)]  # frog_cuda as it lies here, installed or not

import alternatives  # noqa: E402
import cases  # noqa: E402
import memory  # noqa: E402
import problems  # noqa: E402
import report  # noqa: E402
import report_docs  # noqa: E402
from report_tables import Record, circumstances, find  # noqa: E402

PARTS = ["gradients", "memory", "shares", "scaling", "attention", "operators"]
#: what tells a case from another; the rest of a record was measured
IDENTITY = "table model method part k axis value op case against_name name length".split()
#: methods whose memory does not depend on k
CONSTANT = (alternatives.MeZO, alternatives.ForwardAdLoop)


def listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part not in ("", "none")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes: fewer rounds, models, tangents and methods")
    parser.add_argument("--parts", type=listed, default=PARTS, help=f"of {','.join(PARTS)}, separated by commas; default all")
    parser.add_argument("--models", type=listed, help=f"default {','.join(problems.PAPER)}, --quick: fc256,fc1024,lenet5,vit")
    parser.add_argument("--k", help="numbers of tangents, separated by commas; default 1,2,4,16,64, --quick: 1,4,16")
    parser.add_argument("--compile", type=listed, default=[], help="models for torch.compile of each method: minutes for each")
    parser.add_argument("--lengths", default="512,1024,2048", help="lengths of sequences for attention; default %(default)s")
    parser.add_argument("--rounds", type=int, help="so many rounds of each case, instead of as many as fit its time")
    parser.add_argument("--seconds", type=float, help="begin no case after so many seconds; default: no limit")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs on this machine")
    parser.add_argument("--report-only", action="store_true", help="measure nothing; write the pages from the results")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmarks.md")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; accepted are {', '.join(PARTS)}")
    if options.models is None:
        options.models = ["fc256", "fc1024", "lenet5", "vit"] if options.quick else problems.PAPER
    for name in [*options.models, *options.compile]:
        if name not in problems.MODELS and not re.fullmatch(r"fc[1-9]\d*", name):
            parser.error(f"--models: unknown {name!r}; accepted are {problems.ACCEPTED}")
    options.k = [int(k) for k in listed(options.k or ("1,4,16" if options.quick else "1,2,4,16,64"))]
    options.lengths = [int(t) for t in listed(options.lengths)]
    if min(options.k, default=0) < 1:
        parser.error("--k: numbers of tangents must be at least 1")
    options.deadline = None if options.seconds is None else time.time() + options.seconds
    return options


def cpu_model() -> str:
    """The processor's name, and what a virtual machine hides of it: an AMD's model, where the family at least narrows
    it down, and AMX, without which an Intel's bfloat16 is no faster than its float32."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = ""
    found = re.search(r"model name\s*:\s*(.+)", about)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    family = re.search(r"cpu family\s*:\s*(\d+)", about)
    if name == "AMD EPYC" and family:
        return f"{name} family {family[1]}"
    hidden = "Intel" in name and "avx512_bf16" in about and "amx_bf16" not in about
    return f"{name} without AMX" if hidden else name


def machine() -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine or its owner."""
    import torch

    import frog_cuda

    info = frog_cuda.build_info()
    about = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "frog_cuda": frog_cuda.__version__,
        "simd": info.get("simd", "unknown"),
        "python": platform.python_version(),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        about["jax"] = importlib.metadata.version("jax")
    return about


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


class Results:
    """The results of this machine, on disk after every part."""

    def __init__(self, options: argparse.Namespace) -> None:
        about = machine()
        name = slug(f"{about['cpu']} torch {about['torch']}")
        self.options, self.file = options, options.output / f"{name}.json"
        old = json.loads(self.file.read_text()) if self.file.exists() and not options.fresh else {"cases": []}
        self.about = old["machine"] if options.report_only and "machine" in old else about
        self.records: list[Record] = old["cases"]
        #: what a run that is ended before its time has measured; the next one takes it over
        self.unfinished = self.file.with_suffix(".unfinished")
        self.take_over()

    def take_over(self) -> None:
        if self.unfinished.exists():
            self.add([json.loads(line) for line in self.unfinished.read_text().splitlines()])
            self.unfinished.unlink()

    def add(self, records: list[Record]) -> None:
        """In place of what was measured of the same cases; that a case was left out replaces no measurement."""
        known = {identity(r): i for i, r in enumerate(self.records)}
        for record in records:
            at = known.get(identity(record))
            if at is None:
                self.records.append(record)
            elif "reason" not in record or "reason" in self.records[at]:
                self.records[at] = record
        self.write()

    def write(self) -> str:
        text = report.markdown(self.about, self.records)
        self.options.output.mkdir(parents=True, exist_ok=True)
        self.file.with_suffix(".md").write_text(text)
        figures = [figure.line(self.records) for figure in report.FIGURES]
        content = {"machine": self.about, "figures": figures, "cases": self.records}
        lines = json.dumps(content, indent=1)
        self.file.write_text(lines + "\n")
        return text


def identity(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in IDENTITY)


def pieces(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Names and arguments of runs of pytest. A process for each model, so that one that dies, say for lack of memory, takes no
    other's records with it."""
    ks, files = ",".join(map(str, options.k)), {path.stem: str(path) for path in FOLDER.glob("bench_*.py")}
    models, shares, scaling = (files.pop(f"bench_{name}") for name in ("models", "shares", "scaling"))
    attention = files.pop("bench_attention")
    if "gradients" in options.parts:
        for name in options.models:
            yield name, [models, "--models", name, "--k", ks, "-k", "not test_compiled"]
    for name in options.compile:
        yield f"torch.compile, {name}", [models, "--models", name, "-k", "test_compiled"]
    nets = [name for name in options.models if name.startswith("fc")]
    if "shares" in options.parts and nets:
        yield "shares", [shares, "--models", ",".join(nets)]
    if "scaling" in options.parts:
        yield "scaling", [scaling]
    if "attention" in options.parts:
        yield "attention", [attention, "--lengths", ",".join(map(str, options.lengths))]
    if "operators" in options.parts:
        yield "operators", sorted(files.values())


def run_pytest(options: argparse.Namespace, results: Results, what: str, extra: list[str]) -> bool:
    """Whether all passed; what was measured is in the results then."""
    options.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-o", "python_files=bench_*.py", "-p", "no:cacheprovider"]
    command += [
        "--records",
        str(results.unfinished.resolve()),
        "--benchmark-columns=median,rounds",
        "--benchmark-group-by=func",
    ]
    command += ["--quick"] if options.quick else []
    command += ["--rounds", str(options.rounds)] if options.rounds else []
    command += ["--deadline", str(options.deadline)] if options.deadline else []
    start = time.monotonic()
    code = subprocess.run([*command, *extra], cwd=ROOT, stdout=sys.stderr).returncode
    results.take_over()
    print(f"benchmarks, {what}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    if code != 0:
        print(f"benchmarks, {what}: pytest ended with code {code}", file=sys.stderr)
    return code == 0


def memory_cases(options: argparse.Namespace, model: str) -> Iterator[tuple[str, int]]:
    methods = [*cases.OURS, *([] if options.quick else cases.MORE), *alternatives.ALTERNATIVES]
    yield from ((m.name, 0) for m in cases.REFERENCES)
    if model.startswith("fc"):
        yield alternatives.JaxGrad.name, 0
    for method in methods:
        if method is alternatives.JaxVmapJvp and not model.startswith("fc"):
            continue
        ks = sorted({min(options.k), max(options.k)}) if options.quick else options.k
        for k in ks[:1] if method in CONSTANT else ks:
            yield method.name, k
            if method in (cases.WeightNormal, cases.WeightLowRank):
                yield method.name + memory.UPDATE, k


def run_memory(options: argparse.Namespace, known: list[Record]) -> Iterator[Record]:
    """What was left out for its time or memory is left out here as well."""
    for model in options.models:
        for name, k in memory_cases(options, model):
            timed = find(known, table="gradient", model=model, method=name.removesuffix(memory.UPDATE), k=k, part="gradient")
            if timed is not None and "reason" in timed:
                continue
            if options.deadline is not None and time.time() > options.deadline:
                print("peak memory: no time left", file=sys.stderr)
                return
            print(f"peak memory: {name}, {model}, k {k}", file=sys.stderr)
            try:
                grown = memory.peak_growth(name, model, k)
            except cases.Unsuitable as reason:
                print(f"peak memory: left out, {reason}", file=sys.stderr)
                continue
            yield {"table": "memory", "model": model, "method": name, "k": k, "bytes": grown}


def run_attention_memory(options: argparse.Namespace) -> Iterator[Record]:
    from attention_cases import OURS, UNFUSED

    for length in options.lengths:
        for k in (1, 4):
            for name in (OURS, UNFUSED):
                print(f"peak memory: {name}, length {length}, k {k}", file=sys.stderr)
                grown = memory.attention_growth(name, length, k)
                yield {"table": "attention memory", "name": name, "length": length, "k": k, "bytes": grown}


def main() -> int:
    options = arguments()
    results, right = Results(options), True
    if not options.report_only:
        for what, extra in pieces(options):
            right &= run_pytest(options, results, what, extra)
        if not memory.supported():
            print("peak memory left out: this system cannot reset the high-water mark of a process", file=sys.stderr)
        else:
            if "memory" in options.parts:
                for record in run_memory(options, list(results.records)):
                    results.add([{**record, **circumstances()}])  # each at once: what comes next may not fit into memory
            if "attention" in options.parts:
                for record in run_attention_memory(options):
                    results.add([{**record, **circumstances()}])
    print(results.write())
    report_docs.write(options.docs, results.file.name, results.about, results.records)
    if not right:
        print("benchmarks: at least one result was wrong or a case failed; see above", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
