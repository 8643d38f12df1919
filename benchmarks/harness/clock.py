"""CPU time of parts of a process."""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from typing import Any


class Clock:
    """Adds up the CPU time of functions by part, each without the functions that are called within it."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = [0.0]

    def watch(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                whole = time.process_time() - start
                self.spent[part] += whole - self._inner.pop()
                self._inner[-1] += whole

        setattr(owner, name, watched)
