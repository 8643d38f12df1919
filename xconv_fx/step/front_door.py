"""The front door: a model that is compiled within its budget or not at all, and what was planned for it.

`torch.compile(model, backend="xconv", options={...})` plans what Dynamo hands over, and warns of what it does not. Here
a break of the graph and code that runs without a plan are errors, options are checked at once, and every size of a
batch has compiled code of its own up to `recompile_limit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from xconv_fx import hooks
from xconv_fx.errors import BudgetLostError, OptionError, UsageError
from xconv_fx.options import Options
from xconv_fx.plan import Plan
from xconv_fx.plan.report import as_text, read_json, render
from xconv_fx.runtime.unplanned import Watch

from .backend import xconv

M = TypeVar("M", bound=Callable[..., Any])

# Variants of one piece of code, such as batch sizes, that are compiled before it is an error.
RECOMPILE_LIMIT = 64
NOTHING = "nothing is planned: no graph of it has a backward"


def compile(
    model: M,
    mem_budget: int | str | None = None,
    *,
    fullgraph: bool = True,
    recompile_limit: int = RECOMPILE_LIMIT,
    **options: Any,
) -> M:
    """`torch.compile(model)` with this backend; `options` are those of `xconv_fx.options.Options`.

    With `fullgraph=False` a model whose trace breaks is planned graph by graph. `recompile_limit` is how many variants
    (sizes, modes, dtypes) may be compiled. Raises `OptionError` for a wrong option, and when the result is called
    `UnsupportedModelError` for a break of the graph or a limit of Dynamo, `BudgetLostError` for code that ran without a
    plan, and what the backend raises.
    """
    given = options if mem_budget is None else {"mem_budget": mem_budget, **options}
    chosen = Options.parse(given)
    chosen.check_effect()
    if isinstance(model, nn.Module) and chosen.stats is not None:
        chosen.stats.check(model)
    if not callable(model):
        raise OptionError("model", model, "write a module or a function")
    if (off := hooks.compiling_is_off()) is not None:
        raise BudgetLostError(f"nothing is compiled, and so within no budget: Dynamo is switched off by {off}")
    torch_compile: Any = torch.compile  # Its overloads do not know recompile_limit.
    compiled: M = torch_compile(
        model,
        backend=xconv,
        fullgraph=fullgraph,
        dynamic=False,
        options=given or None,
        recompile_limit=recompile_limit,
        **hooks.own_limit(),
    )
    _watch(compiled).strict = True
    return compiled


def plans(model: Callable[..., Any]) -> tuple[Plan, ...]:
    """The plans of a compiled model's graphs, in the order in which they run, also of one that is part of `model`.

    Raises `UsageError` for what this backend has not compiled, and before the first call.
    """
    watch = _watch(model)
    if not watch.called:
        raise UsageError("nothing is compiled yet, for the model was not called: run a training step first")
    own = getattr(watch.call, "xconv_session", None)
    sessions = {id(session): session for session in (own, *watch.sessions.values()) if session is not None}
    return tuple(plan for session in sessions.values() for plan in session.plans)


def report(model: Callable[..., Any]) -> Report:
    """What was planned, audited and measured for a compiled model: for `print`, and in colour for `rich.print`.

    Raises as `plans` does.
    """
    return Report(plans(model))


# The module of this name is hidden by the function.
report.read_json = read_json  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Report:
    """The plans of a model, one graph after another."""

    plans: tuple[Plan, ...]

    def _titled(self) -> Iterator[tuple[Plan, str | None]]:
        count = len(self.plans)
        for number, plan in enumerate(self.plans, start=1):
            yield plan, f"graph {number} of {count}" if count > 1 else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.plans:
            yield Text(NOTHING)
        for plan, title in self._titled():
            yield render(plan, title=title)

    def __str__(self) -> str:
        texts = ["\n".join(filter(None, (title, as_text(plan)))) for plan, title in self._titled()]
        return "\n\n".join(texts) or NOTHING


def _watch(compiled: Any) -> Watch:
    """The watch over the calls of a compiled module or function. Raises `UsageError` for anything else."""
    watch = getattr(hooks.call_behind(compiled), "xconv_watch", None)
    if not isinstance(watch, Watch):
        name = type(compiled).__name__ if isinstance(compiled, nn.Module) else repr(compiled)
        raise UsageError(f"{name} was not compiled with this backend: take what xconv_fx.compile(model) returns")
    return watch
