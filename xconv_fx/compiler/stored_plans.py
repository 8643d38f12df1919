"""Plans that were made before: one that the user names (the option `plan`), and those that the cache on disk keeps.

The cache is asked before a search. Its key is everything that a search rests on: the graph, as Dynamo and as
AOTAutograd traced it, which must call no operators of the user's own; its inputs, the options, what is alive around the
graph, the versions of this package and of torch with its compiler's settings, and the numbers of the machine. What is
found is compiled and audited like any plan; where that does not come out as it was stored, the search runs as if
nothing had been found. `XCONV_FX_PLAN_CACHE=0` turns the cache off.

Known gap: what several graphs of one step may take of the budget is searched for again in every process; only the plan
of each graph is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from xconv_fx import hooks
from xconv_fx.device import rates
from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.fingerprint import source_hash
from xconv_fx.hooks import dispatch
from xconv_fx.plan import Plan
from xconv_fx.plan.log import log
from xconv_fx.planner.microbatches import Microbatches

from .candidates import FULL_BATCH, Variant
from .capture import CaptureRequest, JointText
from .pipeline import disabled

FORMAT = 1


@dataclass(frozen=True)
class StoredPlan:
    """What a search came to: the plan as it was recorded, and what else there is to know to compile it.

    `baseline_peak` are the bytes that the step takes without xconv, `notes` what was noted while it was looked for. Of
    a step in slices, `draws`, `relaid`, `copies` and `changed` are those of `Microbatches`.
    """

    plan: Plan
    baseline_peak: int
    notes: tuple[str, ...] = ()
    draws: str = ""
    relaid: tuple[int, ...] = ()
    copies: int = 0
    changed: tuple[int, ...] = ()

    @staticmethod
    def of(plan: Plan, baseline_peak: int, notes: tuple[str, ...], microbatches: Microbatches | None) -> StoredPlan:
        """The plan of a step in these slices."""
        if microbatches is None:
            return StoredPlan(plan, baseline_peak, notes)
        return StoredPlan(
            plan,
            baseline_peak,
            notes,
            microbatches.draws,
            microbatches.relaid,
            microbatches.copies,
            microbatches.changed,
        )

    def variant(self, request: CaptureRequest) -> Variant:
        """The variant that it is a plan for, of a graph that it was stored for."""
        whole = full_batch_of(self.plan)
        if self.plan.slices == 1:
            return whole
        assert request.batch is not None, "the key says that the inputs are the same"
        microbatches = Microbatches(
            request.batch, self.plan.slices, self.plan.held_slices, self.draws, self.relaid, self.copies, self.changed
        )
        return replace(whole, microbatches=microbatches)


def full_batch_of(plan: Plan) -> Variant:
    """The variant that a plan was made for, but for its slices."""
    return replace(FULL_BATCH, saved=plan.saved_share, relayout=plan.relayout, store_gradients=plan.store_gradients)


def look_up(path: Path) -> StoredPlan | BudgetInfeasibleError | None:
    """What is kept there, a plan or what the search ended with; None for nothing, or for what cannot be read."""
    try:
        row: dict[str, Any] = json.loads(path.read_text())
        if row.pop("format") != FORMAT:
            return None
        if "refused" in row:
            return BudgetInfeasibleError(**row["refused"])
        plan = Plan.from_json(json.dumps(row.pop("plan")))
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
        found = StoredPlan(plan, **known)
        for number in (found.baseline_peak, found.copies, plan.slices, plan.held_slices, *found.relaid, *found.changed):
            operator.index(number)
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.debug("a stored plan cannot be read: %s", error)
        return None


def keep(path: Path | None, found: StoredPlan | BudgetInfeasibleError) -> None:
    """Keep there what a search came to. A folder that cannot be written to is none."""
    if path is None:
        return
    if isinstance(found, BudgetInfeasibleError):
        names = ("budget", "smallest", "consumers", "notes")
        row: dict[str, Any] = {"refused": {name: getattr(found, name) for name in names}}
    else:
        row = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        # What a measured step takes is found out anew.
        row["plan"] = json.loads(replace(found.plan, measured_peak=None).to_json())
    text = json.dumps({**row, "format": FORMAT}, sort_keys=True)
    with contextlib.suppress(OSError):
        rates.write_whole(path, text)


def find(request: CaptureRequest) -> tuple[Path | None, StoredPlan | None]:
    """Where what is found for this graph and these options is kept (None: nowhere), and the plan that is.

    Raises the `BudgetInfeasibleError` that a search ended with before.
    """
    if not rates.keeps_findings():
        return None, None
    known = _known(request)
    place: Path | None = None
    found: StoredPlan | BudgetInfeasibleError | None = None

    def look(joint: JointText) -> bool:
        nonlocal place, found
        if joint.known:
            key = hashlib.sha256((known + joint.text).encode()).hexdigest()
            place = rates.folder() / "plans" / f"{key}.json"
            found = look_up(place)
        return found is None or (isinstance(found, StoredPlan) and found.variant(request) == FULL_BATCH)

    request.found.look_at_joint(request, look)
    if isinstance(found, BudgetInfeasibleError):
        raise found
    return place, found


def _known(request: CaptureRequest) -> str:
    """What stands for all that a search for this graph rests on, besides its joint graph.

    What Dynamo's graph calls by name may be anything: what AOTAutograd traced of it counts. Operators of the user's own
    stay in that as names.
    """
    graph = request.graph
    parts = (
        source_hash(),
        hooks.compiler_settings(),
        _graph(request.gm),
        [_described(value) for value in request.example_inputs],
        hooks.data_inputs(request.gm),
        request.options.fingerprint(),
        request.around,
        (graph.goes_on, graph.parameters, graph.primals, graph.inputs, graph.given),
        request.session.device,
        sorted(request.session.facts.items()),
        rates.specs(request.example_inputs),
        rates.Machine.of("cpu"),
        dispatch.settings(),
        disabled(),
    )
    return repr(parts)


def _graph(gm: fx.GraphModule) -> list[Any]:
    """The graph as text, with the layers that its operations belong to, and the graphs inside of it."""
    found: list[Any] = [str(gm.graph)]
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        layers = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        found.append((node.name, layers, _described(value)))
    return found + [(name, _graph(child)) for name, child in gm.named_children() if isinstance(child, fx.GraphModule)]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes: Sequence[Any] = (tuple(map(int, value.shape)), tuple(map(int, value.stride())))
        return (*sizes, value.dtype, value.device, value.requires_grad)
    return repr(value) if isinstance(value, (int, float, bool, str)) else type(value).__name__
