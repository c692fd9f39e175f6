"""Words of messages and tables."""

from __future__ import annotations


def visible(text: str) -> str:
    """Return a text that may be a stranger's as a terminal can show it: what does not print is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(count: int, noun: str) -> str:
    """Return "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
