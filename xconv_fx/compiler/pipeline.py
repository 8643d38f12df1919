"""The pipeline: from a joint graph to the forward and the backward that are compiled, stage by stage.

    Joint        NORMALISE, what mixes samples, LOWER: passes over the joint graph as AOTAutograd traced it
    Partitioned  PREPARE: passes over forward and backward, which torch's partitioner made of it
    Analysed     residuals, what the graph is like; the planning problem in numbers
    Planned      a choice for every residual
    Pair         insert_codecs, KERNELS: passes that write the plan into a copy of forward and backward

A stage is a value: it is made of the one before, and graphs are rewritten only on the way to the next. So one analysis
serves many plans, and every attempt at generating code starts from a copy.

A pass is a row of name and function; the runner owns timing, logging, the trace (`TORCH_TRACE` gets what each pass
changed, as a diff of the code), verification and disabling by name.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import fx

from xconv_fx import hooks
from xconv_fx.errors import OptionError, join_clauses, nearest
from xconv_fx.hooks import trace
from xconv_fx.options import Options
from xconv_fx.passes.batch_separability import NOTHING, separability
from xconv_fx.passes.canonical_views import name_shapes
from xconv_fx.passes.conv3d_kernels import volume_kernels
from xconv_fx.passes.drop_shape_only import shapes_only
from xconv_fx.passes.gather_pooling import gather_pooling
from xconv_fx.passes.graph import nbytes
from xconv_fx.passes.insert_codecs import rewrite
from xconv_fx.passes.late_layout import late_layout, relaid_operands
from xconv_fx.passes.move_device import place
from xconv_fx.passes.own_concatenations import own_concatenations
from xconv_fx.passes.partition import Pair, hoist, partition
from xconv_fx.passes.residuals import Residual, find_residuals
from xconv_fx.passes.scatter_pooling import scatter_pooling
from xconv_fx.passes.split_conv_backward import split_backward
from xconv_fx.passes.stored_gradients import store_gradients, sums
from xconv_fx.plan import Choice, Plan
from xconv_fx.plan.log import log
from xconv_fx.planner import solve
from xconv_fx.planner.dependencies import link
from xconv_fx.planner.microbatch import slice_step
from xconv_fx.planner.microbatches import Batch, Microbatches
from xconv_fx.planner.peak_scenarios import ONCE, Calls
from xconv_fx.planner.problem import PlanningProblem, build_problem, corrected


@dataclass(frozen=True)
class Joint:
    """A joint graph, and what it is for.

    `inputs` and `arguments` are the partitioner's. `batch` says which inputs hold samples (None: none do), and
    `samples` how many; `saved` is the share of the residuals that the partitioner may save, the others being recomputed
    from them, convolutions included. `device` is where the graphs are moved to after they were traced on another one
    (None: nowhere). `plain` graphs stay Inductor's own, and are only made right.
    """

    graph: fx.GraphModule
    inputs: Sequence[object]
    arguments: Mapping[str, Any]
    batch: Batch | None = None
    samples: int = 0
    saved: float = 1.0
    device: str | None = None
    plain: bool = False


@dataclass(frozen=True)
class Partitioned:
    """Forward and backward of a joint graph, and where they are to be moved."""

    pair: Pair
    device: str | None = None


@dataclass(frozen=True)
class Analysed:
    """Forward and backward before any plan, which nobody changes any more, and what was found in them.

    `mixing` is why the batch cannot be sliced, "" when it can; `draws` and `changed` are what slices need to know
    (`Separability`). `relaid` are the inputs that are convolution weights which Inductor copies to channels-last, by
    their indices, and `copies` the bytes of the copies. `operations` are the nodes of the joint graph.
    """

    pair: Pair
    residuals: Mapping[str, Residual]
    mixing: str
    draws: str
    changed: tuple[int, ...]
    relaid: tuple[int, ...]
    copies: int
    operations: int

    @functools.cached_property
    def has_sums(self) -> bool:
        """Whether there are gradients that could be stored in the place of others."""
        return any(sums(self.pair.backward.graph))

    def problem(
        self,
        options: Options,
        goes_on: bool = False,
        calls: Calls = ONCE,
        sliced: bool = False,
    ) -> PlanningProblem:
        """The planning problem of this graph alone: of one slice, whatever number of slices is kept, or of the step.

        `goes_on` says that its results are read by further code of the model, `calls` how often it runs in a step.
        """
        planning = link(build_problem(self.pair, self.residuals, options, not self.mixing, goes_on))
        planning = replace(planning, calls=calls)
        return planning if sliced else slice_step(planning, None)


@dataclass(frozen=True)
class Planned:
    """A plan for an analysed graph: `planning` is the problem that it solves, `phase_peaks` its predicted peaks."""

    analysed: Analysed
    planning: PlanningProblem
    microbatches: Microbatches | None
    plan: Plan
    phase_peaks: Mapping[str, int]


S = TypeVar("S", Joint, Partitioned, Pair)


@dataclass(frozen=True)
class Pass(Generic[S]):
    """A rewrite of a stage's graphs. Without an `optional` one the results are the same, by a slower or larger step.

    `always` runs for plain graphs as well.
    """

    name: str
    apply: Callable[[S], object]
    optional: bool = False
    always: bool = False


def _channels_last(joint: Joint) -> bool:
    return hooks.channels_last_convolutions(joint.graph, joint.device)


NORMALISE: tuple[Pass[Joint], ...] = (
    Pass("deduplicate", lambda joint: hooks.deduplicate(joint.graph), always=True),
    Pass("canonical_views", lambda joint: name_shapes(joint.graph), optional=True),
)
LOWER: tuple[Pass[Joint], ...] = (
    Pass("split_conv_backward", lambda joint: split_backward(joint.graph, _channels_last(joint), joint.device)),
    Pass("scatter_pooling", lambda joint: scatter_pooling(joint.graph), always=True),
    Pass("gather_pooling", lambda joint: gather_pooling(joint.graph), optional=True),
    Pass("drop_shape_only", lambda joint: shapes_only(joint.graph, _channels_last(joint)), optional=True),
)
PREPARE: tuple[Pass[Partitioned], ...] = (
    Pass("hoist", lambda halves: hoist(halves.pair.forward.graph), optional=True),
    Pass("move_device", lambda halves: _move(halves), always=True),
    Pass("late_layout", lambda halves: late_layout(halves.pair), optional=True),
)


# Run on a pair to make another variant of it.
STORE: tuple[Pass[Pair], ...] = (
    Pass("stored_gradients", lambda pair: store_gradients(pair.backward.graph), optional=True),
)


def _move(halves: Partitioned) -> None:
    if halves.device is not None:
        place((halves.pair.forward, halves.pair.backward), halves.device)


def _in_halves(rewrite: Callable[[fx.Graph], None]) -> Callable[[Pair], None]:
    def rewritten(pair: Pair) -> None:
        for half in (pair.forward, pair.backward):
            rewrite(half.graph)
            half.recompile()

    return rewritten


# What runs last, over what the plan was written into.
KERNELS: tuple[Pass[Pair], ...] = (
    Pass("own_concatenations", _in_halves(own_concatenations), optional=True),
    Pass("conv3d_kernels", _in_halves(volume_kernels), optional=True),
)
OPTIONAL = [one.name for row in (NORMALISE, LOWER, PREPARE, STORE, KERNELS) for one in row if one.optional]

_disabled: ContextVar[frozenset[str]] = ContextVar("disabled", default=frozenset())
_verified: ContextVar[bool] = ContextVar("verified", default=False)


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Within this context these optional passes do not run. Raises `OptionError` for any other name."""
    for name in names:
        if name not in OPTIONAL:
            hint = join_clauses("no such optional pass;", nearest(name, OPTIONAL), f"they are {', '.join(OPTIONAL)}")
            raise OptionError("pass", name, hint)
    token = _disabled.set(_disabled.get() | set(names))
    try:
        yield
    finally:
        _disabled.reset(token)


