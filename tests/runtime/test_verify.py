"""What is done about steps over their budget, on a session whose graphs are not compiled."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from xconv_fx.errors import BudgetExceededWarning, BudgetInfeasibleError
from xconv_fx.options import Options
from xconv_fx.plan import Plan
from xconv_fx.runtime.first_step import CheckedGraph
from xconv_fx.runtime.session import Graph, GraphKey, GraphRecord, Session
from xconv_fx.runtime.verify import REPLANS

KEY = GraphKey(0, 0)
BUDGET = 1_000_000


class Step:
    """A session with a budget, one graph in it, and how often it was told to compile anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak: int = BUDGET, **options: Any) -> None:
        self.peak = peak
        self.session = Session(Options.parse({"mem_budget": BUDGET, **options}))
        self.anew = 0
        monkeypatch.setattr(self.session, "compile_anew", self._compile_anew)
        self.verifier = self.session.verifier
        self.graph = self.compile()

    def _compile_anew(self) -> None:
        self.anew += 1

    def compile(self) -> CheckedGraph:
        calls = self.asked.calls
        record = GraphRecord(
            Graph(KEY, None, 0, 0, 0, 0, False), Plan("cpu", BUDGET, 0, self.peak, "", 0, (), calls=calls)
        )
        self.session.records[KEY] = record
        return self.verifier.checked(lambda: (), record)

    @property
    def asked(self) -> Options:
        """The options by which the graph is planned next."""
        return self.verifier.options(self.session.options, KEY)

    def took(self, peak: int, calls: int = 1) -> bool:
        self.graph.most = calls
        return self.verifier.measured([self.graph], peak)


def test_a_step_within_its_budget_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    assert not step.took(900_000)
    assert (step.session.records[KEY].plan.measured_peak, step.session.measured_peak, step.anew) == (
        900_000,
        900_000,
        0,
    )


def test_what_it_is_over_by_becomes_a_reserve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Step(monkeypatch, reserve=1000)
    assert step.took(1_300_000)
    assert (step.asked.reserve, step.asked.calls, step.anew) == (301_000, 1, 1)
    (line,) = caplog.records
    assert line.levelno == logging.WARNING and line.name == "xconv_fx"
    assert line.getMessage() == (
        "a training step took 1.30 MB, 300 kB over the budget of 1.00 MB; planned again with reserve=301000"
    )
    step.graph = step.compile()
    assert step.took(1_050_000)
    assert (step.asked.reserve, step.anew) == (351_000, 2)
    assert not step.took(999_999)


def test_a_plan_that_leaves_room_must_take_less_by_what_the_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch, peak=700_000)
    step.took(1_300_000)
    assert step.asked.reserve == 600_000, "plans of at most 400 kB, 300 kB less than it took"


def test_it_is_not_planned_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    for _ in range(REPLANS):
        step.took(1_100_000)
    with pytest.warns(BudgetExceededWarning, match=r"took 1.10 MB, 100 kB over .* option reserve='400kB'"):
        step.took(1_100_000)
    assert step.took(1_100_000), "said once"
    assert step.anew == REPLANS


def test_more_calls_are_planned_as_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    with pytest.warns(BudgetExceededWarning, match=r"planned for 1 call a step, and ran 4 times .* option calls=4"):
        step.took(1_900_000, calls=4)
    assert (step.asked.calls, step.asked.reserve, step.anew) == (4, 0, 1)
    step.graph = step.compile()
    assert step.took(1_200_000, calls=4)
    assert (step.asked.calls, step.asked.reserve) == (4, 200_000), "calls alone did not do"


def test_more_calls_within_the_budget_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    assert not step.took(900_000, calls=4)
    assert step.graph.planned == 4 and step.anew == 0


def test_more_calls_than_ever_in_a_step_that_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch, calls=2)
    step.graph.most = 3
    with pytest.warns(BudgetExceededWarning, match=r"planned for 2 calls a step, and ran 3 times .*calls=3; planned"):
        step.verifier.called([step.graph])
    assert step.asked.calls == 3 and step.graph.planned == 3


def test_warn_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch, verify="warn")
    with pytest.warns(BudgetExceededWarning, match="option reserve='300kB', or a larger mem_budget"):
        step.took(1_300_000)
    with pytest.warns(BudgetExceededWarning, match="option calls=2$"):
        step.took(1_300_000, calls=2)
    assert step.anew == 0 and step.asked == step.session.options


def test_a_budget_that_no_plan_meets_is_given_up_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    error = BudgetInfeasibleError(BUDGET, 1_234_500)
    assert not step.verifier.refused(error), "the user's own budget"
    step.took(1_300_000)
    with pytest.warns(BudgetExceededWarning, match=r"takes 1.30 MB, and no plan .* mem_budget='1.26MB'"):
        assert step.verifier.refused(error)
    assert step.asked.reserve == 0
    step.graph = step.compile()
    assert step.took(1_300_000), "it was said"
    assert step.anew == 1


def test_a_record_of_another_compilation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(monkeypatch)
    other = Graph(KEY, (0, 1), 0, 0, 0, 0, False)
    step.session.records[KEY] = GraphRecord(other, step.graph.record.plan)
    step.took(500)
    assert step.graph.record.plan.measured_peak == 500
    assert step.session.records[KEY].plan.measured_peak is None
