"""Hold texts to sentences of at most 25 words: python tests/tools/prose.py FILE...

Markdown also has one sentence a line, and the words of a table's cell are counted as a sentence's are. Code, headings,
links' addresses and HTML are left out. A list item may hold several short sentences on lines of their own. A decision
of cpp/design/decisions.md has five lines at most, and its reason.

Of Python the docstrings are read that users see: of public names in public modules, and of what `__init__.py` makes
public. Of C and C++ headers the documentation is read: `///` and `/** */`. In these, and in tables, a code span, a
formula and a list of names count as one word. Exits with 1 and names each place that does not hold.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

MOST_WORDS = 25
MOST_LINES = 5  # of a decision
ABBREVIATIONS = ("e.g.", "i.e.", "vs.", "cf.", "etc.", "et al.", "No.", "eq.")
FENCE = re.compile(r"^\s*(```|~~~)")
LEFT_OUT = re.compile(r"^\s*($|\||#|<|!\[|\[[^\]]+\]:|---|===|    )")
ITEM = re.compile(r"^\s*([-*+]|\d+\.|>)\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"(\[*_])")

# In documentation sentences also begin with a name or a number.
ANY_SENTENCE_END = re.compile(r"(?<=[.!?])[\")\]]*\s+")
CODE = re.compile(r"``.+?``|`[^`]*`")
BRACKETS = re.compile(r"\[[^\[\]]{0,30}\]|(?<=\w)\([^()]*\)")
FORMULA = re.compile(r"\S+(?:\s+(?:=|\+|-|\*|/|<|>|<=|>=|->|\|)\s+\S+)+")
ROW = re.compile(r"\s*\S+(?: \S+)? {2,}\S")
NAME = r"[\"']?\w[\w./]*[\"']?"
DECISION = re.compile(r"^\*\*D-\d{3} (?:.+\n)+", re.MULTILINE)
NAMES = re.compile(rf"{NAME}(?:, {NAME})+,? (?:and|or) {NAME}|{NAME}(?:, {NAME}){{3,}}")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Lines of prose with their numbers, from 1."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced and not LEFT_OUT.match(line):
            yield number, line


def plain(line: str) -> str:
    """A line without marks that are no words: bullets, addresses of links, inline code as one word."""
    line = ITEM.sub("", line)
    line = re.sub(r"\]\([^)]*\)", "]", line)
    line = CODE.sub("`code`", line)
    for abbreviation in ABBREVIATIONS:
        line = line.replace(abbreviation, abbreviation.replace(".", ""))
    return line.replace("**", "").replace("_", " ").strip()


def too_long(where: str, text: str) -> Iterator[str]:
    """Yield the problems of a piece of documentation."""
    text = CODE.sub("code", text)
    for abbreviation in ABBREVIATIONS:
        text = text.replace(abbreviation, abbreviation.replace(".", ""))
    for sentence in ANY_SENTENCE_END.split(text):
        short = sentence
        for pattern in (BRACKETS, FORMULA, NAMES):
            short = pattern.sub("code", short)
        words = sum(any(map(str.isalnum, word)) for word in short.split())
        if words > MOST_WORDS:
            yield f"{where}: a sentence of {words} words, expected at most {MOST_WORDS}: {sentence[:60]}..."


def problems_of_cells(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", line):
                yield from too_long(f"{path}:{number}", re.sub(r"\]\([^)]*\)", "]", cell))


def problems_of_markdown(path: Path, text: str) -> Iterator[str]:
    previous_number, sentence = 0, ""
    for number, line in paragraphs(text):
        starts_anew = number != previous_number + 1 or ITEM.match(line)
        parts = SENTENCE_END.split(plain(line))
        if len(parts) > 1 and not all(len(part.split()) <= 3 for part in parts[:-1]):
            yield f"{path}:{number}: {len(parts)} sentences on one line"
        if starts_anew or sentence.endswith((".", "!", "?", ":")):
            sentence = ""
        sentence = f"{sentence} {parts[-1]}".strip()
        words = max(len(part.split()) for part in (*parts[:-1], sentence))
        if words > MOST_WORDS:
            yield f"{path}:{number}: a sentence of {words} words, expected at most {MOST_WORDS}"
            sentence = ""
        previous_number = number
    yield from problems_of_cells(path, text)
    yield from problems_of_decisions(path, text)


def problems_of_decisions(path: Path, text: str) -> Iterator[str]:
    """Yield what is wrong with the entries of cpp/design/decisions.md: five lines at most, one of them the reason."""
    for entry in DECISION.finditer(text):
        lines, where = entry[0].splitlines(), f"{path}:{text.count(chr(10), 0, entry.start()) + 1}"
        if len(lines) > MOST_LINES:
            yield f"{where}: a decision of {len(lines)} lines, expected at most {MOST_LINES}"
        if not re.search(r"\bbecause\b", entry[0], re.IGNORECASE):
            yield f"{where}: a decision without a reason, expected a line that begins with Because"


def blocks(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join the lines of each paragraph, list item and row of a table; leave out rules and examples."""
    gathered: list[str] = []
    start, indent, example = 0, 0, False
    for number, line in [*lines, (0, "")]:
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        rule = re.fullmatch(r"-{3,}|={3,}", text)
        listed = gathered and (ITEM.match(gathered[0]) or ROW.match(gathered[0]))
        goes_on = depth > indent if listed else depth == indent and not ITEM.match(line) and not ROW.match(line)
        if gathered and (not text or rule or not goes_on):
            yield start, " ".join(gathered)
            gathered = []
        if not text:
            example = False
        elif text.startswith((">>>", "...")):
            example = True
        elif not example and not rule:
            if not gathered:
                start, indent = number, depth
            gathered.append(text)


