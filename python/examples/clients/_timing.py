"""Processor time that a client spends in its own calls into its flow."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable


class Stopwatch:
    """Counts the time in methods of a class; a call within a call counts once."""

    def __init__(self, owner: type, methods: Iterable[str]) -> None:
        self.seconds = 0.0
        self._inside = False
        for name in methods:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method):
        @functools.wraps(method)
        def timed(*args, **kwargs):
            if self._inside:
                return method(*args, **kwargs)
            self._inside, start = True, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.process_time() - start

        return timed

    def take(self) -> float:
        """Return the time since the last look."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
