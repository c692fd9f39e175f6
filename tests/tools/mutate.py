"""Do the tests notice when the code is wrong? Changes the code in small ways, and runs the tests on each of them.

    python tests/tools/mutate.py                        # all mutants of all files (some hours)
    python tests/tools/mutate.py --file cpp/src/io/safetensors.cpp --seconds 20        # a first look (half an hour)
    python tests/tools/mutate.py --file cpp/src/io/safetensors.cpp --limit 50 --seed 1
    python tests/tools/mutate.py --scratch FOLDER       # keeps the build there, for the next time

A mutant is one operator, number, condition or statement changed (mutation/mutators.py). All of them are compiled into
one build of a copy of the tree and switched on one at a time, by an environment variable. A first run notes which
tests come past which mutant; then only those are run on it, quickest first. A mutant that no test fails for survives.
It is a hole in the tests, or it changes nothing that anybody can see: then it stands, with the reason, in
mutation/equivalent.toml. The command fails where a survivor is not there, and where an entry there is of no use.

Mutants of code that writes files can write anywhere. So they run where the whole file system can only be read, but for
a folder of their own (Linux: namespaces of `unshare`, as root or where users may make them), with limits of time and
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tomllib
from mutation.mutators import Mutant, instrument, mutants_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = HERE / "mutation"
EQUIVALENT = PARTS / "equivalent.toml"
NOTES_BYTES = 1 << 16  # kMost in mutant.hpp

# What is mutated: the bytes of files, and the checks of what comes from outside.
FILES = (
    "cpp/src/io/atomic_file.cpp",
    "cpp/src/io/descriptor.hpp",
    "cpp/src/io/metadata_json.cpp",
    "cpp/src/io/model_file.cpp",
    "cpp/src/io/safetensors.cpp",
    "cpp/src/io/spec_json.cpp",
    "cpp/src/spec.cpp",
    "cpp/include/nvpflow/overlap.hpp",
    "python/src/arrays.cpp",
    "python/src/host_arrays.cpp",
    "python/src/layout.hpp",
    "python/nvpflow/_checks.py",
)
DOCTESTS = ("test_core",)  # each case of theirs is a test
REPLAYS = (("replay_layout", str(ROOT / "tests/fuzz/corpus_layout"), "{build}/fuzz/corpus_layout"),)
TESTS = (
    "arrays", "checks", "faults", "files", "flow", "functional", "gradients", "interop", "properties", "robustness",
    "weights",
)  # fmt: skip
MEMORY_BYTES = 12 << 30  # of addresses; the libraries of Python reserve some gigabytes

SANDBOX = r"""
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
awk '{print $5}' /proc/self/mountinfo | while read -r point; do
  [ "$point" = "$1" ] || mount -o remount,bind,ro "$point" 2> /dev/null || true
done
# The last line of a place is what lies on top there.
open=$(awk -v own="$1" '$5 != own {how[$5] = $6} END {for (at in how) if (how[at] ~ /^rw/) print at}' \
  /proc/self/mountinfo)
[ -z "$open" ] || { echo "can still be written to: $open" >&2; exit 99; }
shift
exec "$@"
"""


def sandboxed(writable: Path, command: list[str]) -> list[str]:
    """The command in a world that it can only read, but for one folder; its processes end with it."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    limits = ["prlimit", f"--as={MEMORY_BYTES}", "--core=0", "--"]
    return [*unshare, "sh", "-c", SANDBOX, "sh", str(writable), *limits, *command]


def check_sandbox(scratch: Path) -> None:
    """Refuse to go on where a file outside the folder could be written."""
    probe = scratch / "run" / "probe"
    script = 'touch "$1"; ! touch "$2" && ! touch /dev/nvpflow-probe && ! mv "$1" /dev/null'
    command = ["sh", "-c", script, "sh", str(probe), str(ROOT / "nvpflow-probe")]
    done = subprocess.run(sandboxed(probe.parent, command), capture_output=True, text=True)
    if done.returncode != 0 or not Path("/dev/null").is_char_device():
        sys.exit(f"no mutant is run: this system gives them no file system that is read-only ({done.stderr.strip()})")
    probe.unlink()


