"""What the graphs of one `torch.compile` call share: one budget, one sequence of seeds, one report.

A model whose trace breaks is compiled as several graphs that run in one step. What an earlier graph holds for its
backward is alive while a later one runs, and the parameters of the others are alive throughout, so both count against
a graph's budget. A graph is known by its frame and by its number among those that one compilation of the frame hands
over (DDPOptimizer hands over several); a frame that is compiled anew (another batch size) replaces its former graphs.

A percentage of `mem_budget` is one of what the whole step takes without xconv. It is resolved for the first training
batch, and is so many bytes from then on: for another batch size, and for a frame that first runs later. While the
first step's graphs arrive one after another, each is planned for the share of what is known of the step so far, which
is the most that any of them takes beside what those before it would hold uncompressed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from xconv_fx import hooks
from xconv_fx.cost_model.memory import Problem
from xconv_fx.errors import OptionError
from xconv_fx.hooks.frames import CompileId
from xconv_fx.options import Options
from xconv_fx.options.budget import Budget
from xconv_fx.plan import Plan
from xconv_fx.plan.report import read_json, write_json
from xconv_fx.planner.surroundings import Surroundings

from . import step_inputs
from .signature import Signature
from .verify import Verifier

if TYPE_CHECKING:
    from xconv_fx.step.shares import Shares

_streams = itertools.count(1)

# The note of a plan that was made and is not in force.
LOST = "not in force: in a later step, code of the model ran eagerly and this graph did not run"
# The frame of graphs that are planned together, which have one sequence of numbers whatever frames they are of.
TOGETHER = "the step"


@dataclass(frozen=True)
class GraphKey:
    """Which graph of a step: the number of its frame, and its own among those of one compilation of that frame."""

    frame: Hashable
    ordinal: int


@dataclass(frozen=True)
class Graph:
    """A graph that Dynamo handed over in one `compilation`, before it is planned.

    In bytes: its `parameters`, its `primals` (parameters and buffers), and the `inputs` that are neither, of which
    `given` were not computed in the step. `goes_on` says that its results are read by further code of the model, so
    that no loss follows. `unread` are the model's own arguments that it does not read, by their number.
    """

    key: GraphKey
    compilation: CompileId | None
    parameters: int
    primals: int
    inputs: int
    given: int
    goes_on: bool
    unread: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphRecord:
    """What a session knows of a planned graph.

    Besides its plan the `problem` that the plan solves, which has no graphs in it, bytes of its `results` as a caller
    holds them, and how many `calls` without a backward the last measured step had (0: none was measured). `held` are
    the bytes that one run holds from its forward to its backward, results included.
    """

    graph: Graph
    plan: Plan
    problem: Problem | None = None
    results: int = 0
    calls: int = 0
    held: int = 0

    @property
    def saved(self) -> int:
        """Bytes of residuals that the plan holds between forward and backward."""
        return self.plan.saved_after


class GivenPlans:
    """The plans of a file that the options name, of which each is for one graph of the step."""

    def __init__(self, plans: Sequence[Plan] = ()) -> None:
        self.plans = tuple(plans)
        self._taken: dict[int, GraphKey] = {}

    @staticmethod
    def read(path: Path | None) -> GivenPlans:
        """The plans of a file. Raises `OptionError` for one that holds none."""
        if path is None:
            return GivenPlans()
        try:
            plans = read_json(path)
            for plan in plans:
                if not (isinstance(plan.slices, int) and 0 <= plan.held_slices <= plan.slices >= 1):
                    raise ValueError(f"slices={plan.slices!r}, held_slices={plan.held_slices!r}")
                if not 0 < plan.saved_share <= 1:
                    raise ValueError(f"saved_share={plan.saved_share!r}")
            return GivenPlans(plans)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            hint = f"not a file of plans: {error}; the option report, and xconv plan --json, write one"
            raise OptionError("plan", str(path), hint) from None

    def within_their_own(self, options: Options) -> Options:
        """The options, with the budget of the plans where they name none."""
        budgets = [plan.budget for plan in self.plans if plan.budget is not None]
        if options.mem_budget is not None or not budgets:
            return options
        return replace(options, mem_budget=Budget(bytes=max(budgets)))

    def left(self, key: GraphKey) -> list[int]:
        """The plans, by number, that this graph may have: those that no other one has."""
        return [number for number in range(len(self.plans)) if self._taken.get(number, key) == key]

    def take(self, number: int, key: GraphKey) -> None:
        """The graph has this plan."""
        self._taken[number] = key


@dataclass
class Session:
    """The records of the graphs compiled so far, in the order in which they run in a step.

    `stream` names the sequence of seeds that a fixed `seed` starts; None draws from torch's generator.
    When planning ahead, `device` is where graphs are moved after they were traced elsewhere (None: nowhere),
    `optimizer_bytes` what an optimiser holds besides, and `facts` are fields that all plans share. Raises `OptionError`
    for statistics of another model.
    """

    options: Options
    module: nn.Module | None = None
    stream: int | None = None
    device: str | None = None
    optimizer_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options.stats is not None and self.module is not None:
            self.options.stats.check(self.module)
        self.given = GivenPlans.read(self.options.plan)
        self.options = self.given.within_their_own(self.options)
        self.records: dict[GraphKey, GraphRecord] = {}
        self._compilations: dict[Hashable, tuple[tuple[object, object] | None, list[weakref.ref[fx.GraphModule]]]] = {}
        self._codes: dict[CompileId, CodeType] = {}
        self._plain_peak = 0
        self._settled = False
        self.shares: Shares | None = None
        self.apart = ""
        self._places: list[tuple[weakref.ref[fx.GraphModule], int]] = []
        self._measured_peak: int | None = None
        self.verifier = Verifier(self)

    @staticmethod
    def of(options: Options) -> Session:
        """The session of the `torch.compile` call that is compiling now, or a new one outside of any."""
        call = hooks.compile_call()
        session = getattr(call, "xconv_session", None)
        if session is None:
            session = Session(options, hooks.compiled_module())
            if options.seed is not None:
                from xconv_fx.ops.seed import start

                session.stream = next(_streams)
                start(session.stream, options.seed)
            if call is not None:
                call.xconv_session = session  # type: ignore[attr-defined]
        return session

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a compiled model compiles for itself, in a session of its own."""
        return type(None), ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of the step's graphs, in the order in which they run."""
        ordered = sorted(self.records, key=self._place)
        return tuple(self.records[key].plan for key in ordered)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the plans of all graphs."""
        if self.shares is None:
            return (f"the graphs of a step are planned one after another: {self.apart}",) if self.apart else ()
        return (f"planned together with the other graphs of a step, {len(self.shares.step.graphs)} in all",)

    def together(self, shares: Shares) -> None:
        """The graphs that are compiled next are those of one step, which are planned together.

        Those among them that were compiled before, and are not compiled anew, hold what they held.
        """
        self.settle()
        known = {} if self.shares is None else self.shares.known()
        shares.held = {
            place: known[signature] for place, signature in enumerate(shares.step.signatures) if signature in known
        }
        self.records, self._places = {}, []
        self._compilations = {TOGETHER: (None, [])}
        self.shares = shares
        if not self._settled:
            self._plain_peak = shares.plain
        shares.options = self.settled(shares.options)

    def is_next(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
        """Whether this graph is one of those that are planned together, and was not compiled yet."""
        if self.shares is None:
            return False
        taken = {place for _, place in self._places}
        signature = Signature.of(gm, example_inputs)
        for place, known in enumerate(self.shares.step.signatures):
            if place not in taken and known == signature:
                self._places.append((weakref.ref(gm), place))
                return True
        return False

    def graph(self, gm: fx.GraphModule) -> Graph:
        """What is known of the graph that is compiled now. Each is to be asked for before its frame's next one."""
        place = next((place for known, place in self._places if known() is gm), None)
        if place is not None:
            return self._together(gm, place)
        return Graph(
            self._key(gm),
            hooks.compile_id(),
            hooks.parameter_bytes(gm),
            hooks.parameter_bytes(gm, buffers=True),
            hooks.input_bytes(gm),
            hooks.input_bytes(gm, given=True),
            hooks.goes_on(),
            step_inputs.unread(gm),
        )

    def expect(self, graph: Graph) -> None:
        """A graph that another session was asked for runs in this one's step as well, after those that are known."""
        self._compilations.setdefault(graph.key.frame, (None, []))

    def _together(self, gm: fx.GraphModule, place: int) -> Graph:
        """A graph that is compiled now, one of those that are planned together."""
        compilation, code = hooks.compile_id(), hooks.compiling_code()
        if compilation is not None and code is not None:
            self._codes[compilation] = code
        return replace(self.of_a_step(gm, place), compilation=compilation)

    @staticmethod
    def of_a_step(gm: fx.GraphModule, place: int) -> Graph:
        """What is known of a graph that is planned together with others: what a loss takes is counted for them all."""
        parameters, primals = hooks.parameter_bytes(gm), hooks.parameter_bytes(gm, buffers=True)
        inputs = hooks.input_bytes(gm)
        return Graph(GraphKey(TOGETHER, place), None, parameters, primals, inputs, given=0, goes_on=True)

    def _key(self, gm: fx.GraphModule) -> GraphKey:
        """The graph's key; forgets the frame's former graphs when it is compiled anew."""
        compilation = hooks.compile_id()
        frame = None if compilation is None else compilation[0]
        known, seen = self._compilations.get(frame, ((None, None), []))
        numbers = [ordinal for ordinal, graph in enumerate(seen) if graph() is gm]
        if numbers:
            return GraphKey(frame, numbers[0])
        context = hooks.compilation()
        current = compilation, None if context is None else weakref.ref(context)
        if seen and (compilation is None or known != current):
            self.settle()
            self.records = {key: record for key, record in self.records.items() if key.frame != frame}
            seen = []
        if compilation is not None and (code := hooks.compiling_code()) is not None:
            self._codes[compilation] = code
        self._compilations[frame] = current, [*seen, weakref.ref(gm)]
        return GraphKey(frame, len(seen))

    def settle(self) -> None:
        """The first training batch is over: a percentage is from here on as many bytes as it was last."""
        self._settled = self._plain_peak > 0

    def settled(self, options: Options) -> Options:
        """The options, with bytes in the place of a percentage that is resolved."""
        if options.mem_budget is None or not (self._settled or (self.shares is not None and self._plain_peak)):
            return options
        budget = options.mem_budget.resolve_for(self._plain_peak)
        return replace(options, mem_budget=Budget(bytes=budget))

    def resolve(self, budget: Budget, plain_peak: int, graph: Graph) -> int:
        """The budget in bytes for a graph whose step without xconv, beside what it really runs beside, takes so much.

        The earlier graphs hold what their plans hold; without xconv they would hold all of their residuals.
        """
        if budget.bytes is not None:
            return budget.bytes
        if not self._settled:
            spared = sum(r.plan.saved_before - r.saved for r in self._before(graph))
            self._plain_peak = max(self._plain_peak, plain_peak + spared)
        return budget.resolve_for(self._plain_peak)

    def _before(self, graph: Graph) -> list[GraphRecord]:
        """The graphs that run earlier in the step."""
        place = self._place(graph.key)
        return [record for key, record in self.records.items() if self._place(key) < place]

    def _place(self, key: GraphKey) -> tuple[int, int]:
        """Frames are first compiled in the order in which they run, and keep their place when compiled anew."""
        return list(self._compilations).index(key.frame), key.ordinal

    def of_step(self, key: GraphKey) -> dict[str, int]:
        """Fields of the plan of a graph that tell of all graphs: without xconv, it would not be alone either."""
        if key.frame != TOGETHER or self.shares is None:
            return {}
        return {"baseline_peak": self.shares.plain}

    def calling(self, options: Options, key: GraphKey) -> Options:
        """The options for a graph, with how often it runs in a step before a backward."""
        if key.frame != TOGETHER or self.shares is None:
            return options
        return replace(options, calls=self.shares.count(key.ordinal))

    def surroundings(self, graph: Graph) -> Surroundings:
        """What is alive in the step besides this graph. Raises `BudgetInfeasibleError` where the step has no plan."""
        if graph.key.frame != TOGETHER or self.shares is None:
            return Surroundings(self.outside(graph))
        return self.shares.surroundings(graph.key.ordinal)

    def outside(self, graph: Graph) -> int:
        """Bytes alive while this graph runs that are none of its tensors.

        The parameters and buffers of the module's other graphs; what earlier graphs hold for their backward, and their
        inputs; what the model is called with and none of these reads; the gradients of later graphs, which their
        backward has left when this one's runs; and the optimiser's state.
        """
        earlier = self._before(graph)
        held = self.optimizer_bytes + sum(record.saved + record.graph.inputs for record in earlier)
        held += sum(size for number, size in graph.unread.items() if all(number in r.graph.unread for r in earlier))
        if self.module is None:
            return held
        before = sum(record.graph.parameters for record in earlier)
        every = sum(p.numel() * p.element_size() for p in self.module.parameters())
        buffers = sum(b.numel() * b.element_size() for b in self.module.buffers())
        later = max(0, every - graph.parameters - before)
        others = max(0, every + buffers - graph.primals)
        return held + others + later

    @property
    def budget(self) -> int | None:
        """The budget of the step in bytes, as far as it is known; None without one."""
        wanted = self.options.mem_budget
        if wanted is None or (wanted.bytes is None and not self._plain_peak):
            return None
        return wanted.resolve_for(self._plain_peak)

    @property
    def measured_peak(self) -> int | None:
        """Bytes that the last measured step took."""
        return self._measured_peak

    def ran(self, record: GraphRecord, calls: int, peak: int) -> GraphRecord:
        """A step was measured in which this graph had so many calls: the graph's record with that."""
        self._measured_peak = peak
        self.settle()
        known = self.records.get(record.graph.key)
        found = replace(record, plan=replace(record.plan, measured_peak=peak), calls=calls)
        if known is not None and known.graph == record.graph:
            self.add(found)
        return found

    def compile_anew(self) -> None:
        """Let Dynamo compile all graphs again when they are next called."""
        hooks.forget(self._codes)
        self._codes.clear()
        self.shares = None

    def add(self, record: GraphRecord) -> None:
        """Record a graph's plan, and write all plans where the user asked for them."""
        if self.shares is not None and record.graph.key.frame == TOGETHER:
            self.shares.held[record.graph.key.ordinal] = record.held
        self.records[record.graph.key] = record
        self._write()

    def lose(self, ran: Collection[GraphKey]) -> None:
        """Mark the plans of all graphs but those that `ran`: their code has run eagerly."""
        for key, record in self.records.items():
            if key not in ran and LOST not in record.plan.notes:
                self.records[key] = replace(record, plan=replace(record.plan, notes=(*record.plan.notes, LOST)))
        self._write()

    def _write(self) -> None:
        if self.options.report is not None and self.records:
            write_json(self.plans, self.options.report)
