"""Begin a step of several graphs: see all of them, and plan them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from torch import fx

from xconv_fx.compiler.capture import CaptureRequest
from xconv_fx.hooks.capture import copied
from xconv_fx.options import Options
from xconv_fx.planner.surroundings import ALONE
from xconv_fx.runtime.session import TOGETHER, GraphKey, Session
from xconv_fx.runtime.unplanned import planned

from .found_graph import FoundGraph
from .graphs import StepGraphs, look_ahead
from .shares import Shares


def plan_together(session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Look for further graphs of the step that begins with this one; with several, they are planned together."""
    if session.apart:
        return
    options = session.verifier.options(session.settled(session.options))
    with planned():  # Nothing of it runs.
        step = look_ahead(Finder(session, options))
    if isinstance(step, str):
        session.apart = step
    elif len(step.runs) > 1:
        share(session, step, options, audited=False)
        session.is_next(gm, example_inputs)


class Finder:
    """Keeps graphs, in the order in which they are found, to be planned in a session by these options.

    With `apart`, what the session knows of each where it is not planned together with others is kept as well.
    """

    def __init__(self, session: Session, options: Options, notes: tuple[str, ...] = (), *, apart: bool = False) -> None:
        self.session, self.options, self.notes, self.apart = session, replace(options, calls=1), notes, apart
        self.count = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> FoundGraph:
        known = self.session.of_a_step(gm, self.count)
        self.count += 1
        alone = self.session.graph(gm) if self.apart else None
        # Dynamo takes away from its graph what it knows of the inputs when it has compiled it.
        kept = copied(gm)
        request = CaptureRequest(kept, list(example_inputs), self.options, self.session, self.notes, known, ALONE)
        return FoundGraph(request, alone)


def share(session: Session, step: StepGraphs, options: Options, *, audited: bool = True) -> None:
    """Plan these graphs together, by these options; unless that is `audited` enough, by code that is generated."""
    resident = session.optimizer_bytes
    if session.module is not None:
        values = (*session.module.parameters(), *session.module.buffers())
        resident += sum(value.numel() * value.element_size() for value in values)
    once = Shares(step, replace(options, calls=1), resident)
    calls = [
        ceil(session.verifier.options(options, GraphKey(TOGETHER, graph)).calls / once.count(graph))
        for graph in range(len(step.graphs))
    ]
    session.together(replace(once, options=replace(options, calls=max(options.calls, *calls)), audited=audited))


def placed(graph: FoundGraph, session: Session, options: Options) -> CaptureRequest:
    """A graph, which was found with `apart`, in a session, to be planned within its compilation."""
    request = replace(graph.request, session=session, surroundings=None)
    if session.shares is None:
        assert graph.alone is not None
        session.expect(graph.alone)
        return replace(request, options=options, known=graph.alone)
    assert request.known is not None
    options = session.calling(session.settled(options), request.known.key)
    return replace(request, options=options, notes=(*request.notes, *session.notes))
