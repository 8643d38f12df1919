"""`explain`: the plan of a model for a budget, without training it.

The model is traced and planned graph by graph; no kernel is generated or run. Memory is reserved for parameters and
inputs but not touched when they are on the meta device, so that a model larger than the machine can be planned, if no
single tensor of it is: of that size, systems refuse even to reserve.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from . import hooks
from .backend import plan_graph
from .errors import UnsupportedModelError, surfaced_by_dynamo
from .ops import lowering
from .options import Options
from .plan import Plan
from .report import render
from .session import Session


@dataclass(frozen=True)
class Explanation:
    """The plans of a model, one for each graph that it is compiled as. Renders itself with rich."""

    plans: tuple[Plan, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, plan in enumerate(self.plans, start=1):
            yield render(plan, title=f"graph {number} of {len(self.plans)}" if len(self.plans) > 1 else None)


def explain(
    model: nn.Module,
    *inputs: Any,
    mem_budget: str | int | None = None,
    loss: str | Callable[..., Tensor] = "mean",
    targets: Sequence[Any] = (),
    **options: Any,
) -> Explanation:
    """The plan that `torch.compile(model, backend="xconv", options=...)` would start from, for these inputs.

    `options` are those of the backend. The model trains on the mean or sum of its output (`loss`), which adds nothing
    to the graph, or on `loss(output, *targets)`, which is traced with the model as when one compiled function computes
    both. The peaks are predicted ones: nothing is compiled. Raises what the backend would raise, and
    `UnsupportedModelError` when no graph of the model has a backward.
    """
    hooks.require_checked_torch()
    if loss not in ("mean", "sum") and not callable(loss):
        raise ValueError(f"loss={loss!r}: write 'mean', 'sum' or a callable of the output and the targets")
    chosen = Options.parse({**options, **({} if mem_budget is None else {"mem_budget": mem_budget})})
    lowering.install()
    model, arguments = _placed(model), [_placed(value) for value in (*inputs, *targets)]
    session = Session(chosen, model)

    # A function, not a module: layers keep the names that they have in the model.
    def with_loss(*arguments: Any) -> Any:
        return loss(model(*arguments[: len(inputs)]), *arguments[len(inputs) :])  # type: ignore[operator]

    @surfaced_by_dynamo
    def planner(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        hooks.specialise(example_inputs)
        if hooks.needs_backward(example_inputs):
            plan_graph(gm, example_inputs, chosen, session)
        return _Unrun(gm)

    with torch.enable_grad():
        torch.compile(with_loss if callable(loss) else model, backend=planner)(*arguments)
    if not session.plans:
        raise UnsupportedModelError(
            type(model).__name__, "nothing in it requires a gradient", "train at least one parameter or input"
        )
    return Explanation(tuple(session.plans.values()))


class _Unrun:
    """Stands for a compiled graph: gives outputs of the right shapes, whose memory is reserved but never touched."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __call__(self, *arguments: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        with mode:
            outputs = self.gm(*fakes)
        return tree_map_only(Tensor, _empty_like, outputs)


def _empty_like(value: Tensor) -> Tensor:
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return empty.requires_grad_(value.requires_grad) if value.dtype.is_floating_point else empty


def _placed(value: Any) -> Any:
    """A copy of a module or tensor on the meta device in untouched memory on the CPU; anything else as it is."""
    if isinstance(value, nn.Module):
        on_meta = any(t.is_meta for t in (*value.parameters(), *value.buffers()))
        return copy.deepcopy(value).to_empty(device="cpu") if on_meta else value
    if isinstance(value, Tensor) and value.is_meta:
        return torch.empty_like(value, device="cpu").requires_grad_(value.requires_grad)
    return value