def public_parts(tree: ast.Module, names: set[str] | None) -> Iterator[ast.AST]:
    """Yield a module, and what of it is public: names without an underscore, or these."""
    nodes: list[tuple[ast.AST, bool]] = [(tree, True)]
    while nodes:
        node, outermost = nodes.pop()
        if node is not tree or names is None:
            yield node
        for child in ast.iter_child_nodes(node) if not isinstance(node, ast.FunctionDef) else ():
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                chosen = child.name in names if outermost and names is not None else not child.name.startswith("_")
                if chosen:
                    nodes.append((child, False))


@cache
def exported(folder: Path) -> dict[str, set[str]]:
    """Return what of private modules is public: what `__init__.py` imports of them, and classes that others do."""
    found: dict[str, set[str]] = {}
    for path in folder.glob("[!_]*.py"), folder.glob("__init__.py"):
        for module in path:
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and "._" in node.module:
                    names = {alias.name for alias in node.names if module.stem == "__init__" or alias.name[0].isupper()}
                    found.setdefault(node.module.rpartition(".")[2], set()).update(names)
    return found


def problems_of_python(path: Path, text: str) -> Iterator[str]:
    private = path.stem.startswith("_") and not path.stem.startswith("__")
    names = exported(path.parent).get(path.stem, set()) if private else None
    for node in public_parts(ast.parse(text), names):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        first = node.body[0].lineno
        for line, block in blocks(list(enumerate(inspect.cleandoc(docstring).splitlines(), first))):
            yield from too_long(f"{path}:{line}", block)


def problems_of_header(path: Path, text: str) -> Iterator[str]:
    lines: list[tuple[int, str]] = []
    inside = False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        short = re.search(r"//[/!]<\s*(.*)|/\*\*<\s*(.*?)\s*\*/", line)
        if short:
            yield from too_long(f"{path}:{number}", short[1] or short[2] or "")
        documentation = re.match(r"\s*///(?!<)( .*|$)", line)
        if not documentation:
            inside = inside or bool(re.match(r"\s*/\*\*(?!<)", line))
            documentation = inside and re.match(r"\s*(?:/\*\*|\*(?!/))?(.*?)(?:\*/)?$", line)
            inside = inside and "*/" not in line
        if documentation:
            lines.append((number, re.sub(r"@(?:brief|file|name|return)\s*|@[{}]", "", documentation[1] or "")))
        else:
            for start, block in blocks(lines):
                yield from too_long(f"{path}:{start}", block)
            lines = []


def problems(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    of = {".md": problems_of_markdown, ".py": problems_of_python}.get(path.suffix, problems_of_header)
    return of(path, text)


def main() -> int:
    found = [problem for name in sys.argv[1:] for problem in problems(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
