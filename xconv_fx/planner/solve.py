"""Turn the planning problem's solution into a `Plan`, and an infeasible budget into the user's error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xconv_fx.cost_model.greedy import Table
from xconv_fx.cost_model.limits import Limits
from xconv_fx.cost_model.memory import peak, profile
from xconv_fx.cost_model.solver import Infeasible, OverLimits, minimum_peak, solve
from xconv_fx.device import rates
from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.options import Options
from xconv_fx.passes.residuals import uncompressible
from xconv_fx.plan import Choice, Plan
from xconv_fx.reproducible import effort

from .microbatch import slice_step
from .microbatches import Microbatches
from .presets import apply_preset, average_bits
from .problem import PlanningProblem
from .storage import StorageCandidate

SECONDS = 2.0
# Noise 0.01 (an error of a gradient of 10%) is worth as much as a step that takes a tenth longer.
NOISE_PRICE = 10.0
# Effort for the plan of least peak: so many nodes of the search tree, which give the same plan in every run, whatever
# else the machine does. Seconds are for problems that would take for ever.
LOWEST_NODES, LOWEST_SECONDS = 100, 15.0
# Layers that a note names.
NAMED = 5


@dataclass(frozen=True)
class Bounds:
    """What is known of a plan beforehand: that the choices of a step, or of a slice, may add so many `seconds` (None:
    any), and a `start` that is within the budget and the limits (None: none is known)."""

    seconds: float | None = None
    start: tuple[int, ...] | None = None


ANY = Bounds()


def plan(
    planning: PlanningProblem, options: Options, microbatches: Microbatches | None = None, bounds: Bounds = ANY
) -> tuple[Plan, dict[str, int]]:
    """The plan that `prefer` asks for, whose predicted peak is within the budget; and its peak in each phase.

    `microbatches` says of how many slices `planning` is one. Without a budget every residual is kept. Raises
    `BudgetInfeasibleError`, and `OptionError` where what the options ask for breaks a limit whatever the budget.
    """
    options.probes.check({layer for residual in planning.residuals for layer in residual.readers})
    if microbatches is not None:
        found, peaks = plan(slice_step(planning, microbatches), options, None, bounds)
        return replace(found, slices=microbatches.count, held_slices=microbatches.held), peaks
    unprobed = _unprobed(planning, options)
    keep = tuple(0 for _ in planning.residuals)
    baseline, _ = peak(planning.problem, keep)
    if options.codecs.preset:
        return _preset(planning, options, baseline, unprobed)
    if options.mem_budget is None:
        return describe(planning, keep, None, baseline, 0.0, unprobed), planning.phase_peaks(keep)
    budget = options.mem_budget.resolve_for(baseline)
    try:
        solution = solve(
            planning.problem,
            options.limit(budget).usable,
            **effort(SECONDS),
            tradeoff=tradeoff(planning, options),
            limits=limits(options, bounds.seconds),
            start=bounds.start,
        )
    except Infeasible as error:
        raise infeasible(planning, error, budget, options) from None
    except OverLimits:
        raise _too_noisy(options) from None
    found = describe(planning, solution.choice, budget, baseline, solution.gap, unprobed)
    return found, planning.phase_peaks(solution.choice)


def choice_of(planning: PlanningProblem, choices: Sequence[Choice]) -> tuple[int, ...]:
    """The candidates that these choices are, one for each residual of the problem, in its order.

    Raises `ValueError`, which says where they are not those of this problem.
    """
    wanted = {choice.residual: choice for choice in choices}
    found: list[list[int]] = []
    for residual, row in zip(planning.residuals, planning.candidates, strict=True):
        choice = wanted.pop(residual.name, None)
        if choice is None:
            raise ValueError(
                f"it holds nothing of {residual.name}, {list(residual.shape)}, of {residual.layer or 'it'}"
            )
        places = [place for place, candidate in enumerate(row) if _held_as(candidate.choice) == _held_as(choice)]
        if not places:
            said = {"shape": choice.shape, "dtype": choice.dtype, **vars(choice.spec)}
            how = " ".join(f"{name}={value}" for name, value in said.items() if value)
            raise ValueError(f"these options do not let {residual.name} be held as it says: {how}")
        # From exact values or from codes a residual is recomputed by the same name: what the choice adds tells which.
        differences = {place: _difference(row[place].choice, choice) for place in places}
        found.append([place for place in places if differences[place] == min(differences.values())])
    if wanted:
        raise ValueError(f"the graph has no {next(iter(wanted))}")
    return _allowed(planning, found)


def _allowed(planning: PlanningProblem, found: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Of candidates that say the same of a residual, and differ in when it is made again: the latest that are in time
    for all that needs them."""
    chosen = [places[0] for places in found]
    waiting = list(range(len(found)))
    while waiting:
        item = waiting.pop()
        for other, options in planning.candidates[item][chosen[item]].option.needs:
            earlier = [place for place in found[other] if place in options]
            if chosen[other] not in options and earlier:
                chosen[other] = earlier[0]
                waiting.append(other)
    return tuple(chosen)


