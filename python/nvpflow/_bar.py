"""A progress bar of tqdm, where there is one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from nvpflow import _checks


class Bar:
    """A tqdm bar over updates; drawn only in `move`, which is called at most 20 times a second."""

    def __init__(self) -> None:
        # tqdm draws nothing on a terminal that does not know its size, as some containers' do not.
        fits = _terminal_columns() or _in_notebook()
        size: dict[str, Any] = {"dynamic_ncols": True} if fits else {"ncols": 120, "nrows": 24}
        self._bar = _tqdm()(unit=" updates", file=sys.stderr, **size)

    def begin(self, total: int, done: int) -> None:
        """Tell how many updates there are; those of a checkpoint do not count in the rate."""
        self._bar.reset(total=total)
        self._bar.initial = self._bar.n = done

    def move(self, done: int, title: str) -> None:
        """Draw how many are done."""
        self._bar.set_description(title, refresh=False)
        self._bar.update(done - self._bar.n)

    def show(self, text: str, title: str, done: int) -> None:
        """Set what stands behind the bar, for the next time that it is drawn."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.set_description(title, refresh=False)
        self._bar.n = done

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._bar.refresh()
        self._bar.close()


OneBar = TypeVar("OneBar", bound=Bar)


def open_bar(progress: Any, make: Callable[[], OneBar]) -> OneBar | None:
    """Return a bar where `progress` asks for one; where it is None, where one can be drawn."""
    if progress is not None:
        return make() if _checks.boolean("progress", progress) else None
    if sys.stderr is None or not (sys.stderr.isatty() or _in_notebook()):
        return None
    try:
        return make()
    except ImportError:
        return None


def _tqdm() -> Any:
    """Return the class of the bar: a widget in a notebook that has ipywidgets, else lines of text."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    if not _in_notebook():
        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells those without ipywidgets to install them
        from tqdm import autonotebook
    return autonotebook.tqdm


def _in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):  # not a terminal, closed, or replaced by something without a file
        return 0
