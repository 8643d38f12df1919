"""What the graphs of one `torch.compile` call know of each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import fx, nn

from xconv_fx import hooks
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.options import Options
from xconv_fx.options.budget import Budget
from xconv_fx.plan import Choice, Plan
from xconv_fx.runtime.session import GraphKey, GraphRecord, Session

CHOICE = Choice("relu", "1", "relu", (8,), "float32", ("mask",), CodecSpec("bitmask"), bytes_before=100, bytes_after=10)
PLAN = Plan("cpu", None, 0, 0, "", 0, (CHOICE,))
HALF = Budget(fraction=0.5)


class Compiling:
    """Stands for Dynamo: which compilation is going on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current: tuple[int, int] | None = None
        patch.setattr(hooks, "compile_id", lambda: self.current)
        patch.setattr(hooks, "goes_on", lambda: False)
        patch.setattr(hooks, "compiling_code", lambda: None)
        self.kept: list[fx.GraphModule] = []

    def graph(self) -> fx.GraphModule:
        self.kept.append(fx.symbolic_trace(nn.Identity()))
        return self.kept[-1]

    def add(self, session: Session, frame: int, number: int, plan: Plan = PLAN) -> GraphKey:
        self.current = frame, number
        found = session.graph(self.graph())
        session.add(GraphRecord(found, plan))
        return found.key


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Compiling:
    return Compiling(monkeypatch)


def session(**options: Any) -> Session:
    return Session(Options.parse(options))


def test_graphs_of_one_compilation_are_told_apart(dynamo: Compiling) -> None:
    """As DDPOptimizer hands them over: what the first holds is alive while the second runs."""
    step = session()
    assert dynamo.add(step, 0, 0) == GraphKey(0, 0)
    second = step.graph(dynamo.graph())
    assert second.key == GraphKey(0, 1)
    assert step.outside(second) == 10
    step.add(GraphRecord(second, PLAN))
    assert len(step.plans) == 2
    assert step.graph(dynamo.kept[-1]) == second, "asked again, the same graph is not a third one"


def test_a_frame_that_is_compiled_anew_replaces_all_of_its_graphs(dynamo: Compiling) -> None:
    step = session()
    for _ in range(3):
        dynamo.add(step, 0, 0)
    dynamo.add(step, 1, 0, replace(PLAN, device="later"))
    dynamo.current = 0, 1
    first = step.graph(dynamo.graph())
    assert first.key == GraphKey(0, 0)
    assert step.outside(first) == 0
    step.add(GraphRecord(first, PLAN))
    assert [plan.device for plan in step.plans] == ["cpu", "later"], "it keeps its place in the step"
    assert step.outside(step.graph(dynamo.graph())) == 10


def test_graphs_outside_of_dynamo_do_not_add_up() -> None:
    step = session()
    for _ in range(2):
        graph = step.graph(fx.symbolic_trace(nn.Identity()))
        step.add(GraphRecord(graph, PLAN))
    assert len(step.plans) == 1


def test_a_percentage_is_of_the_whole_step_and_resolved_once(dynamo: Compiling) -> None:
    step = session(mem_budget="50%")
    dynamo.current = 0, 0
    first = step.graph(dynamo.graph())
    assert step.settled(step.options) is step.options
    assert step.resolve(HALF, 1000, first) == 500
    step.add(GraphRecord(first, PLAN))
    dynamo.current = 1, 0
    second = step.graph(dynamo.graph())
    # Without xconv, the first graph would hold 100 bytes beside the second, where its plan holds 10.
    assert step.resolve(HALF, 1910, second) == 1001
    step.add(GraphRecord(second, PLAN))
    third = step.graph(dynamo.graph())
    assert step.resolve(HALF, 200, third) == 1001, "the step's peak is in the second graph"
    dynamo.current = 0, 1
    smaller = step.graph(dynamo.graph())
    budget = step.settled(step.options).mem_budget
    assert budget == Budget(bytes=1001)
    assert step.resolve(HALF, 60, smaller) == 1001


def test_bytes_are_bytes(dynamo: Compiling) -> None:
    step = session(mem_budget=700)
    dynamo.current = 0, 0
    assert step.resolve(Budget(bytes=700), 10**6, step.graph(dynamo.graph())) == 700
    dynamo.current = 0, 1
    step.graph(dynamo.graph())
    assert step.settled(step.options) is step.options