def _held_as(choice: Choice) -> tuple[object, ...]:
    """What a choice says of how a value is held."""
    return choice.shape, choice.dtype, choice.spec


def _difference(one: Choice, other: Choice) -> tuple[int, float]:
    """How far two choices that hold a value in the same way are apart in what that takes."""
    return abs(one.bytes_after - other.bytes_after), abs(one.noise - other.noise)


def plan_of(
    planning: PlanningProblem,
    options: Options,
    choice: tuple[int, ...],
    budget: int | None,
    microbatches: Microbatches | None = None,
) -> tuple[Plan, dict[str, int]]:
    """The plan of these candidates, whatever its peak; and its peak in each phase."""
    if microbatches is not None:
        found, peaks = plan_of(slice_step(planning, microbatches), options, choice, budget)
        return replace(found, slices=microbatches.count, held_slices=microbatches.held), peaks
    baseline, _ = peak(planning.problem, tuple(0 for _ in planning.residuals))
    return describe(planning, choice, budget, baseline, 0.0, _unprobed(planning, options)), planning.phase_peaks(choice)


def _preset(
    planning: PlanningProblem, options: Options, baseline: int, notes: tuple[str, ...]
) -> tuple[Plan, dict[str, int]]:
    """The plan of a published system. Whether it fits a budget is found out from it, not by it."""
    preset = options.codecs.preset
    choice = apply_preset(planning, preset)
    average = average_bits(planning, choice)
    notes = (f"codecs as in {preset}" + (f": {float(average):.3g} bits on average" if average else ""), *notes)
    return describe(planning, choice, None, baseline, 0.0, notes), planning.phase_peaks(choice)


def lowest(
    planning: PlanningProblem, options: Options, microbatches: Microbatches | None, seconds: float | None
) -> Infeasible:
    """What a budget of nothing is told: the plan of least predicted peak within the limits.

    `seconds` are those of `Bounds`. The same in every run. Raises `OptionError` where no plan is within the limits.
    """
    problem = planning.problem if microbatches is None else slice_step(planning, microbatches).problem
    kept = limits(options, seconds)
    found = minimum_peak(problem, time_limit=LOWEST_SECONDS, nodes=LOWEST_NODES, limits=kept)
    if not Table(problem, kept).keeps(found.choice):
        raise _too_noisy(options)
    return Infeasible(budget=0, smallest=found.peak, choice=found.choice, step=found.step, bound=found.bound)


def limits(options: Options, seconds: float | None = None) -> Limits:
    """The options' limits, as constraints of the search."""
    noise = options.noise_limits
    return Limits(noise.noise, noise.layer, seconds)


