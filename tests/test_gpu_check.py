"""scripts/gpu_check.sh and benchmarks/gpu.py, as far as they can be run without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from operator_samples import schemas

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from problems import Problem  # noqa: E402

SCRIPT = ROOT / "scripts" / "gpu_check.sh"

# Stands for the interpreter with torch: writes down what it is asked for; what $FAIL names fails.
_PYTHON = """#!/bin/sh
case "$*" in
"-c import torch"*) echo 9.0; exit ;;
"setup.py"*) what="build $TORCH_CUDA_ARCH_LIST $FROG_CUDA_BUILD" ;;
"-m pytest"*) what=test; (IFS="	"; echo "$*") >>"$LOG.pytest" ;;
"benchmarks/gpu.py"*) what=bench ;;
esac
echo "$what" >>"$LOG"
[ "$FAIL" = "slow $what" ] && { trap "echo interrupted; exit 1" INT; while :; do sleep 0.1; done; }
case "$what" in "$FAIL"*) exit 3 ;; esac
"""


STAGES = ["build", "test", "memcheck", "racecheck", "bench"]


def check(
    folder: Path, *arguments: str, fail: str = "nothing", script: Path = SCRIPT
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    for name, text in (
        ("python", _PYTHON),
        ("compute-sanitizer", '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\n"$@"\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = folder / "log"
    log.write_text("")
    environment = os.environ | {"PYTHON": str(folder / "python"), "OUT": str(folder / "out"), "LOG": str(log), "FAIL": fail}
    environment["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run([str(script), *arguments], env=environment, capture_output=True, text=True)
    return run, log.read_text().splitlines()


pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def test_all_stages(tmp_path):
    run, did = check(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert did == ["build 9.0 cuda", "test", "test", "test", "bench"]
    stages = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert {name: s["status"] for name, s in stages.items()} == dict.fromkeys(STAGES, "passed")
    assert [line.split()[0] for line in run.stdout.splitlines()[-6:]] == ["stage", *STAGES]


def test_only_files_that_have_tests_for_a_gpu_are_imported(tmp_path):
    check(tmp_path, "--only", "test")
    (line,) = (tmp_path / "log.pytest").read_text().splitlines()
    chosen = {argument for argument in line.split("\t") if argument.startswith("tests")}
    mark = "pytest.mark." + "cuda"  # in two parts, so that this file is none of them
    assert chosen == {f"tests/{p.name}" for p in (ROOT / "tests").glob("test_*.py") if mark in p.read_text()}
    assert "tests/test_on_gpu.py" in chosen and "tests/test_lr_search.py" not in chosen


@pytest.mark.parametrize("stage", ["memcheck", "racecheck"])
def test_what_is_sanitized(tmp_path, stage):
    """Every operator in 32 and 16 bits, every tile of a linear layer, attention over several blocks of keys."""
    check(tmp_path, "--only", stage)
    (line,) = (tmp_path / "log.pytest").read_text().splitlines()
    command = [sys.executable, *line.split("\t"), "--collect-only"]
    environment = os.environ | {"FROG_CUDA_NEEDS_GPU": "0"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in schemas():
        for dtype in ("float32", "bfloat16"):
            assert f"tests/test_on_gpu.py::test_equals_cpu[{name}-{dtype}]" in found
    attention = [line for line in found if "test_cuda_attention.py" in line]
    assert attention == [
        "tests/test_cuda_attention.py::test_on_a_gpu[torch.bfloat16-(True, True, True)-(1, 4, 2, 300, 260, 64, 64, 3)]"
    ]
    linear = {line.partition("[")[2] for line in found if "test_cuda_linear.py" in line}
    assert linear == {f"{dtype}-{d}]" for dtype in ("float32", "bfloat16") for d in ("normal", "rademacher")}
    assert not any("float64" in line or "float16" in line.replace("bfloat16", "") for line in found)


@pytest.mark.skipif(gpu.torch.cuda.is_available(), reason="there is a GPU")
def test_tests_that_all_want_a_gpu_are_no_success_without_one():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_on_gpu_lookup.py"]
    for needed, code in (("0", pytest.ExitCode.OK), ("1", pytest.ExitCode.USAGE_ERROR)):
        environment = os.environ | {"FROG_CUDA_NEEDS_GPU": needed}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == code, run.stdout
    assert "PyTorch finds no GPU" in run.stderr + run.stdout


@pytest.mark.parametrize("stage", ["build", "test", "bench"])
def test_no_stage_hides_the_failure_of_another(tmp_path, stage):
    run, did = check(tmp_path, "--only", "build,test,bench", fail=stage)
    assert run.returncode == 1 and len(did) == 3
    stages = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert [name for name, s in stages.items() if s["status"] == "failed"] == [stage]


def test_a_stage_over_its_limit_is_interrupted_and_named(tmp_path):
    """What it prints then is kept."""
    script = SCRIPT.read_text()
    assert "[bench]=110" in script
    quick = tmp_path / "scripts" / "gpu_check.sh"
    quick.parent.mkdir()
    quick.write_text(script.replace("[bench]=110", "[bench]=1"))
    quick.chmod(0o755)
    run, did = check(tmp_path, "--only", "bench,build", fail="slow bench", script=quick)
    assert run.returncode == 1 and did == ["bench", "build 9.0 cuda"]
    stages = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert stages["bench"]["status"] == "over its limit" and stages["build"]["status"] == "passed"
    assert "interrupted" in (tmp_path / "out" / "gpu-check-bench.log").read_text()


def test_unknown_arguments_are_named(tmp_path):
    run, did = check(tmp_path, "--only", "build,tset")
    assert run.returncode == 2 and not did
    assert f"unknown stage tset; accepted are {', '.join(STAGES)}" in run.stderr
    assert check(tmp_path, "--quick")[0].returncode == 2


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--seconds", "1000", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert all(row["seconds"] > 0 for row in result["operators"])
    assert all("seconds" in row or "left_out" in row for row in result["gradients"])
    assert {row["model"] for row in result["gradients"]} == {"fc16", "tiny-resnet18", "tiny-gpt"}
    timed = {row["method"] for row in result["gradients"] if "seconds" in row}
    assert timed >= {"backprop", "checkpointed backprop", "activity, bf16 tangents", "weight, low rank", "vmap(jvp)"}
    errors = [row["gradient_error"] for row in result["gradients"] if "gradient_error" in row]
    assert len(errors) == 3 * 2 * 4 and max(errors) < 0.2
    assert "attention k=4" in run.stdout


def test_every_model_is_measured_before_what_nobody_aims_at():
    plans = [(name, kind.name, k) for name, kind, k in gpu.plans(gpu.NETS, gpu.KS, gpu=True, compiles=True)]
    assert len(set(plans)) == len(plans)
    ends = 14 * len(gpu.NETS)  # two kinds of backprop, and two methods with and without a graph for three k
    assert {name for name, _, _ in plans[:ends]} == set(gpu.NETS)
    methods = {method.removesuffix(", CUDA graph") for _, method, _ in plans[:ends]}
    assert methods == {"backprop", "activity", "activity, bf16 tangents"}
    after = [method for _, method, _ in plans[ends:]]
    jax = [method.startswith("JAX") for method in after]
    assert any(jax) and all(jax[jax.index(True) :]) and "torch.compile, backprop" in after


def test_a_gradient_far_from_backprop_keeps_its_time_and_is_marked(monkeypatch):
    errors = iter([0.3, float("nan"), 0.1, 0.4, float("nan"), 0.1])
    monkeypatch.setattr(gpu.cases.ForwardGradient, "_error", lambda method: next(errors))
    machine, problem = gpu.Machine("cpu", tiny=True), Problem("tiny-gpt")
    row = gpu.gradient(machine, problem, gpu.cases.Activity, 1)
    assert not {"error", "unchecked", "left_out"} & set(row), row
    assert row["seconds"] > 0 and row["gradient_error"] == 0.3 and row["wrong"] == "relative error 0.3, bound 0.2"
    row |= {"model": "tiny-gpt", "method": "activity", "k": 1, "ratio": None}
    assert "wrong: relative error 0.3" in gpu._cells(row, "")
    assert gpu.gradient(machine, problem, gpu.cases.Activity, 1)["gradient_error"] == 0.4
    assert "wrong" not in gpu.gradient(machine, problem, gpu.cases.Backprop, 0)
    assert next(errors, None) is None


def test_an_interrupted_benchmark_prints_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted(machine):
        yield {"operator": "gelu", "rate": None, "ceiling": "copy", "error": "too slow"}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "operators", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    assert "failed: too slow" in capsys.readouterr().out
