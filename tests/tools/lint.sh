#!/usr/bin/env bash
# Linters for C++: tests/tools/lint.sh [tidy|includes|cppcheck]... (default: tidy, which covers includes, and cppcheck)
#
#   tidy      clang-tidy with the checks of .clang-tidy, three minutes of one processor in all; NVPFLOW_LINT_FILES: a pattern of
#             the files' names, else all
#   includes  its misc-include-cleaner alone: each file includes what it uses and nothing else; --fix mends it
#   cppcheck  with what tests/tools/cppcheck.txt lets pass
#
# Needs what `pip install ".[lint]"` brings, the packages of the build, and for cppcheck `apt-get install cppcheck`. The folder
# NVPFLOW_LINT_DIR (build-lint beside the checkout's files) holds how each file is compiled; nothing is built.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${NVPFLOW_LINT_DIR:-$PWD/build-lint}
jobs=${NVPFLOW_JOBS:-$(nproc)}
say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

# One line a file, with the options of its first compilation: the kernels are compiled once per instruction set.
sources() {
  [ -e "$build/sources" ] && [ "$build/sources" -nt CMakeLists.txt ] && return
  cmake -S . -B "$build/all" -G Ninja -DNVPFLOW_TESTS=ON -DNVPFLOW_PYTHON=ON -DNVPFLOW_CUDA=EMULATED -DNVPFLOW_HARDENING=OFF \
    -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" > /dev/null
  python - "$build" << 'SCRIPT'
import json, re, sys
from pathlib import Path

build = Path(sys.argv[1])
entries = {e["file"]: e for e in reversed(json.loads((build / "all/compile_commands.json").read_text()))}
ours = [e for name, e in entries.items() if re.search(r"/(cpp/src|python/src|cuda)/.*\.cpp$", name)]
(build / "compile_commands.json").write_text(json.dumps(ours))
(build / "sources").write_text("".join(f"{e['file']}\n" for e in sorted(ours, key=lambda e: e["file"])))
SCRIPT
}

tidy() {  # ARGUMENT...
  local version
  version=$(clang-tidy --version | grep -oE '[0-9]+' | head -1)
  [ "$version" -ge 21 ] || { echo "clang-tidy $version cannot read .clang-tidy: pip install \".[lint]\"" >&2; return 1; }
  sources
  grep -E "${NVPFLOW_LINT_FILES:-.}" "$build/sources" | xargs -r -P "$jobs" -n 1 clang-tidy --quiet -p "$build" "$@" 2> "$build/errors" || {
    grep -E 'error:' "$build/errors" || true
    return 1
  }
}

run_cppcheck() {
  # The value of a macro is unknown to it, and a module's entry is one.
  cppcheck --enable=warning,style,performance,portability --std=c++20 --language=c++ --inline-suppr --quiet --error-exitcode=1 \
    -j "$jobs" --suppressions-list=tests/tools/cppcheck.txt --template='{file}:{line}: {severity}: {message} [{id}]' \
    -I cpp/include -I cpp/src -DNVPFLOW_HAVE_X86 '-DNVPFLOW_VERSION="0"' '-DPYBIND11_MODULE(name,module,...)=void name(py::module_& module)' \
    cpp/src python/src cuda cpp/examples tests/cpp tests/fuzz
}

[ $# != 0 ] || set -- tidy cppcheck
fix=()
for what in "$@"; do
  case $what in
    --fix) fix=(--fix) jobs=1 ;;
    tidy) say "clang-tidy" && tidy ;;
    includes)
      say "includes"
      tidy '--checks=-*,misc-include-cleaner' "${fix[@]}" || [ ${#fix[@]} != 0 ]
      if [ ${#fix[@]} != 0 ]; then
        # It writes our own public headers between quotes, and other folders' headers with their whole path.
        xargs sed -i -E 's|#include "(nvpflow/[a-z]+\.hpp)"|#include <\1>|' < "$build/sources"
        if xargs grep -n '#include "/' < "$build/sources"; then echo "make these paths relative" >&2; exit 1; fi
      fi
      ;;
    cppcheck) say "cppcheck" && run_cppcheck ;;
    *) echo "usage: tests/tools/lint.sh [--fix] [tidy|includes|cppcheck]..." >&2; exit 2 ;;
  esac
done
say "nothing found: $*"
