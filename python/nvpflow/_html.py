"""Tables as HTML: of reports, and of what a notebook shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(caption: str, head: Sequence[str], lines: Sequence[Sequence[str]], text_from: int = 99) -> str:
    """Return a table whose first column names its lines; columns from `text_from` on are text, the others numbers.

    Everything is escaped. Without `head` there is no line of headings.
    """
    from html import escape  # here, so that importing nvpflow does not pay for html

    def kind(i: int) -> str:
        return ' class="text"' if i >= text_from else ""

    top = "".join(
        f'<th scope="col"{kind(i)}>{escape(cell)}</th>' if cell else "<td></td>" for i, cell in enumerate(head)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>'
        + "".join(f"<td{kind(i)}>{escape(cell)}</td>" for i, cell in enumerate(line[1:], 1))
        + "</tr>"
        for line in lines
    )
    headings = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<table><caption>{escape(caption)}</caption>{headings}<tbody>{body}</tbody></table>"


def items(sentences: Iterable[str]) -> str:
    """Return a list of sentences, escaped; nothing where there are none."""
    from html import escape

    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{lines}</ul>" if lines else ""


def shortened(text: str, letters: int = 60) -> str:
    """Return a text that comes from a file or a caller, cut to what a cell can bear."""
    return text if len(text) <= letters else text[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"
