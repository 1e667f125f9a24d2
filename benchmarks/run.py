"""Runs the benchmarks, prints tables with ratios, and writes JSON and Markdown to benchmarks/results/.

    python benchmarks/run.py [--quick] [--widths 256,1024,4096] [--k 1,2,4,16] [--models resnet18,vit] [--no-memory]
                             [--output FOLDER]

Exits with 1 where a timed result was wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
sys.path[:0] = [str(ROOT), str(FOLDER)]  # frog_cuda as it lies here, installed or not

import memory  # noqa: E402
import report  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two: fewer rounds, without w = 4096")
    parser.add_argument("--widths", help="of the nets, separated by commas; default 256,1024,4096, --quick: 256,1024")
    parser.add_argument("--k", default="1,2,4,16", help="numbers of tangents, separated by commas; default %(default)s")
    parser.add_argument("--models", help="names of benchmarks/model_cases.py; default all of the paper's size; 'none' for none")
    parser.add_argument("--model-k", default="1,4,16", help="numbers of tangents for models; default %(default)s")
    parser.add_argument("--lengths", default="512,1024,2048", help="lengths of sequences for attention; default %(default)s")
    parser.add_argument("--rounds", type=int, help="so many rounds of each case, instead of as many as fit its time")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    options = parser.parse_args()
    options.widths = [int(w) for w in (options.widths or ("256,1024" if options.quick else "256,1024,4096")).split(",")]
    options.k = [int(k) for k in options.k.split(",")]
    options.lengths = [int(t) for t in options.lengths.split(",")]
    options.models = (options.models or "resnet18,vit,gpt256,gpt1024").split(",") if options.models != "none" else []
    if min(options.widths) < 1 or min(options.k) < 1:
        parser.error("widths and numbers of tangents must be at least 1")
    return options


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine or its owner."""
    import torch

    import frog_cuda

    info = frog_cuda.build_info()
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "frog_cuda": frog_cuda.__version__,
        "simd": info.get("simd", "unknown"),
        "python": platform.python_version(),
    }


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def run_suite(options: argparse.Namespace) -> tuple[list[report.Record], bool]:
    """The records of all cases, and whether every one passed. A process for the operators, for each width and for each model,
    so that one that dies, say for lack of memory, takes no other's records with it."""
    nets, models = FOLDER / "bench_vs_backprop.py", FOLDER / "bench_models.py"
    operators = sorted(path for path in FOLDER.glob("bench_*.py") if path not in (nets, models))
    parts = [("operators", operators, ["--lengths", ",".join(map(str, options.lengths))])]
    parts += [(f"width {width}", [nets], ["--widths", str(width)]) for width in options.widths]
    parts += [(name, [models], ["--models", name, "--model-k", options.model_k]) for name in options.models]
    records, right = [], True
    for what, files, extra in parts:
        found, passed = _run_pytest(options, what, files, extra)
        records += found
        right &= passed
    return records, right


def _run_pytest(
    options: argparse.Namespace, what: str, files: list[Path], extra: list[str]
) -> tuple[list[report.Record], bool]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "-o", "python_files=bench_*.py"]
        command += ["-p", "no:cacheprovider", f"--benchmark-json={out}", "--benchmark-columns=median,rounds"]
        command += ["--benchmark-group-by=func", "--k", ",".join(map(str, options.k)), *extra]
        command += ["--quick"] if options.quick else []
        command += ["--rounds", str(options.rounds)] if options.rounds else []
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        results = json.loads(out.read_text())["benchmarks"] if out.exists() else []
    if code != 0:
        print(f"benchmarks, {what}: pytest ended with code {code}", file=sys.stderr)
    return [b["extra_info"] for b in results if b["extra_info"]], code == 0


def run_memory(options: argparse.Namespace) -> list[report.Record]:
    if not memory.supported():
        print("peak memory left out: this system cannot reset the high-water mark of a process", file=sys.stderr)
        return []
    from cases import problem

    ks = sorted({min(options.k), max(options.k)}) if options.quick else options.k
    found = []
    for width in options.widths:
        n = problem(width).n
        wanted = [("backprop", 0), ("forward only", 0)]
        wanted += [(name, k) for name in [*report.METHODS[2:], memory.UPDATE] for k in ks]
        for name, k in wanted:
            print(f"peak memory: {name}, width {width}, k {k}", file=sys.stderr)
            found.append({"method": name, "width": width, "k": k, "n": n, "bytes": memory.peak_growth(name, width, k)})
    return found


def run_attention_memory(options: argparse.Namespace) -> list[report.Record]:
    from attention_cases import OURS, UNFUSED

    found = []
    for length in options.lengths:
        for k in (1, 4):
            for name in (OURS, UNFUSED):
                print(f"peak memory: {name}, length {length}, k {k}", file=sys.stderr)
                grown = memory.attention_growth(name, length, k)
                found.append({"table": "attention memory", "name": name, "length": length, "k": k, "bytes": grown})
    return found


def write(folder: Path, about: dict[str, Any], records: list[report.Record], peaks: list[report.Record]) -> str:
    """Writes the report as Markdown and JSON, and returns the Markdown."""
    text = report.markdown(about, records, peaks)
    folder.mkdir(parents=True, exist_ok=True)
    stem = slug(f"{about['cpu']} torch {about['torch']}")
    (folder / f"{stem}.md").write_text(text)
    content = {
        "machine": about,
        "figures": [figure.line(records) for figure in report.FIGURES],
        "cases": records,
        "memory": peaks,
    }
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    return text


def main() -> int:
    options = arguments()
    records, right = run_suite(options)
    peaks = [] if options.no_memory else run_memory(options)
    if not options.no_memory and memory.supported():
        records += run_attention_memory(options)
    text = write(options.output, machine(), records, peaks)
    print(text)
    if not right:
        print("benchmarks: at least one result was wrong or a case failed; see above", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
