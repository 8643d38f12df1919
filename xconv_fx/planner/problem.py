"""Build the planning problem of a pair in numbers: steps, bytes, noise and time of every way to hold every residual.

The steps are the forward's followed by the backward's (`passes/liveness.py`). What no choice changes is the base:
parameters, inputs, results, gradients, transients. Every residual adds a load from its production to its last reader in
the backward, of its own bytes when it is kept, of its payload when it is not; and once more its own bytes wherever a
decoded tensor must exist because an extern kernel reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from xconv_fx import hooks
from xconv_fx.cost_model.memory import Problem, profile
from xconv_fx.device import rates
from xconv_fx.options import Options
from xconv_fx.passes.find_norms import Norm, find_norms
from xconv_fx.passes.graph import (
    arguments,
    is_primal,
    is_tangent,
    nbytes,
    output_node,
    tensor_of,
)
from xconv_fx.passes.late_layout import layout_copies
from xconv_fx.passes.liveness import timeline
from xconv_fx.passes.partition import Pair
from xconv_fx.passes.rematerialize import RecomputeSubgraph, find_block, find_recompute_subgraph
from xconv_fx.passes.residuals import Residual, small
from xconv_fx.passes.step_time import step_seconds

from .loss import Ends
from .peak_scenarios import ONCE, Calls
from .sensitivities import Sensitivities
from .step_timeline import StepTimeline
from .storage import Context, StorageCandidate, candidates, items_of
from .surroundings import ALONE, Surroundings

aten = torch.ops.aten


@dataclass(frozen=True)
class PlanningProblem:
    """The problem for the solver, and what its items and options stand for.

    `chains`, `blocks` and `norms` belong to residuals, by name; `phases` names the phase of every step. `ends` is what
    the forward returns, as a loss has it, `calls` how often the graph runs in a step; `rest` are bytes that cross to
    the backward besides the residuals, whatever is chosen. `seconds` is what the forward and the backward take by the
    roofline when everything is kept; `noises` how much noise matters. Of what is alive in the loss, `spare` bytes are
    left free for others.
    """

    problem: Problem
    residuals: tuple[Residual, ...]
    candidates: tuple[tuple[StorageCandidate, ...], ...]
    chains: dict[str, RecomputeSubgraph]
    blocks: dict[str, RecomputeSubgraph]
    norms: dict[str, Norm]
    fixed_bytes: int
    device: str
    phases: tuple[str, ...]
    ends: Ends
    rest: int
    seconds: Mapping[str, float]
    noises: Sensitivities
    calls: Calls = ONCE
    spare: int = 0

    def steps(self, phase: str) -> list[int]:
        """The steps of a phase: "forward", "loss" or "backward"."""
        return [step for step, name in enumerate(self.phases) if name == phase]

    def phase_peaks(self, choice: tuple[int, ...]) -> dict[str, int]:
        """The predicted peak of the forward, the loss and the backward."""
        alive = profile(self.problem, choice)
        return {phase: int(alive[self.steps(phase)].max(initial=0)) for phase in ("forward", "loss", "backward")}

    def taken(self) -> Problem:
        """The problem without what is left free."""
        base = self.problem.base
        rest = (size - self.spare * (phase == "loss") for size, phase in zip(base, self.phases, strict=True))
        return replace(self.problem, base=tuple(rest))

    def baseline_peak(self) -> int:
        """The predicted peak with everything kept, in bytes."""
        return max(self.phase_peaks((0,) * len(self.residuals)).values())


def build_problem(
    pair: Pair, residuals: Mapping[str, Residual], options: Options, apart: bool = False, goes_on: bool = False
) -> PlanningProblem:
    """The planning problem of the pair, beside nothing.

    `apart` says that samples are known to be computed apart, `goes_on` that the results go on into further code of the
    model.
    """
    total = sum(residual.bytes for residual in residuals.values())
    large = {name: residual for name, residual in residuals.items() if not small(residual, total)}
    last = hooks.channels_last_convolutions(pair.forward)
    forward = timeline(pair.forward.graph, [residual.forward for residual in large.values()], last)
    line = StepTimeline(forward, timeline(pair.backward.graph, images_last=last))
    device = _device(pair)
    saved = {name: node for name, (node, _) in pair.saved().items()}
    chains = _replayable(
        large, ((name, find_recompute_subgraph(r.forward, set(saved) - {name})) for name, r in large.items())
    )
    context = Context(
        options,
        large,
        line,
        chains,
        _replayable(large, ((name, find_block(chain, saved)) for name, chain in chains.items())),
        find_norms(large.values()) if "fixed" in options.codecs else {},
        Sensitivities(large, options.stats, pair),
        rates.spec(device),
        apart,
    )
    rows = tuple(candidates(residual, context) for residual in large.values())
    others = Others.of(pair, large, goes_on)
    labels = (*(n.name for n in line.forward.steps), "the loss", *(n.name for n in line.backward.steps))
    phases = ("forward",) * len(line.forward.steps) + ("loss",) + ("backward",) * len(line.backward.steps)
    residuals_held = tuple(large.values())
    return PlanningProblem(
        Problem(tuple(others.base(line)), items_of(residuals_held, rows), labels),
        residuals_held,
        rows,
        dict(context.chains),
        dict(context.blocks),
        dict(context.norms),
        others.resident,
        device,
        phases,
        ends=others.ends,
        rest=others.crossing + others.copies,
        seconds={
            "forward": step_seconds(line.forward, context.machine),
            "backward": step_seconds(line.backward, context.machine),
        },
        noises=context.noises,
    )


def resident_bytes(nodes: Iterable[fx.Node]) -> int:
    """Parameters, buffers and inputs among the nodes: alive during the whole step."""
    return sum(nbytes(node) for node in nodes if is_primal(node))


def corrected(planning: PlanningProblem, corrections: Mapping[str, int]) -> PlanningProblem:
    """The problem with its phases found short of so many bytes."""
    if not corrections:
        return planning
    base = (
        size + corrections.get(phase, 0) for size, phase in zip(planning.problem.base, planning.phases, strict=True)
    )
    return replace(planning, problem=replace(planning.problem, base=tuple(base)))


def beside(planning: PlanningProblem, around: Surroundings) -> PlanningProblem:
    """The problem of a graph that was planned alone, with this alive besides the graph's own tensors."""
    if around == ALONE:
        return planning
    more = {
        "forward": around.throughout,
        "loss": around.throughout + around.inside + around.spare,
        "backward": around.throughout + around.returning,
    }
    return replace(
        corrected(planning, more),
        fixed_bytes=planning.fixed_bytes + around.throughout,
        spare=planning.spare + around.spare,
    )