def disabled() -> list[str]:
    """The passes that do not run now."""
    return sorted(_disabled.get())


@contextlib.contextmanager
def verified() -> Iterator[None]:
    """Within this context graphs are checked after every pass: that they are well-formed, and fit together.

    `XCONV_FX_VERIFY=1` does so for a process.
    """
    token = _verified.set(True)
    try:
        yield
    finally:
        _verified.reset(token)


def run(passes: Sequence[Pass[S]], stage: S, plain: bool = False) -> None:
    """Run the passes that are not disabled, in order, over a stage's graphs; of plain ones those alone that must."""
    for one in passes:
        if (one.optional and one.name in _disabled.get()) or (plain and not one.always):
            continue
        before = _text(stage) if trace.listening() else None
        start = time.perf_counter()
        one.apply(stage)
        log.debug("pass %s: %.3f s", one.name, time.perf_counter() - start)
        if before is not None:
            _dump(one.name, before, _text(stage))
        if _verified.get() or os.environ.get("XCONV_FX_VERIFY") == "1":
            _verify(stage)


def _graphs(stage: Joint | Partitioned | Pair) -> dict[str, fx.GraphModule]:
    if isinstance(stage, Joint):
        return {"joint": stage.graph}
    pair = stage.pair if isinstance(stage, Partitioned) else stage
    return {"forward": pair.forward, "backward": pair.backward}


