#!/usr/bin/env bash
# What only a machine with a GPU can tell: tests/gpu_check.sh OUTDIR [STAGE...]
#
# Builds the extension with the nvcc that is there, runs the tests marked gpu, compute-sanitizer's memcheck and racecheck,
# the benchmark, and initcheck, in this order and in nine minutes (NVPFLOW_GPU_SECONDS): a stage gets what is left of
# them at most. Leaves logs and gpu.json in OUTDIR. Needs nvcc, cmake, ninja, a python3 with numpy, pytest,
# hypothesis, mpmath, pybind11 and scikit-build-core (PyTorch, CuPy and JAX where they are), and nlohmann/json.hpp; no
# network. Where something of that is missing, a folder of wheels named by NVPFLOW_WHEELS (default: .whl in the checkout)
# is installed first; a bare machine has no nlohmann-json, and one without PyTorch no mpmath, so bring them, from one
# with a network:
#
#   python3 -m pip download --no-deps -d .whl nlohmann-json mpmath
#
# NVPFLOW_JSON_INCLUDE names a folder with nlohmann/json.hpp instead. Stages: build tests sanitizer benchmark initcheck.
# shellcheck disable=SC2329  # stages are functions that are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?usage: tests/gpu_check.sh OUTDIR [STAGE...]}
shift
stages=${*:-build tests sanitizer benchmark initcheck}
seconds=${NVPFLOW_GPU_SECONDS:-540}
mkdir -p "$out"
out=$(cd "$out" && pwd)
site=${NVPFLOW_SITE:-/tmp/nvpflow_gpu_site}
# JAX would take three quarters of the device's memory for itself.
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH="$site/nvpflow:$site/wheels${PYTHONPATH:+:$PYTHONPATH}"
summary=$out/summary.txt
: > "$summary"
failed=0

# stage NAME SECONDS COMMAND...: with a time limit, output to NAME.log, a line in the summary.
stage() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  if [ $((seconds - start)) -lt 15 ]; then
    failed=1
    printf '%-22s %s\n' "$name" "not run: ${start}s of ${seconds}s are over" >> "$summary"
    return 1
  fi
  if [ "$limit" -gt $((seconds - start - 5)) ]; then limit=$((seconds - start - 5)); fi
  printf '=== %s (at %ss)\n' "$name" "$SECONDS"
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  local verdict=passed
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then verdict="OUT OF TIME after ${limit}s"; elif [ "$code" != 0 ]; then verdict="FAILED ($code)"; fi
  printf '%-22s %-24s %4ss\n' "$name" "$verdict" "$((SECONDS - start))" >> "$summary"
  [ "$code" = 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
  return "$code"
}

wanted() { case " $stages " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

install_wheels() {
  local wheels=${NVPFLOW_WHEELS:-.whl}
  ls "$wheels"/*.whl > /dev/null 2>&1 || return 0
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site/wheels" "$wheels"/*.whl
}

json_include() {
  python3 - <<'PYTHON'
import importlib.util as u, os, pathlib as p
def folders():
    yield os.environ.get("NVPFLOW_JSON_INCLUDE", "")
    for package in ("nlohmann_json", "torch"):
        spec = u.find_spec(package)
        for place in (spec.submodule_search_locations if spec else None) or []:
            yield p.Path(place) / "include"
    yield "/usr/include"
print(next((str(f) for f in folders() if f and (p.Path(f) / "nlohmann/json.hpp").exists()), ""))
PYTHON
}

build() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv || true
  nvcc --version
  install_wheels || return 1
  local json
  json=$(json_include)
  [ -n "$json" ] || {
    echo "nlohmann/json.hpp not found: set NVPFLOW_JSON_INCLUDE, or bring its wheel ('pip download --no-deps -d .whl nlohmann-json')"
    return 1
  }
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) python3 -m pip install . --no-build-isolation --no-deps --no-index --upgrade \
    --target "$site/nvpflow" -C build-dir="$site/build" -C cmake.define.NVPFLOW_CUDA="${NVPFLOW_CUDA:-ON}" \
    -C cmake.define.NVPFLOW_JSON_INCLUDE="$json" -C cmake.define.CMAKE_CUDA_FLAGS=--split-compile=0 -v
}

# The sanitizer slows kernels down a hundredfold: a script that touches every kernel once, not the tests, and stops in time.
touch_kernels() { compute-sanitizer --tool "$1" --error-exitcode 9 --require-cuda-init=no python3 tests/tools/gpu_touch.py 28; }
export -f build install_wheels json_include touch_kernels
export site

if wanted build; then stage build 200 bash -c build || { cat "$summary"; exit 1; }; fi
if wanted tests; then
  # The files that have any, so that nobody else's imports count. Other libraries may warn.
  mapfile -t files < <(grep -l 'mark\.gpu' tests/python/test_*.py)
  stage tests 120 python3 -m pytest -q -p no:cacheprovider -W default -m gpu "${files[@]}"
  stage why 20 python3 -c "import nvpflow; print(nvpflow.cuda.why_unavailable()); print(nvpflow.cuda.device_name())"
fi
sanitize() {  # TOOL...
  local tool
  if ! command -v compute-sanitizer > /dev/null; then
    printf '%-22s %s\n' "$*" 'skipped: no compute-sanitizer' >> "$summary"
    return
  fi
  for tool in "$@"; do
    stage "$tool" 40 bash -c "touch_kernels $tool"
    grep 'NOT REACHED' "$out/$tool.log" >> "$summary"
  done
}
if wanted sanitizer; then sanitize memcheck racecheck; fi
if wanted benchmark; then
  # shellcheck disable=SC2086  # options, split at blanks
  stage benchmark "${NVPFLOW_BENCHMARK_SECONDS:-140}" python3 tests/bench/gpu.py --json "$out/gpu.json" --seconds 110 ${NVPFLOW_BENCHMARK_OPTIONS:-}
  [ -e "$out/benchmark.log" ] && tail -n 60 "$out/benchmark.log"
fi
if wanted initcheck; then sanitize initcheck; fi
printf '\n'
cat "$summary"
exit "$failed"
