"""The moments of a whole step at which memory may peak, from the forward, loss and backward of one graph.

A graph may run in slices of the batch (`Microbatches.episodes`), and it may run several times in a step before a
backward comes (the option `calls`). Then its last forward runs beside what the calls before hold: their residuals,
inputs and results. So does the loss, and the first backward; what a loss keeps of a result is counted for every call,
the rest of what it takes for one. A later backward runs beside the gradients that those before it have left, with one
call's residuals less.

Calls whose input was computed in the step are a chain: the input is what an earlier call returned, and the loss reads
the last result alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .loss import Ends
from .microbatches import Microbatches, PeakScenario

AT_ONCE = tuple(PeakScenario(phase, 0, 0) for phase in ("forward", "loss", "backward"))


@dataclass(frozen=True)
class Calls:
    """How often a graph runs in a step before the backward.

    In bytes: the `inputs` of a call that come from outside of the step, the `input_gradients` that its backward leaves
    of those, and the `gradients` of the parameters. In a `chain` each call reads what the one before it returned.
    """

    count: int = 1
    inputs: int = 0
    gradients: int = 0
    chain: bool = False
    input_gradients: int = 0


ONCE = Calls()


def scenarios(microbatches: Microbatches | None, calls: Calls, ends: Ends) -> tuple[PeakScenario, ...]:
    """The moments of a step; `ends` are those of the graph, which is of one slice where there is a `microbatches`."""
    one = AT_ONCE if microbatches is None else microbatches.episodes(ends)
    if calls.count == 1:
        return one
    if microbatches is None:
        return tuple(found for scenario in one for found in _beside(scenario, calls, ends, 1))
    # Every call lays out weights of its own, and keeps states of its own.
    calls = replace(calls, inputs=calls.inputs + microbatches.besides)
    whole = ends.times(microbatches.count)
    return tuple(found for scenario in one for found in _beside(scenario, calls, whole, microbatches.held))


def _beside(scenario: PeakScenario, calls: Calls, ends: Ends, held: int) -> Iterator[PeakScenario]:
    """A moment of one call beside the other calls, each of which holds its residuals `held` times."""
    others = calls.count - 1
    alive = others * (calls.inputs + ends.results)
    if not calls.chain and (scenario.phase != "forward" or scenario.again):
        alive += others * ends.kept
    if not calls.chain and (scenario.phase == "backward" or scenario.again):
        alive += others * ends.tangents
    yield scenario.beside(alive, others * held)
    if scenario.phase == "backward" or scenario.again:
        yield scenario.beside(alive + calls.gradients + calls.input_gradients, (others - 1) * held)
        if others > 1 and calls.input_gradients:  # Of those between, one of the two is higher.
            yield scenario.beside(alive + calls.gradients + others * calls.input_gradients, 0)
