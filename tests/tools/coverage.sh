#!/usr/bin/env bash
# Which lines the tests run: tests/tools/coverage.sh [build|cpp|python|report]... (default: all four)
#
# One instrumented build serves the C++ tests and the Python tests. The report lies in NVPFLOW_COVERAGE_DIR (build-coverage beside
# the checkout's files) as text and HTML; the command fails where less than 95 % of the lines of the core are run: of C++
# (cpp/src, cpp/include, python/src) by gcov, of Python (python/nvpflow) by coverage.py. All runs since the last build count.
# PYTEST_ARGS: what to run instead of all that says something about the package's own code. Needs what
# `pip install ".[test,lint]"` brings, and the build's own.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
out=${NVPFLOW_COVERAGE_DIR:-$here/build-coverage}
least=95
say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

build() {
  # With the emulated device, or the code that takes a device's arrays would have nothing to take.
  # gcov needs nothing of a debugger's, of which the kernels have so much that they take several times as long to compile.
  say "an instrumented build"
  mkdir -p "$out"
  find "$out" -name '*.gcda' -delete
  rm -f "$out"/.coverage*
  local tests="test_c_api;test_c_context;test_core;test_cuda_backend;test_elementary;test_kernels;test_parallel;test_reload;replay_file;replay_layout"
  python -m pip install -q --no-build-isolation --no-deps --upgrade --target "$out/site" -C build-dir="$out/build" \
    -C cmake.define.NVPFLOW_CUDA=EMULATED -C cmake.define.NVPFLOW_TESTS=ON -C cmake.define.CMAKE_CXX_FLAGS=--coverage \
    -C cmake.build-type=Debug -C cmake.define.CMAKE_CXX_FLAGS_DEBUG=-g0 -C install.strip=false \
    -C build.targets="_core;nvpflow_shared;$tests" "$here"
}

cpp_tests() {
  say "C++ tests"
  # test_realtime counts system calls and locks, of which the counters have some of their own; valgrind's numbers are another build's.
  # The kernels of one instruction set have the lines of all; tests of Python run the others, too.
  ctest --test-dir "$out/build" --output-on-failure -j "$(nproc)" -E 'realtime|instructions|symbols|kernels'
  "$out/build/tests/test_kernels"
}

python_tests() {
  say "Python tests"
  # Left out: what installs, builds or measures other copies of the package, what repeats calls by the thousand to see that
  # they keep no memory, how long an import takes, and the hardening, which a debug build lacks.
  local tests=()
  for file in "$here"/tests/python/test_*.py; do
    case $file in
      */test_bench.py | */test_coexistence.py | */test_docs.py | */test_embedding.py | */test_memory.py | */test_readme.py) ;;
      *) tests+=("$file") ;;
    esac
  done
  cd "$out"
  # shellcheck disable=SC2086
  PYTHONPATH=$out/site COVERAGE_FILE=$out/.coverage python -m coverage run --rcfile "$here/pyproject.toml" -m pytest -q \
    -k "not hardened and not fortified and not memory_does_not_grow and not takes_less_than" -p no:cacheprovider -c "$here/pyproject.toml" --rootdir "$here" \
    ${PYTEST_ARGS:-"${tests[@]}"}
  cd "$here"
}

report() {
  say "report"
  cd "$here"
  COVERAGE_FILE=$out/.coverage python -m coverage combine --rcfile pyproject.toml -q --keep "$out"
  local failed=0
  COVERAGE_FILE=$out/.coverage python -m coverage html --rcfile pyproject.toml -q -d "$out/python" || true
  COVERAGE_FILE=$out/.coverage python -m coverage report --rcfile pyproject.toml --fail-under "$least" | tee "$out/python.txt" || failed=1
  mkdir -p "$out/cpp"
  # A template's line counts once, however many instances and instruction sets there are of it.
  # Threads count without waiting for each other, and lose some: whether a line was run is right, how often is not.
  python -m gcovr --root "$here" --filter cpp/src/ --filter cpp/include/ --filter python/src/ --merge-lines \
    --merge-mode-functions=merge-use-line-max --gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file \
    --gcov-ignore-parse-errors=negative_hits.warn_once_per_file --fail-under-line "$least" --html-details "$out/cpp/index.html" \
    --txt "$out/cpp.txt" "$out/build" || failed=1
  cat "$out/cpp.txt"
  [ "$failed" != 0 ] || say "covered: at least $least % of the lines"
  return "$failed"
}

[ $# != 0 ] || set -- build cpp python report
for what in "$@"; do
  case $what in
    build) build ;;
    cpp) cpp_tests ;;
    python) python_tests ;;
    report) report ;;
    *) echo "usage: tests/tools/coverage.sh [build|cpp|python|report]..." >&2; exit 2 ;;
  esac
done
