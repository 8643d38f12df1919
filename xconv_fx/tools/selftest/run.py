"""Run the tests that are asked for, one after another, until the time is up."""

from __future__ import annotations

import fnmatch
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from xconv_fx.errors import UsageError
from xconv_fx.progress import announce

from .groups import Test, tests
from .result import Finding, Report, Result
from .versions import versions

MINUTES = 5.0


def selftest(
    device: str, only: Sequence[str] = (), minutes: float = MINUTES, told: Callable[[Result], None] = lambda _: None
) -> Report:
    """The report of "cpu" or "cuda".

    `only` are names of groups, or patterns of names such as "gradients/vgg*"; `told` hears of every result as it
    comes. No test begins after so many minutes. Raises `UsageError` for a device that is not there, and for a pattern
    that is the name of none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is none here", "--device cpu")
    start = time.perf_counter()
    results = []
    for test in chosen(tests(device), only):
        began = time.perf_counter()
        late = began - start > 60 * minutes
        announce(test.name)
        finding = Finding(left_out=f"{minutes:g} minutes were up") if late else _found(test)
        results.append(Result(test.name, finding, time.perf_counter() - began))
        told(results[-1])
    return Report(device, versions(device), tuple(results), time.perf_counter() - start)


def chosen(every: Sequence[Test], only: Sequence[str]) -> Iterator[Test]:
    """The tests that these patterns name, in their order; all without any."""
    for pattern in only:
        if not any(_is(test, pattern) for test in every):
            groups = dict.fromkeys(test.group for test in every)
            raise UsageError(f"--only {pattern!r} is the name of no test", f"one of {', '.join(groups)}")
    return (test for test in every if not only or any(_is(test, pattern) for pattern in only))


def _is(test: Test, pattern: str) -> bool:
    return pattern == test.group or fnmatch.fnmatchcase(test.name, pattern)


def _found(test: Test) -> Finding:
    """What the test finds. An error is a finding: that a step raises is what a report is for."""
    torch.compiler.reset()
    gc.collect()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return test.run()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        places = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
        return Finding(off=f"{type(error).__name__}: {first[:300]} ({where})")
