"""The `torch.compile` backend: `torch.compile(model, backend="xconv", options={"mem_budget": "8GB"})`.

One call compiles one graph: parse the options, choose a way to run the step within the budget (`strategy.py`), plan it,
let Inductor generate code, and audit the peak of that code before any of it runs (`compilation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from . import hooks
from .compilation import Traced
from .errors import surfaced_by_dynamo
from .ops import lowering
from .options import Options
from .plan import Plan
from .sample_gradients import watched
from .session import Session
from .stack_room import with_stack_room
from .strategy import Strategy


@surfaced_by_dynamo
@with_stack_room
def xconv(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph under a memory budget. `options` are those of `xconv_fx.options.Options`.

    Raises `OptionError` for a wrong option, `BudgetInfeasibleError` for a budget that no plan meets, and
    `UnsupportedTorchError` on a torch that the private hooks were not checked on: all before any step runs.
    """
    hooks.require_checked_torch()
    chosen = Options.parse(options, mode)
    if not hooks.needs_backward(example_inputs):
        chosen = replace(chosen, mem_budget=None)  # Nothing is held for a backward: plain Inductor.
    lowering.install()
    hooks.specialise(example_inputs)
    if hooks.without_samples(gm, example_inputs):
        # Nothing to hold, no sizes to plan with, and of the empty gradients Inductor expects other strides than come.
        return gm.forward
    session = Session.of(chosen)
    compiled = Strategy(Traced(gm, example_inputs, session.settled(chosen), session)).compile()
    return watched(compiled) if chosen.shares_samples else compiled


def plan_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, session: Session, notes: tuple[str, ...] = ()
) -> Plan | None:
    """The plan of one graph, with these notes, without generating code; None for a graph without a backward."""
    return Strategy(Traced(gm, example_inputs, options, session, notes)).plan()
