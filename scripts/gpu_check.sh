#!/usr/bin/env bash
# Builds, tests, sanitizes and measures frog_cuda on a machine with a GPU: a CUDA build of torch, nvcc and ninja, no network.
#
#   scripts/gpu_check.sh                    all stages
#   scripts/gpu_check.sh --only build,test  some of them, in that order: build, test, sanitize, bench
#
# Writes into $OUT (default benchmarks/results): gpu-check.json with the stages, gpu-<name of the GPU>.json with the figures,
# and a log of each stage. The last thing printed is one table. A stage that fails does not keep the next from running, and
# the exit status is 1 if any failed. PYTHON chooses the interpreter that has torch.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
stages=build,test,sanitize,bench
while [ $# -gt 0 ]; do
  case "$1" in
  --only)
    stages=${2:?--only needs a list of stages}
    shift 2
    ;;
  *)
    echo "gpu_check: unknown argument $1; accepted is --only build,test,sanitize,bench" >&2
    exit 2
    ;;
  esac
done
for name in ${stages//,/ }; do
  case "$name" in
  build | test | sanitize | bench) ;;
  *)
    echo "gpu_check: unknown stage $name; accepted are build, test, sanitize, bench" >&2
    exit 2
    ;;
  esac
done

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

build() { # for this GPU alone: minutes less than for every architecture
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  export TORCH_CUDA_ARCH_LIST
  FROG_CUDA_BUILD=cuda "$PYTHON" setup.py --quiet build_ext --inplace
}

# Files without such tests are not even imported: one may need what this machine does not have.
run_tests() {
  local files
  mapfile -t files < <(grep -l 'mark\.cuda' tests/test_*.py)
  "$PYTHON" -m pytest -q -rfE -m cuda -p no:cacheprovider --tb=short "${files[@]}"
}

# Each operator once on the device; racecheck is slow, so it sees the operators that share memory between threads.
sanitize() {
  command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not on PATH"
    return 1
  }
  local chosen="test_equals_cpu and float32"
  compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 5 \
    "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider --tb=short tests/test_on_gpu.py -k "$chosen" || return
  compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 5 \
    "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider --tb=short tests/test_on_gpu.py \
    -k "$chosen and (gram or cholesky or linear_jvp or softmax or attention or normalization)"
}

bench() {
  "$PYTHON" benchmarks/gpu.py --out "$OUT"
}

declare -A status seconds limit=([build]=150 [test]=120 [sanitize]=150 [bench]=120)
failed=0
export OUT PYTHON
export -f build run_tests sanitize bench
for name in ${stages//,/ }; do
  echo "== $name"
  body=$name
  [ "$name" = test ] && body=run_tests
  start=$SECONDS
  timeout "${limit[$name]}" bash -c "set -uo pipefail; $body" 2>&1 | tee "$OUT/gpu-check-$name.log"
  code=${PIPESTATUS[0]}
  seconds[$name]=$((SECONDS - start))
  if [ "$code" -eq 0 ]; then status[$name]=passed; elif [ "$code" -eq 124 ]; then status[$name]="over its limit"; else status[$name]=failed; fi
  [ "$code" -eq 0 ] || failed=1
done

{
  echo '{'
  comma=
  for name in ${stages//,/ }; do
    printf '%s  "%s": {"status": "%s", "seconds": %d}' "$comma" "$name" "${status[$name]}" "${seconds[$name]}"
    comma=$',\n'
  done
  printf '\n}\n'
} >"$OUT/gpu-check.json"

echo
printf '%-10s %-16s %s\n' stage status seconds
for name in ${stages//,/ }; do printf '%-10s %-16s %d\n' "$name" "${status[$name]}" "${seconds[$name]}"; done
exit $failed
