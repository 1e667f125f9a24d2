#!/usr/bin/env bash
# Builds, tests, sanitizes and measures frog_cuda on a machine with a GPU: a CUDA build of torch, nvcc and ninja, no network.
#
#   scripts/gpu_check.sh                    all stages
#   scripts/gpu_check.sh --only build,test  some of them, in that order: build, test, memcheck, racecheck, bench
#
# Writes into $OUT (default benchmarks/results): gpu-check.json with the stages, gpu-<name of the GPU>.json with the figures,
# and a log of each stage. The last thing printed is one table. A stage that fails does not keep the next from running, and
# the exit status is 1 if any failed. PYTHON chooses the interpreter that has torch.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
stages=build,test,memcheck,racecheck,bench
while [ $# -gt 0 ]; do
  case "$1" in
  --only)
    stages=${2:?--only needs a list of stages}
    shift 2
    ;;
  *)
    echo "gpu_check: unknown argument $1; accepted is --only build,test,memcheck,racecheck,bench" >&2
    exit 2
    ;;
  esac
done
for name in ${stages//,/ }; do
  case "$name" in
  build | test | memcheck | racecheck | bench) ;;
  *)
    echo "gpu_check: unknown stage $name; accepted are build, test, memcheck, racecheck, bench" >&2
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
  FROG_CUDA_NEEDS_GPU=1 "$PYTHON" -m pytest -q -rfE -m cuda -p no:cacheprovider --tb=short "${files[@]}"
}

# Each operator on small tensors in float32 and bfloat16; and what those do not reach: the tiles of linear layers for few and
# many rows, tensor-core attention over several blocks of keys. --report-api-errors no: libraries try calls that may fail.
sanitized() { # tool
  command -v compute-sanitizer >/dev/null || {
    echo "compute-sanitizer is not on PATH"
    return 1
  }
  local dtypes="(float32 or bfloat16)" chosen
  chosen="test_equals_cpu and $dtypes or test_layers_of_every_size and $dtypes"
  chosen+=" or test_on_a_gpu and bfloat16 and 260 and not False"
  FROG_CUDA_NEEDS_GPU=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 --report-api-errors no \
    "$PYTHON" -m pytest -q -rfE -m cuda -p no:cacheprovider --tb=short \
    tests/test_on_gpu.py tests/test_cuda_linear.py tests/test_cuda_attention.py \
    -k "$chosen"
}

# PyTorch would take memory in pieces of megabytes, and an access past the end of a tensor would lie in the same piece.
memcheck() { PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitized memcheck; }

racecheck() { sanitized racecheck; }

bench() { # what it has begun by then ends within the limit
  "$PYTHON" benchmarks/gpu.py --seconds 85 --out "$OUT"
}

declare -A status seconds limit=([build]=180 [test]=130 [memcheck]=60 [racecheck]=60 [bench]=110)
failed=0
export OUT PYTHON
export -f build run_tests sanitized memcheck racecheck bench
# At its limit a stage is interrupted, so that pytest and the benchmark print what they have; what hangs is killed after that.
# A script in the background would ignore interrupts, and its children with it, were it not for env.
limited=(timeout -s INT -k 10)
env --default-signal=INT true 2>/dev/null && limited=(env --default-signal=INT "${limited[@]}")
for name in ${stages//,/ }; do
  echo "== $name"
  body=$name
  [ "$name" = test ] && body=run_tests
  start=$SECONDS
  "${limited[@]}" "${limit[$name]}" bash -c "set -uo pipefail; $body" 2>&1 | tee "$OUT/gpu-check-$name.log"
  code=${PIPESTATUS[0]}
  seconds[$name]=$((SECONDS - start))
  case "$code" in
  0) status[$name]=passed ;;
  124 | 137) status[$name]="over its limit" ;;
  *) status[$name]=failed ;;
  esac
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
