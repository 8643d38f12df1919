"""The `torch.compile` backend: `torch.compile(model, backend="xconv", options={"mem_budget": "8GB"})`.

One call compiles one graph (`compiler/compile_graph.py`): parse the options, choose a way to run the step within the
budget (`compiler/search.py`), plan it, let Inductor generate code, and audit the peak of that code before any of it
runs (`compiler/generate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from xconv_fx import hooks
from xconv_fx.compiler import predicted
from xconv_fx.compiler.capture import CaptureRequest
from xconv_fx.compiler.compile_graph import compile_graph
from xconv_fx.errors import UnsupportedModelError, XConvError
from xconv_fx.hooks.surfacing import surfaced_by_dynamo
from xconv_fx.ops import lowering
from xconv_fx.ops.sample_gradients import watched
from xconv_fx.options import Options
from xconv_fx.plan import Plan
from xconv_fx.runtime import unplanned
from xconv_fx.runtime.session import GraphKey, Session
from xconv_fx.stack_room import with_stack_room

from .together import plan_together
from .torch_version import require_usable_torch


@surfaced_by_dynamo
@with_stack_room
@hooks.as_called
def xconv(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph under a memory budget. `options` are those of `xconv_fx.options.Options`.

    Raises `OptionError` for a wrong option, `BudgetInfeasibleError` for a budget that no plan meets,
    `UnsupportedModelError` for what cannot be planned, and `UnsupportedTorchError` on a torch whose private parts are
    not as they were: all before any step runs.
    """
    require_usable_torch()
    chosen = Options.parse(options, mode)
    chosen.check_effect()
    lowering.install()
    hooks.specialise(example_inputs)
    if hooks.without_samples(gm, example_inputs):
        # Nothing to hold, no sizes to plan with, and of the empty gradients Inductor expects other strides than come.
        return unplanned.graph(gm.forward)
    if not hooks.needs_backward(example_inputs):
        # Nothing is held for a backward: plain Inductor, and no graph of a training step.
        plain = replace(chosen, mem_budget=None, slices=None, stats=None, plan=None)
        return unplanned.graph(compile_graph(CaptureRequest(gm, example_inputs, plain, Session(plain))))
    if not chosen.plain and hooks.branches(gm):
        hint = "torch.where, an `if` behind a graph break, or this model without options"
        raise UnsupportedModelError("torch.cond", "what its branches hold depends on values and is not planned", hint)
    session = Session.of(chosen)
    if chosen.plan is not None:
        chosen = session.options
    alone = chosen.codecs.preset or chosen.plan is not None
    if chosen.mem_budget is not None and not alone and not session.is_next(gm, example_inputs):
        plan_together(session, gm, example_inputs)
    graph = session.graph(gm)
    compiled = _compile(gm, example_inputs, chosen, session, graph.key)
    compiled = watched(compiled) if chosen.shares_samples else compiled
    if chosen.mem_budget is not None and chosen.verify != "off" and graph.key in session.records:
        compiled = session.verifier.checked(compiled, session.records[graph.key])
    return unplanned.graph(compiled, session, graph.key)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, session: Session, key: GraphKey
) -> Callable[..., Any]:
    """The compiled step of a graph, planned by what measured steps were found to need, if any plan is."""

    def compiled() -> Callable[..., Any]:
        options = session.calling(session.verifier.options(session.settled(chosen), key), key)
        return compile_graph(CaptureRequest(gm, example_inputs, options, session, session.notes))

    try:
        return compiled()
    except XConvError as error:
        if not session.verifier.refused(error):
            raise
    except Exception as error:
        if (lost := hooks.lost_change(gm, error)) is None:
            raise
        hint = "a shape of (1,), another dtype, or `+=` instead of a method that changes it"
        reason = "Dynamo loses what the model changes in place in a float64 tensor without dimensions"
        raise UnsupportedModelError(lost, reason, hint) from None
    return compiled()


hooks.watch_calls(xconv, unplanned.Watch.over)
hooks.watch_frames(unplanned.note)


def plan_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, session: Session, notes: tuple[str, ...] = ()
) -> Plan | None:
    """The plan of one graph, with these notes, without generating code; None for a graph without a backward."""
    found = predicted.plan_graph(CaptureRequest(gm, example_inputs, options, session, notes))
    return None if found is None else found.plan