# ---- the build ------------------------------------------------------------------------------------------------------


def copy_tree(target: Path) -> None:
    """What git tracks or would track, with its times, so that a second build has little to do."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_file() and not (copy.exists() and copy.stat().st_mtime == source.stat().st_mtime):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def configure(scratch: Path) -> None:
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    )
    options = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS_DEBUG": "-O1 -g0",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "NVPFLOW_CUDA": "OFF",
        "NVPFLOW_PYTHON": "ON",
        "NVPFLOW_SHARED": "OFF",
        "NVPFLOW_TESTS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.stdout.strip(),
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", scratch / "tree", "-B", scratch / "build", "-G", "Ninja", *defines], check=True)


def compile_errors(scratch: Path, file: str) -> set[int]:
    """Lines of the file in the copy at which the compiler finds an error."""
    commands = json.loads((scratch / "build" / "compile_commands.json").read_text())
    users = {
        "cpp/src/io/descriptor.hpp": "cpp/src/io/safetensors.cpp",
        "cpp/include/nvpflow/overlap.hpp": "tests/fuzz/layout.cpp",
        "python/src/layout.hpp": "tests/fuzz/layout.cpp",
    }
    user = users.get(file, file)
    entry = next(entry for entry in commands if entry["file"] == str(scratch / "tree" / user))
    words = shlex.split(entry["command"])
    del words[words.index("-o") : words.index("-o") + 2]
    done = subprocess.run([*words, "-fsyntax-only"], cwd=entry["directory"], capture_output=True, text=True)
    lines = {int(line) for line in re.findall(re.escape(file) + r":(\d+):\d+: error", done.stderr)}
    if done.returncode != 0 and not lines:
        sys.exit(done.stderr)
    return lines


def write_mutants(scratch: Path, file: str, mutants: list[Mutant]) -> list[Mutant]:
    """Write the file with its mutants into the copy; return those that a compiler takes."""
    source = (ROOT / file).read_text()
    python = file.endswith(".py")
    copy = scratch / "tree" / file
    for _ in range(8):
        text = instrument(source, mutants, python=python)
        if python:
            copy.write_text('"""Mutated."""\nfrom nvpflow._mutant import _raise, mutant\n' + text)
            return mutants
        text = f'#include "{PARTS / "mutant.hpp"}"\n#line 1 "{copy}"\n{text}'
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
        lines = compile_errors(scratch, file)
        if not lines:
            return mutants

        def covers(mutant: Mutant, lines: set[int] = lines) -> bool:
            first, last = (source.count("\n", 0, place) + 1 for place in (mutant.begin, mutant.end))
            return any(first <= line <= last for line in lines)

        # Arithmetic is the likeliest not to exist for a type.
        wrong = [m for m in mutants if covers(m) and m.what[0] in "+-*/%" and m.form == "expression"]
        wrong = wrong or [m for m in mutants if covers(m)]
        if not wrong:
            break
        mutants = [m for m in mutants if m not in wrong]
    sys.exit(f"{copy} does not compile with its mutants")


def build(scratch: Path, jobs: int) -> None:
    targets = [*DOCTESTS, *(program for program, *_ in REPLAYS), "_core"]
    subprocess.run(["cmake", "--build", scratch / "build", "-j", str(jobs), "--target", *targets], check=True)
    site = scratch / "site" / "nvpflow"
    shutil.rmtree(site.parent, ignore_errors=True)
    shutil.copytree(scratch / "tree/python/nvpflow", site)
    shutil.copy2(next((scratch / "build/python").glob("_core*.so")), site)
    shutil.copy2(PARTS / "switch.py", site / "_mutant.py")


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Test:
    """One test of pytest, or the command that is the test."""

    name: str
    command: list[str] = field(default_factory=list)
    seconds: float = 0.0
    reached: set[int] = field(default_factory=set)


class Runner:
    """Runs tests in the sandbox, with a mutant switched on or none."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    def run(self, folder: Path, command: list[str], timeout: float, *, writable: Path | None = None, **env: str):
        """The exit status; None where the time was over."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # the first run compiles the tests for all later ones
            "PYTHONPATH": os.pathsep.join([str(self.scratch / "site"), str(PARTS)]),
            "TMPDIR": str(folder),
            **env,
        }
        log = folder.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                sandboxed(writable or folder, command), cwd=folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()  # and with it all that lives in its namespace
                process.wait()
                return None

    def programs(self) -> list[Test]:
        """What is no test of pytest."""
        folder = self.scratch / "build/tests"
        tests = []
        for name in DOCTESTS:
            program = str(folder / name)
            listed = subprocess.run([program, "-ltc", "-nh", "-nv"], capture_output=True, text=True, check=True)
            cases = [line for line in listed.stdout.splitlines() if line and not line.startswith(("[doctest]", "==="))]
            # In a filter a comma begins the next one, and ? stands for any character.
            tests += [Test(case, [program, "-tc=" + re.sub(r'[,"\\*]', "?", case)]) for case in cases]
        replays = [(name, [word.format(build=folder) for word in words]) for name, *words in REPLAYS]
        return tests + [Test(name, [str(folder / name), *words]) for name, words in replays]

    def pytest(self, *arguments: str) -> list[str]:
        tree = self.scratch / "tree"
        fixed = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(tree / "pyproject.toml"), "--rootdir", str(tree)]
        return [sys.executable, "-m", "pytest", *fixed, *arguments]


def first_run(runner: Runner, python: bool) -> tuple[list[Test], list[Test]]:
    """All tests without a mutant: how long they take, and which mutants they come past."""
    folder = runner.scratch / "run" / "first"
    reached = runner.scratch / "run" / "reached"
    programs = runner.programs()

    def fail(what: str) -> None:
        sys.exit(f"{what} fails without any mutant:\n{folder.with_suffix('.log').read_text()[-4000:]}")

    for program in programs:
        reached.write_bytes(bytes(NOTES_BYTES))
        began = time.monotonic()
        status = runner.run(folder, program.command, 600, writable=runner.scratch, NVPFLOW_MUTANTS_REACHED=str(reached))
        if status != 0:
            fail(program.name)
        program.seconds = time.monotonic() - began
        program.reached = {number for number, byte in enumerate(reached.read_bytes()) if byte}
    programs.sort(key=lambda test: test.seconds)
    if not python:
        return programs, []
    notes_path = runner.scratch / "run" / "notes.json"
    reached.write_bytes(bytes(NOTES_BYTES))
    files = [str(runner.scratch / f"tree/tests/python/test_{name}.py") for name in TESTS]
    # Written to: the compiled files of the tests, which every later run reads.
    status = runner.run(
        folder, runner.pytest("-p", "plugin", *files), 1800, writable=runner.scratch,
        NVPFLOW_MUTANTS_REACHED=str(reached), NVPFLOW_MUTATION_NOTES=str(notes_path),
    )  # fmt: skip
    if status != 0:
        fail("pytest")
    notes = json.loads(notes_path.read_text())
    # A name that changes from run to run (an address in it) cannot be asked for: pytest fails, whatever the mutant.
    names = runner.scratch / "run" / "names.txt"
    names.write_text("\n".join(str(runner.scratch / "tree" / name) for name in notes))
    if runner.run(folder, runner.pytest("--collect-only", f"@{names}"), 600) != 0:
        fail("pytest, asked for each test by its name,")
    tests = [Test(name, [], note["seconds"], set(note["reached"])) for name, note in notes.items()]
    return programs, in_turn(tests)


def in_turn(tests: list[Test]) -> list[Test]:
    """The quickest of each file, then the second of each: one file's tests look at much the same things. Slow ones
    come last."""
    turns: Counter[str] = Counter()
    places = {}
    for test in sorted(tests, key=lambda test: test.seconds):
        file = test.name.split("::")[0]
        places[test.name] = (test.seconds > 0.1, turns[file], test.seconds)
        turns[file] += 1
    return sorted(tests, key=lambda test: places[test.name])


def quickest(tests: list[Test], number: int, seconds: float) -> list[Test]:
    """Of the tests that come past the mutant, the quickest that take no longer than so many seconds together."""
    chosen = set()
    for test in sorted(tests, key=lambda test: test.seconds):
        if number in test.reached and (seconds := seconds - test.seconds) >= 0:
            chosen.add(test.name)
    return [test for test in tests if test.name in chosen]


def try_mutant(runner: Runner, mutant: Mutant, programs: list[Test], tests: list[Test], seconds: float) -> str:
    """What noticed the mutant; "" for nothing."""
    folder = runner.scratch / "run" / f"mutant-{mutant.number}"
    switch = {"NVPFLOW_MUTANT": str(mutant.number)}
    try:
        chosen = quickest(programs, mutant.number, seconds)
        if chosen:
            # In one world, which takes longer to make than most of these to run.
            log = shlex.quote(str(folder / "log"))
            lines = (f"echo {shlex.quote(test.name)}; {shlex.join(test.command)} > {log} || exit" for test in chosen)
            script = "\n".join(lines)
            status = runner.run(folder, ["sh", "-c", script], 20 + 3 * sum(t.seconds for t in chosen), **switch)
            if status != 0:
                name = folder.with_suffix(".log").read_text().split("\n")[-2]
                return name if status is not None else f"{name}, which did not end"
        chosen = quickest(tests, mutant.number, seconds)
        if chosen:
            folder.mkdir(exist_ok=True)
            names = folder / "tests.txt"
            names.write_text("\n".join(str(runner.scratch / "tree" / test.name) for test in chosen))
            status = runner.run(folder, runner.pytest(f"@{names}"), 30 + 3 * sum(t.seconds for t in chosen), **switch)
            if status != 0:
                found = re.findall(
                    r"^(?:FAILED|ERROR) (\S+)", folder.with_suffix(".log").read_text(errors="replace"), re.M
                )
                return found[0].split("/")[-1] if found else f"pytest, status {status}"
        return ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)


# ---- the report -----------------------------------------------------------------------------------------------------


def numbered(mutants: list[Mutant]) -> dict[tuple[str, str, str, int], Mutant]:
    """Mutants by file, line, change, and their number among those of the same three."""
    seen: Counter[tuple[str, str, str]] = Counter()
    by_key = {}
    for mutant in mutants:
        seen[mutant.key] += 1
        by_key[(*mutant.key, seen[mutant.key])] = mutant
    return by_key


def known_equivalent() -> dict[tuple[str, str, str, int], str]:
    entries = tomllib.loads(EQUIVALENT.read_text()).get("mutant", [])
    return {(e["file"], e["line"], e["change"], e.get("nth", 1)): e["reason"] for e in entries}


def entry_text(key: tuple[str, str, str, int]) -> str:
    """A survivor as an entry of equivalent.toml, less the reason."""
    file, line, change, nth = key
    texts = {"file": file, "line": line, "change": change}
    text = "[[mutant]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in texts.items())
    return text + (f"nth = {nth}\n" if nth > 1 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--file", action="append", choices=FILES, help="a file to mutate, more than once (default: all)"
    )
    parser.add_argument("--limit", type=int, help="so many mutants of each file, drawn at random")
    parser.add_argument("--lines", help="only the mutants of lines FIRST-LAST")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: the processors)"
    )
    parser.add_argument("--scratch", type=Path, help="where the copy is built and kept (default: a temporary folder)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"),
        help="of C++ tests and of Python tests on each mutant, quickest first; what survives those may not survive all",
    )  # fmt: skip
    parser.add_argument("--no-python", action="store_true", help="the C++ tests alone")
    parser.add_argument("--survivors", type=Path, help="write them there, as entries for equivalent.toml")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    arguments = parser.parse_args()

    files = arguments.file or list(FILES)
    mutants = [mutant for file in FILES for mutant in mutants_of(file, (ROOT / file).read_text())]
    for number, mutant in enumerate(mutants):
        mutant.number = number
    by_key = numbered(mutants)
    if arguments.list:
        for file, line, change, nth in by_key:
            print(f"{file}: {change}{f' ({nth})' if nth > 1 else ''}: {line}")
        return 0
    if stale := [key for key in known_equivalent() if key not in by_key]:
        print("equivalent.toml names mutants that there are not:", *map(entry_text, stale), sep="\n")
        return 1

    scratch = (arguments.scratch or Path(tempfile.mkdtemp(prefix="nvpflow-mutants-"))).resolve()
    try:
        return run(arguments, scratch, files, mutants, by_key)
    finally:
        if arguments.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)


def run(arguments, scratch: Path, files: list[str], mutants: list[Mutant], by_key) -> int:
    (scratch / "run").mkdir(parents=True, exist_ok=True)
    check_sandbox(scratch)
    copy_tree(scratch / "tree")
    configure(scratch)
    compiled = []
    for file in FILES:
        mine = [mutant for mutant in mutants if mutant.file == file]
        compiled += write_mutants(scratch, file, mine)  # of those that are not tried, too: one build is kept
    build(scratch, arguments.jobs)

    draw = random.Random(arguments.seed)
    chosen = []
    for file in files:
        mine = [mutant for mutant in compiled if mutant.file == file]
        if arguments.lines:
            first, last = map(int, arguments.lines.split("-"))
            mine = [mutant for mutant in mine if first <= mutant.line <= last]
        chosen += mine if arguments.limit is None else draw.sample(mine, min(arguments.limit, len(mine)))

    runner = Runner(scratch)
    print("the tests without a mutant", flush=True)
    programs, tests = first_run(runner, not arguments.no_python)
    began, results = time.monotonic(), {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = pool.map(lambda mutant: try_mutant(runner, mutant, programs, tests, arguments.seconds), chosen)
        for done, (mutant, noticed) in enumerate(zip(chosen, outcomes, strict=True), 1):
            results[mutant.number] = noticed
            if not noticed:
                print(f"\ralive: {mutant.file}:{mutant.line}: {mutant.what}{'':20}\n    {mutant.source}")
            alive = sum(not result for result in results.values())
            print(
                f"\r{done} of {len(chosen)} mutants, {alive} alive, {time.monotonic() - began:.0f} s",
                end="",
                flush=True,
            )
    print()
    if not Path("/dev/null").is_char_device():
        sys.exit("/dev/null is no device any more: a mutant broke out of its sandbox")
    return report(arguments, files, compiled, chosen, results, by_key, programs + tests)


def report(arguments, files, compiled, chosen, results, by_key, tests) -> int:
    equivalent = known_equivalent()
    keys = {mutant.number: key for key, mutant in by_key.items()}
    reached = set().union(*(test.reached for test in tests))
    print(f"\n{'file':<28}{'mutants':>9}{'tried':>7}{'killed':>8}{'equivalent':>12}{'alive':>7}")
    alive = []
    for file in files:
        tried = [mutant for mutant in chosen if mutant.file == file]
        survivors = [mutant for mutant in tried if not results[mutant.number]]
        mine = [mutant for mutant in survivors if keys[mutant.number] not in equivalent]
        alive += mine
        counts = (sum(m.file == file for m in compiled), len(tried), len(tried) - len(survivors))
        print(f"{file:<28}{counts[0]:>9}{counts[1]:>7}{counts[2]:>8}{len(survivors) - len(mine):>12}{len(mine):>7}")
    print("\nalive, and not listed as equivalent:" if alive else "")
    for mutant in sorted(alive, key=lambda mutant: (mutant.file, mutant.line)):
        note = "" if mutant.number in reached else "  (no test comes here)"
        print(f"{mutant.file}:{mutant.line}: {mutant.what}{note}\n    {mutant.source}")
    if arguments.survivors:
        arguments.survivors.write_text("\n".join(entry_text(keys[mutant.number]) for mutant in alive))
    useless = []
    if not arguments.no_python:
        useless = [m for m in chosen if results[m.number] and keys[m.number] in equivalent]
    for mutant in useless:
        print(f"in equivalent.toml, but {results[mutant.number]} notices: {mutant.file}:{mutant.line}: {mutant.what}")
    return 1 if alive or useless else 0


if __name__ == "__main__":
    sys.exit(main())
