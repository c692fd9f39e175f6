"""The mutants of tests/tools/mutate.py: what is changed, and that all of them together change nothing with none on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from mutation.mutators import instrument, mutants_of

ROOT = Path(__file__).resolve().parents[2]

CPP = """\
constexpr int kMost = 8;
void check(const std::vector<int>& sizes, int n) {
  // a < b in a comment
  if (n < kMost && sizes.empty()) fail("n < " + name);
  const int* first = sizes.data() + n;
  if (ready(n)) return;
}
"""


def changes(file: str, source: str) -> set[tuple[int, str]]:
    return {(mutant.line, mutant.what) for mutant in mutants_of(file, source)}


def test_cpp_is_changed_where_it_is_code() -> None:
    assert changes("a.cpp", CPP) == {
        (1, "8 -> 8 + 1"),
        (4, "< -> <="),
        (4, "< -> >="),
        (4, "&& -> ||"),
        (4, "without fail"),
        (5, "+ -> -"),
        (6, "if (a) -> if (!a)"),
        (6, "without return"),
    }


@pytest.mark.parametrize(
    ("function", "found"),
    [
        ("void f(int n) { fail(n); }", True),
        ("void f(int n) { if (ready(n)) { fail(n); } done(); }", True),
        ("~F() { close(); }", True),
        ("explicit F(int n) : n_(n) { read(n); }", True),
        ("void g() { const auto f = [&](int n) { fail(n); }; f(1); }", True),
        ("[[noreturn]] void f(int n) { fail(n); }", False),
        ("bool f(int n) const override { fail(n); }", False),
        ("int f(int n) { if (ready(n)) return n; fail(n); }", False),
    ],
)
def test_a_statement_that_a_function_cannot_end_without_stays(function: str, found: bool) -> None:
    source = f"namespace a {{\n{function}\n}}\n"
    assert any(what.startswith("without") for _, what in changes("a.cpp", source)) == found


def test_cpp_is_switched_in_place() -> None:
    mutants = [
        mutant for mutant in mutants_of("a.cpp", CPP) if mutant.what in ("8 -> 8 + 1", "< -> <=", "without fail")
    ]
    for number, mutant in enumerate(mutants):
        mutant.number = number
    lines = instrument(CPP, mutants, python=False).splitlines()
    assert lines[0] == "const int kMost = (mutant(0) ? (8 + 1) : (8));"
    assert lines[3] == (
        '  if ((mutant(1) ? (n <= kMost) : (n < kMost)) && sizes.empty()) { if (!mutant(2)) { fail("n < " + name); } }'
    )


def test_a_table_of_constants_is_made_one_that_the_program_fills() -> None:
    source = "void f() {\n  constexpr Known kKnown[] = {\n      {0, 8, NPY_INT8},\n  };\n}\n"
    mutants = mutants_of("a.cpp", source)
    assert [mutant.what for mutant in mutants] == ["0 -> 0 + 1", "8 -> 8 + 1"]
    for number, mutant in enumerate(mutants):
        mutant.number = number
    assert "  const Known kKnown[] = {\n" in instrument(source, mutants, python=False)


@pytest.mark.parametrize("on", [-1, 0, 1, 2, 3])
def test_python_is_changed_by_the_mutant_that_is_on(on: int) -> None:
    source = "def f(a, b):\n    if not a < b:\n        raise ValueError(a)\n    return a + 1\n"
    mutants = mutants_of("a.py", source)
    assert [mutant.what for mutant in mutants] == [
        "if a -> if not a",
        "< -> <=",
        "without raise",
        "+ -> -",
        "1 -> 1 + 1",
    ]
    for number, mutant in enumerate(mutants):
        mutant.number = number

    def throw(error: Exception) -> None:
        raise error

    names = {"mutant": lambda number: number == on, "_raise": throw}
    exec(instrument(source, mutants, python=True), names)

    def outcome(a: int, b: int) -> int | str:
        try:
            return names["f"](a, b)
        except ValueError:
            return "refused"

    expected = {-1: (2, "refused"), 0: ("refused", 2), 1: (2, 2), 2: (2, 2), 3: (0, "refused")}
    assert (outcome(1, 2), outcome(1, 1)) == expected[on]


def test_the_switches_of_the_checks_leave_them_as_they_are() -> None:
    source = (ROOT / "python/nvpflow/_checks.py").read_text()
    mutants = mutants_of("_checks.py", source)
    for number, mutant in enumerate(mutants):
        mutant.number = number
    names: dict[str, object] = {"mutant": lambda number: False, "__name__": "checks"}
    exec(instrument(source, mutants, python=True), names)
    assert names["integer"]("n", 3) == 3


def test_every_reason_is_that_of_a_mutant() -> None:
    pytest.importorskip("tomllib")  # of Python 3.11, as the tool
    import mutate

    found = mutate.numbered([m for file in mutate.FILES for m in mutants_of(file, (ROOT / file).read_text())])
    assert set(mutate.known_equivalent()) <= set(found)
