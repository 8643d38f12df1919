"""All tests of a device, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import codecs, draws, gradients, memory, operators, steps, workspaces
from .nets import NETS
from .result import Finding


@dataclass(frozen=True)
class Test:
    """A test by its name, "group/name"."""

    __test__ = False

    name: str
    run: Callable[[], Finding]

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def tests(device: str) -> tuple[Test, ...]:
    """The tests of "cpu" or "cuda"."""
    every = [*gradients.CASES]
    return (
        *_rows("operators", operators.CASES, lambda case: partial(operators.check, case, device)),
        *_rows("workspaces", workspaces.CASES, lambda case: partial(workspaces.check, case, device)),
        *_rows("slices", draws.SLICES, lambda case: partial(draws.check_slices, case, device)),
        *_rows("seeds", draws.modes(device), lambda mode: partial(draws.check_seeds, mode, device)),
        *_rows("gradients", every[: len(NETS)], lambda case: partial(gradients.check, case, device)),
        *_rows("memory", NETS, lambda net: partial(memory.check, net, device)),
        *_rows("codecs", codecs.CASES, lambda case: partial(codecs.check, case, device)),
        *_rows("steps", steps.nets(device), lambda net: partial(steps.check, net, device)),
        # What takes longest: every network by every other codec, and in other formats.
        *_rows("gradients", every[len(NETS) :], lambda case: partial(gradients.check, case, device)),
    )


def _rows(group: str, cases: Iterable[Any], run: Callable[[Any], Callable[[], Finding]]) -> Iterable[Test]:
    return (Test(f"{group}/{case}", run(case)) for case in cases)
