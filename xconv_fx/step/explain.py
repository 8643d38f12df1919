"""`explain`: the plan of a model for a budget, without training it, and without its memory.

The model is traced and planned graph by graph on fake tensors (`device/fake.py`): nothing is allocated, no kernel is
generated or run, and the device that the plan is for need not be there.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, fx, nn

from xconv_fx import hooks
from xconv_fx.compiler import predicted
from xconv_fx.device.fake import fake_module, fake_tensor
from xconv_fx.device.scenario import Scenario
from xconv_fx.errors import UnsupportedModelError
from xconv_fx.hooks.fake import fake_mode
from xconv_fx.hooks.pytree import tree_map_only
from xconv_fx.hooks.surfacing import surfaced_by_dynamo
from xconv_fx.ops import lowering
from xconv_fx.options import Options
from xconv_fx.passes.move_device import place_inputs
from xconv_fx.plan import Plan
from xconv_fx.plan.report import render
from xconv_fx.progress import announce
from xconv_fx.runtime.session import Session
from xconv_fx.runtime.step_inputs import called_with
from xconv_fx.stack_room import with_stack_room

from .backend import plan_graph
from .graphs import Collector, StepGraphs
from .together import Finder, placed, share
from .torch_version import require_usable_torch

# Plans one graph that Dynamo traced, for these inputs; what it returns is true if the graph has a backward.
Planner = Callable[[fx.GraphModule, list[Any]], object]


@dataclass(frozen=True)
class Explanation:
    """The plans of a model, one for each graph that it is compiled as. Renders itself with rich."""

    plans: tuple[Plan, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, plan in enumerate(self.plans, start=1):
            yield render(plan, title=f"graph {number} of {len(self.plans)}" if len(self.plans) > 1 else None)


@with_stack_room
def explain(
    model: nn.Module,
    *inputs: Any,
    mem_budget: str | int | None = None,
    loss: str | Callable[..., Tensor] = "mean",
    targets: Sequence[Any] = (),
    device: str | None = None,
    gpu: str | None = None,
    amp: str | None = None,
    channels_last: bool = False,
    optimizer: str | None = None,
    **options: Any,
) -> Explanation:
    """The plan that `torch.compile(model, backend="xconv", options=...)` would start from, for these inputs.

    `options` are those of the backend. The model trains on the mean or sum of its output (`loss`), which adds nothing
    to the graph, or on `loss(output, *targets)`, which is traced with the model as when one compiled function computes
    both. The peaks are predicted ones: nothing is compiled, and the memory of model and inputs is not read, so they may
    be on the meta device.

    The step is planned for `device` ("cpu" or "cuda"; None: where the model is, the CPU for the meta device), which
    need not be there, or for a `gpu` of `cost_model/gpus.py`; if they are given, under autocast (`amp` "bf16" or
    "fp16"), with model and inputs laid out `channels_last`, and beside the state of an `optimizer` ("sgd", "momentum",
    "adam" or "adamw").

    Raises what the backend would raise, `OptionError` for a scenario that makes no sense, and `UnsupportedModelError`
    when no graph of the model has a backward.
    """
    given = {**options, **({} if mem_budget is None else {"mem_budget": mem_budget})}
    chosen = Options.parse(given)
    chosen.check_effect()
    scenario = Scenario.parse(device, gpu, amp, channels_last, optimizer)
    trace = FakeTrainingStep(model, inputs, scenario, loss, targets)
    session = trace.session(chosen)
    if chosen.mem_budget is None or chosen.codecs.preset:
        trace.run(lambda gm, example_inputs: plan_graph(gm, example_inputs, chosen, session, scenario.notes))
    else:
        _plan_together(trace, session, chosen)
    return Explanation(session.plans)


def _plan_together(trace: FakeTrainingStep, session: Session, options: Options) -> None:
    """Plan the graphs of a step for the budget that they share."""
    with trace.tracing():
        step = trace.graphs(Finder(session, options, trace.scenario.notes, apart=True))
        if len(step.runs) > 1:
            share(session, step, options)
        for number, graph in enumerate(step.graphs, start=1):
            announce(f"planning graph {number} of {len(step.graphs)}")
            with graph.compiling.again():
                predicted.plan_graph(placed(graph, session, options))


class FakeTrainingStep:
    """A training step without memory, of whose graphs plans are made.

    `loss` and `targets` are those of `explain`. Raises `ValueError` for a loss that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        scenario: Scenario,
        loss: str | Callable[..., Tensor] = "mean",
        targets: Sequence[Any] = (),
    ) -> None:
        require_usable_torch()
        if loss not in ("mean", "sum") and not callable(loss):
            raise ValueError(f"loss={loss!r}: write 'mean', 'sum' or a callable of the output and the targets")
        lowering.install()
        self.scenario, self.mode = scenario, fake_mode()
        home = "cpu" if scenario.moves else scenario.device
        self.model = faked = fake_module(model, self.mode, home, scenario.channels_last)
        self.inputs = tree_map_only(
            Tensor, lambda value: fake_tensor(value, self.mode, home, scenario.channels_last), (*inputs, *targets)
        )
        parameters = list(faked.parameters())
        self.home = parameters[0].device.type if parameters else home or "cpu"

        # A function of a module, not a module with a part: layers keep the names that they have in the model.
        def with_loss(*arguments: Any) -> Any:
            return loss(faked(*arguments[: len(inputs)]), *arguments[len(inputs) :])  # type: ignore[operator]

        self.step: Callable[..., Any] = with_loss if callable(loss) else faked

    def session(self, options: Options) -> Session:
        """A session to plan the step's graphs in, one after another."""
        parameters = list(self.model.parameters())
        return Session(
            options,
            self.model,
            device="cuda" if self.scenario.moves else None,
            optimizer_bytes=self.scenario.optimizer_bytes(parameters),
            facts=self.scenario.facts(parameters),
        )

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """What is traced inside is traced as the step."""
        with contextlib.ExitStack() as stack:
            for entered in (
                torch.enable_grad(),
                hooks.cheap_graphs(),
                self.scenario.in_effect(self.home),
                self.mode,
                called_with(self.inputs),
            ):
                stack.enter_context(entered)
            stack.enter_context(warnings.catch_warnings())
            # Dynamo asks the inputs of a later graph for their gradients, and means to hide this itself.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            # However often the same code is planned: each of its shapes is a plan of its own.
            stack.enter_context(hooks.any_number_of_sizes())
            yield

    def run(self, planner: Planner) -> None:
        """Let `planner` plan every graph of the step that has a backward, in the order in which they run.

        Raises `UnsupportedModelError` when there is none.
        """
        planned = 0

        def counted(gm: fx.GraphModule, example_inputs: list[Any]) -> object:
            nonlocal planned
            planned += 1
            announce(f"planning graph {planned}")
            return planner(gm, example_inputs)

        with self.tracing():
            self.graphs(counted)

    def graphs(self, take: Planner) -> StepGraphs:
        """The graphs of the step that have a backward: what `take` makes of each, within its compilation.

        Raises `UnsupportedModelError` when there is none.
        """

        def placed(gm: fx.GraphModule, example_inputs: list[Any]) -> object:
            if self.scenario.moves:
                place_inputs(gm, "cuda")
            return take(gm, example_inputs)

        collector = Collector(placed)
        outputs = torch.compile(self.step, backend=surfaced_by_dynamo(collector), dynamic=False)(*self.inputs)
        found = collector.found(self.inputs, outputs)
        if not any(found.graphs):
            kind = type(self.model).__name__
            raise UnsupportedModelError(
                kind, "nothing in it requires a gradient", "train at least one parameter or input"
            )
        return found