def _device(pair: Pair) -> str:
    values = (tensor_of(node) for node in pair.forward.graph.nodes)
    return next((str(value.device) for value in values if value is not None), "cpu")


def _replayable(
    residuals: Mapping[str, Residual], found: Iterable[tuple[str, RecomputeSubgraph | None]]
) -> dict[str, RecomputeSubgraph]:
    """How residuals can be made again of others, by name, as far as it was found."""
    return {
        name: chain
        for name, chain in found
        if chain is not None and all(source in residuals for source in chain.sources)
    }


@dataclass(frozen=True)
class Others:
    """What is alive besides the residuals that are chosen for, in bytes.

    `resident` throughout: parameters, buffers and inputs. `crossing` are small residuals, which are kept, `copies`
    those that Inductor makes of inputs in another layout, and `relaid` those that AOTAutograd makes of gradients that
    come contiguous.
    """

    ends: Ends
    resident: int
    crossing: int
    copies: int
    relaid: int

    @staticmethod
    def of(pair: Pair, residuals: Mapping[str, Residual], goes_on: bool) -> Others:
        """Of a pair, of whose residuals these are chosen for."""
        tangents = [node for node in pair.backward.graph.find_nodes(op="placeholder") if is_tangent(node)]
        results = arguments(output_node(pair.forward.graph))[0][: pair.results]
        strided = [n for n in tangents if (value := tensor_of(n)) is not None and not value.is_contiguous()]
        return Others(
            Ends.of([node for node in results if isinstance(node, fx.Node)], tangents, goes_on),
            resident_bytes(pair.forward.graph.nodes),
            sum(nbytes(node) for name, (node, _) in pair.residuals().items() if name not in residuals),
            layout_copies(pair.forward),
            sum(map(nbytes, strided)),
        )

    def base(self, line: StepTimeline) -> list[int]:
        """Bytes alive at every step that no choice changes."""
        constant, held = self.resident + self.copies, self.crossing + self.ends.results
        after = constant + held + self.ends.kept + self.ends.tangents + self.relaid
        forward = [constant + size for size in line.forward.profile()]
        return [*forward, constant + held + self.ends.between, *(after + size for size in line.backward.profile())]
