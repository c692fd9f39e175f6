"""Hold Markdown to one sentence a line and 25 words a sentence: python tests/tools/prose.py FILE...

Code, tables, headings, links' addresses and HTML are left out. A list item may hold several short sentences on lines
of their own. Exits with 1 and names each place that does not hold.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_WORDS = 25
ABBREVIATIONS = ("e.g.", "i.e.", "vs.", "cf.", "etc.", "et al.", "No.", "eq.")
FENCE = re.compile(r"^\s*(```|~~~)")
LEFT_OUT = re.compile(r"^\s*($|\||#|<|!\[|\[[^\]]+\]:|---|===|    )")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"(\[*_])")


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
    line = re.sub(r"^\s*([-*+]|\d+\.|>)\s+", "", line)
    line = re.sub(r"\]\([^)]*\)", "]", line)
    line = re.sub(r"`[^`]*`", "`code`", line)
    for abbreviation in ABBREVIATIONS:
        line = line.replace(abbreviation, abbreviation.replace(".", ""))
    return line.replace("**", "").replace("_", " ").strip()


def problems(path: Path) -> Iterator[str]:
    previous_number, sentence = 0, ""
    for number, line in paragraphs(path.read_text(encoding="utf-8")):
        starts_anew = number != previous_number + 1 or re.match(r"^\s*([-*+]|\d+\.|>)\s+", line)
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


def main() -> int:
    found = [problem for name in sys.argv[1:] for problem in problems(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
