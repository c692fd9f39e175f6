"""For the documentation site: docstrings that a decorator completes, as they are at run time."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class CompletedDocstrings(griffe.Extension):
    """Take the docstring of a class with a placeholder in it, as in `nvpflow.sklearn`, from the class itself."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Replace the text that was read from the source."""
        if cls.docstring is not None and "{parameters}" in cls.docstring.value:
            live = getattr(importlib.import_module(cls.module.path), cls.name)
            cls.docstring.value = inspect.cleandoc(live.__doc__)
