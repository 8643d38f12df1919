"""Which moments of a step are compared, when a graph runs in slices, several times, or both."""

from __future__ import annotations

import pytest

from xconv_fx.planner.loss import Ends
from xconv_fx.planner.microbatches import Batch, Microbatches, PeakScenario
from xconv_fx.planner.peak_scenarios import AT_ONCE, ONCE, Calls, scenarios

ENDS = Ends(results=10, tangents=11, between=30, kept=7)
THREE = Calls(3, inputs=100, gradients=1000)


def test_one_call_at_once_is_the_graph_itself() -> None:
    assert scenarios(None, ONCE, ENDS) == AT_ONCE


def test_calls_beside_each_other() -> None:
    assert scenarios(None, THREE, ENDS) == (
        PeakScenario("forward", 2 * (100 + 10), 2),
        PeakScenario("loss", 2 * (100 + 10 + 7), 2),
        PeakScenario("backward", 2 * (100 + 10 + 7 + 11), 2),
        PeakScenario("backward", 2 * (100 + 10 + 7 + 11) + 1000, 1),
    )


def test_gradients_of_inputs_stay() -> None:
    """A later backward runs beside those that the backwards before it left, however few residuals are held by then."""
    calls = Calls(3, inputs=100, gradients=1000, input_gradients=100)
    assert scenarios(None, calls, ENDS)[2:] == (
        PeakScenario("backward", 2 * (100 + 10 + 7 + 11), 2),
        PeakScenario("backward", 2 * (100 + 10 + 7 + 11) + 1000 + 100, 1),
        PeakScenario("backward", 2 * (100 + 10 + 7 + 11) + 1000 + 200, 0),
    )


def test_a_chain_of_calls_has_one_loss() -> None:
    assert scenarios(None, Calls(3, inputs=0, gradients=1000, chain=True), ENDS) == (
        PeakScenario("forward", 20, 2),
        PeakScenario("loss", 20, 2),
        PeakScenario("backward", 20, 2),
        PeakScenario("backward", 20 + 1000, 1),
    )


def test_slices_of_one_call_are_those_of_a_sliced_step() -> None:
    microbatches = Microbatches(Batch(4, (True,), inputs=400, input_gradients=0, gradients=50), 4, 2)
    assert scenarios(microbatches, ONCE, ENDS) == microbatches.episodes(ENDS)


@pytest.mark.parametrize("held", [0, 2, 4])
def test_slices_of_several_calls(held: int) -> None:
    """Every moment of one sliced call, beside the slices and weights that the other calls hold, and their results."""
    microbatches = Microbatches(Batch(4, (True,), inputs=400, input_gradients=0, gradients=50), 4, held, copies=3)
    one, found = microbatches.episodes(ENDS), list(scenarios(microbatches, THREE, ENDS))
    for moment in one:
        of_others = 2 * (100 + 3 + 4 * 10)
        if moment.phase == "loss":
            of_others += 2 * 4 * 7
        elif moment.phase == "backward" or moment.again:
            of_others += 2 * 4 * (7 + 11)
        first = found.pop(0)
        assert (first.extra - moment.extra, first.others - moment.others) == (of_others, 2 * held)
        if moment.phase == "backward" or moment.again:
            later = found.pop(0)
            assert (later.extra - first.extra, first.others - later.others) == (1000, held)
    assert not found