def _too_noisy(options: Options) -> OptionError:
    name, limit = next(iter(options.given_limits().items()))
    return OptionError(name, limit, "what `probes` and `codecs` ask for breaks it whatever the budget")


def tradeoff(planning: PlanningProblem, options: Options) -> float:
    """The noise that a second is worth to the user, by `prefer`: none, NOISE_PRICE a step's time, or any."""
    return tradeoff_of(sum(planning.seconds.values()), options)


def tradeoff_of(seconds: float, options: Options) -> float:
    """The same for a step that takes so many seconds."""
    if options.prefer == "balanced":
        return 1 / (NOISE_PRICE * max(seconds, 1e-9))
    return 0.0 if options.prefer == "exact" else math.inf


def describe(
    planning: PlanningProblem,
    choice: tuple[int, ...],
    budget: int | None,
    baseline: int,
    gap: float,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan that the solver's choice stands for."""
    chosen = [row[index] for row, index in zip(planning.candidates, choice, strict=True)]
    bytes_at_peak, step = peak(planning.taken(), choice)
    return Plan(
        device=planning.device,
        budget=budget,
        baseline_peak=baseline,
        predicted_peak=bytes_at_peak,
        peak_at=planning.problem.labels[step],
        fixed_bytes=planning.fixed_bytes,
        calls=planning.calls.count,
        choices=tuple(candidate.choice for candidate in chosen),
        noise=sum(candidate.option.noise for candidate in chosen),
        time=sum(candidate.option.time for candidate in chosen),
        gap=gap,
        calibrated=rates.spec(planning.device).calibrated,
        notes=(
            *uncompressible({residual.name: residual for residual in planning.residuals}),
            *notes,
            *_by_sample(chosen),
            *_assumed(planning),
        ),
        measured=planning.noises.stats is not None,
        layers=planning.noises.by_layer(candidate.added for candidate in chosen),
    )


def _unprobed(planning: PlanningProblem, options: Options) -> tuple[str, ...]:
    """A note for each layer that must use probes by the options, but whose input cannot be held as such."""
    return tuple(
        f"{residual.reader}: its input {residual.name} is not held as probes: the backward reads it elsewhere as well"
        for residual, row in zip(planning.residuals, planning.candidates, strict=True)
        if residual.reader
        and options.probes.count_among(residual.readers) is not None
        and all(candidate.choice.codec != "probe" for candidate in row)
    )


def _by_sample(chosen: Sequence[StorageCandidate]) -> tuple[str, ...]:
    """A note of what has codes of another width for each sample."""
    shared = sum(bool(candidate.choice.by_sample) for candidate in chosen)
    return (f"bits of {shared} residuals are shared out among the samples of a batch",) if shared else ()


def _assumed(planning: PlanningProblem) -> tuple[str, ...]:
    """A note that names layers whose noise is a prior, although there are statistics."""
    layers = planning.noises.unmeasured()
    if not layers:
        return ()
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return (f"without statistics, their noise by a prior: {', '.join(layers[:NAMED])}{more}",)


def infeasible(planning: PlanningProblem, error: Infeasible, budget: int, options: Options) -> BudgetInfeasibleError:
    """The user's error: the smallest budget that works, and the largest consumers at its peak."""
    alive = []
    for residual, row, index in zip(planning.residuals, planning.candidates, error.choice, strict=True):
        held = sum(size for first, last, size in row[index].option.loads if first <= error.step <= last)
        alive.append((residual.layer or residual.name, held))
    rest = (
        int(profile(planning.problem, error.choice)[error.step]) - sum(size for _, size in alive) - planning.fixed_bytes
    )
    alive.append(("parameters, buffers and inputs", planning.fixed_bytes))
    alive.append((f"gradients and transients at {planning.problem.labels[error.step]}", rest))
    consumers = tuple(sorted(alive, key=lambda row: -row[1])[:5])
    return BudgetInfeasibleError(budget=budget, smallest=options.smallest_for(error.smallest), consumers=consumers)
