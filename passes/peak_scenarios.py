"""The moments of a whole step at which memory may peak, from the forward, loss and backward of one graph.

A graph may run in slices of the batch (`Slicing.episodes`), and it may run several times in a step before a backward
comes (the option `calls`). Then its last forward runs beside what the calls before hold: their residuals, inputs and
results. So does the loss, and the first backward. A later backward runs beside the gradients that those before it have
left, with one call's residuals less.

Calls whose input was computed in the step count no input: it is what an earlier call returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xconv_fx.slices import PeakScenario, Slicing

from .loss import Ends

AT_ONCE = tuple(PeakScenario(phase, 0, 0) for phase in ("forward", "loss", "backward"))


@dataclass(frozen=True)
class Calls:
    """How often a graph runs in a step before the backward.

    In bytes: the `inputs` of a call that come from outside of the step, and the `gradients` of the parameters.
    """

    count: int = 1
    inputs: int = 0
    gradients: int = 0


ONCE = Calls()


def scenarios(slicing: Slicing | None, calls: Calls, ends: Ends) -> tuple[PeakScenario, ...]:
    """The moments of a step; `ends` are those of the graph, which is of one slice where there is a `slicing`."""
    one = AT_ONCE if slicing is None else slicing.episodes(ends)
    if calls.count == 1:
        return one
    held, parts = (1, 1) if slicing is None else (slicing.held, slicing.count)
    whole = ends.times(parts)
    return tuple(found for scenario in one for found in _beside(scenario, calls, whole, held))


def _beside(scenario: PeakScenario, calls: Calls, ends: Ends, held: int) -> Iterator[PeakScenario]:
    """A moment of one call beside the other calls, each of which holds its residuals `held` times."""
    others = calls.count - 1
    alive = others * (calls.inputs + ends.results)
    if scenario.phase == "loss":
        alive += others * ends.between
    elif scenario.phase == "backward" or scenario.again:
        alive += others * (ends.kept + ends.tangents)
    yield scenario.beside(alive, others * held)
    if scenario.phase == "backward" or scenario.again:
        yield scenario.beside(alive + calls.gradients, (others - 1) * held)
