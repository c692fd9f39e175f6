#!/usr/bin/env bash
# Sanitizers over the tests: tests/tools/sanitize.sh [asan|ubsan|tsan|python|fuzz]... (default: the first four; ubsan takes eleven
# minutes of a processor, python eighteen, most of them for compiling the kernels)
#
#   asan, ubsan, tsan  the C++ tests under AddressSanitizer (with leaks), UndefinedBehaviorSanitizer, ThreadSanitizer
#   python             the Python tests on an extension built with AddressSanitizer; PYTEST_ARGS: what to run, else the tests
#                      that look at arrays, files, threads and misuse
#   fuzz               the fuzz targets with clang's libFuzzer, for NVPFLOW_FUZZ_RUNS executions each (100000)
#
# Builds lie in NVPFLOW_SANITIZE_DIR (build-sanitize beside the checkout's files). Needs cmake, ninja, doctest, and for `python`
# an environment with the packages of `pip install ".[test]"` and the build's own (CONTRIBUTING.md).
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
build=${NVPFLOW_SANITIZE_DIR:-$here/build-sanitize}
jobs=${NVPFLOW_JOBS:-$(nproc)}
say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

# What replaces malloc, or measures speed, has no sense under a sanitizer, and valgrind runs none.
left_out='realtime|instructions|symbols'

cpp() {  # NAME SANITIZER...
  local folder=$build/$1
  shift
  say "C++ tests: $*"
  cmake -S "$here" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNVPFLOW_TESTS=ON -DNVPFLOW_CUDA=OFF \
    "-DNVPFLOW_SANITIZE=$*" > /dev/null
  cmake --build "$folder" -j "$jobs"
  # ThreadSanitizer's shadow memory needs the addresses that it expects: old ones fail on kernels with much randomisation.
  local run=()
  if [ "$*" = thread ] && setarch -R true 2> /dev/null; then run=(setarch -R); fi
  # The frames that detect_stack_use_after_return makes are aligned to 32 bytes under g++ 12, and vectors of AVX-512 to 64.
  local frames=0
  if "${CXX:-g++}" --version | grep -q clang; then frames=1; fi
  ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=$frames UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
    "${run[@]}" ctest --test-dir "$folder" --output-on-failure -E "$left_out"
}

python_tests() {
  say "Python tests: address"
  local site=$build/python/site
  CMAKE_BUILD_PARALLEL_LEVEL=$jobs python -m pip install -q --no-build-isolation --no-deps --upgrade --target "$site" -C build-dir="$build/python/build" \
    -C cmake.define.NVPFLOW_CUDA=OFF -C cmake.define.NVPFLOW_SANITIZE=address -C cmake.build-type=RelWithDebInfo \
    -C install.strip=false "$here"
  local compiler=${CXX:-g++}
  # CPython keeps objects until it ends, so leaks are for the C++ tests. Tests of the speed, of memory's growth (the sanitizer
  # keeps what is freed) and of installed files are about other builds.
  local tests=()
  for name in arrays files flow functional robustness properties threads train weights; do
    tests+=("$here/tests/python/test_$name.py")
  done
  cd "$(mktemp -d)"
  # shellcheck disable=SC2086
  PYTHONPATH=$site LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=1 PYTHONMALLOC=malloc NVPFLOW_SANITIZED=1 \
    python -m pytest -q -k "not memory_does_not_grow" -p no:cacheprovider -c "$here/pyproject.toml" --rootdir "$here" ${PYTEST_ARGS:-"${tests[@]}"}
}

fuzz() {
  local folder=$build/fuzz runs=${NVPFLOW_FUZZ_RUNS:-100000}
  say "fuzz targets, $runs executions each"
  CC=${CLANG:-clang} CXX=${CLANGXX:-clang++} cmake -S "$here" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DNVPFLOW_TESTS=ON -DNVPFLOW_FUZZ=ON -DNVPFLOW_SHARED=OFF -DNVPFLOW_CUDA=OFF "-DNVPFLOW_SANITIZE=address;undefined" > /dev/null
  for name in layout file; do
    cmake --build "$folder" -j "$jobs" --target "fuzz_$name"
    mkdir -p "$folder/found_$name"
    # Thirty frames of each allocation would take an eighth of the time; four tell where it comes from.
    ASAN_OPTIONS=malloc_context_size=4 "$folder/tests/fuzz_$name" -runs="$runs" -max_len=4096 -timeout=60 -rss_limit_mb=2048 -print_final_stats=1 \
      -artifact_prefix="$folder/" "$folder/found_$name" "$here/tests/fuzz/corpus_$name" "$folder/tests/fuzz/corpus_$name"
  done
}

[ $# != 0 ] || set -- asan ubsan tsan python
for what in "$@"; do
  case $what in
    asan) cpp asan address ;;
    ubsan) cpp ubsan undefined ;;
    tsan) cpp tsan thread ;;
    python) (python_tests) ;;
    fuzz) fuzz ;;
    *) echo "usage: tests/tools/sanitize.sh [asan|ubsan|tsan|python|fuzz]..." >&2; exit 2 ;;
  esac
done
say "clean: $*"
