"""Words of messages and tables."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