def _text(stage: Joint | Partitioned | Pair) -> list[str]:
    return [line for name, half in _graphs(stage).items() for line in (f"# {name}", *str(half.graph).splitlines())]


def _dump(name: str, before: Sequence[str], after: Sequence[str]) -> None:
    changes = "\n".join(difflib.unified_diff(before, after, "before", "after", lineterm="", n=2))
    trace.artifact(f"xconv_pass_{name}", lambda: changes or "nothing changed", "string")


def _verify(stage: Joint | Partitioned | Pair) -> None:
    for half in _graphs(stage).values():
        half.graph.lint()
    if not isinstance(stage, Joint):
        (stage.pair if isinstance(stage, Partitioned) else stage).verify()


def analyse(joint: Joint) -> Analysed:
    """Partition a joint graph, which is rewritten on the way, and find what there is to plan."""
    run(NORMALISE, joint, joint.plain)
    mixing, draws, changed = "no input holds several samples", NOTHING, ()
    if joint.batch is not None and not joint.plain:
        found = separability(joint.graph, joint.batch.batched, joint.samples, joint.arguments["num_fwd_outputs"])
        mixing, draws, changed = found.mixing, found.draws, found.changed
    run(LOWER, joint, joint.plain)
    operations = len(joint.graph.graph.nodes)
    names = [node.name for node in joint.graph.graph.find_nodes(op="placeholder")]
    halves = Partitioned(partition(joint.graph, joint.inputs, joint.saved, **joint.arguments), joint.device)
    run(PREPARE, halves, joint.plain)
    weights = [] if joint.plain else relaid_operands(halves.pair.forward, 1)
    return Analysed(
        halves.pair,
        find_residuals(halves.pair),
        mixing,
        draws,
        changed,
        tuple(names.index(node.name) for node in weights),
        sum(map(nbytes, weights)),
        operations,
    )


def with_stored_gradients(analysed: Analysed) -> Analysed:
    """The same with sums of gradients in memory of their own."""
    pair, _ = analysed.pair.copy()
    run(STORE, pair)
    return replace(analysed, pair=pair, residuals=find_residuals(pair))


def plan(
    analysed: Analysed,
    planning: PlanningProblem,
    options: Options,
    microbatches: Microbatches | None = None,
    corrections: Mapping[str, int] | None = None,
    bounds: solve.Bounds = solve.ANY,
) -> Planned:
    """The plan for a problem of this graph, whose phases audits found to be short of the `corrections`, in bytes.

    Raises `BudgetInfeasibleError`, and `OptionError` where what the options ask for breaks a limit.
    """
    planning = corrected(planning, corrections or {})
    found, peaks = solve.plan(planning, options, microbatches, bounds)
    return Planned(analysed, planning, microbatches, found, peaks)


def planned_as(
    analysed: Analysed,
    planning: PlanningProblem,
    options: Options,
    choices: Sequence[Choice],
    budget: int | None,
    microbatches: Microbatches | None = None,
) -> Planned:
    """The plan that makes these choices. Raises `ValueError`, which says where they are not choices of this graph."""
    found, peaks = solve.plan_of(planning, options, solve.choice_of(planning, choices), budget, microbatches)
    return Planned(analysed, planning, microbatches, found, peaks)


def finish(planned: Planned, stream: int | None = None, plain: bool = False) -> Pair:
    """Forward and backward with the plan written into them; `stream` names a fixed sequence of seeds."""
    pair, nodes = planned.analysed.pair.copy()
    if plain:
        return pair
    moved = Carried(nodes)
    insert: Pass[Pair] = Pass(
        "insert_codecs",
        lambda pair: rewrite(
            pair,
            moved(planned.analysed.residuals),
            moved(planned.planning.chains),
            planned.plan.choices,
            stream,
            moved(planned.planning.norms),
            moved(planned.planning.blocks),
        ),
    )
    run((insert, *KERNELS), pair)
    return pair


class Carried:
    """Values that hold nodes of a graph, as they are of its copy."""

    def __init__(self, nodes: Mapping[fx.Node, fx.Node]) -> None:
        self.nodes = nodes

    def __call__(self, value: Any) -> Any:
        """The same value, of the copy's nodes; `value` is a node, a dataclass, or a collection of such."""
        if isinstance(value, fx.Node):
            return self.nodes[value]
        if isinstance(value, Mapping):
            return {self(key): self(one) for key, one in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self(one) for one in value)
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{name: self(getattr(value, name)) for name in value.__dataclass_fields__})
        return value
