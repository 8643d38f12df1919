"""Candidates for running a step, which are compared: what each costs in noise and in time, and which is preferred.

Limits of noise and time are constraints of every plan that is compared (`cost_model/limits.py`), no filter on those
that are preferred: a plan that keeps them is found where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xconv_fx.cost_model.limits import SLACK, noisiest
from xconv_fx.cost_model.solver import Infeasible, OverLimits, Solution, solve
from xconv_fx.errors import OptionError
from xconv_fx.options import Options
from xconv_fx.planner.microbatch import slice_step
from xconv_fx.planner.microbatches import Microbatches
from xconv_fx.planner.problem import PlanningProblem
from xconv_fx.planner.solve import NOISE_PRICE, limits, tradeoff
from xconv_fx.reproducible import effort

# A plan that is exact and no slower than this is not compared with others.
NEGLIGIBLE = 0.05
# Seconds for one solution of the planning problem while candidates are compared.
GLANCE = 0.5
# What a call of a kernel from Python takes besides the kernel: it counts once more for every slice.
CALL = 1e-5


@dataclass(frozen=True)
class Variant:
    """What a graph is compiled as, before it is planned.

    `microbatches` says in what slices of the batch it runs (None: all at once), `saved` what share of the residuals
    torch's partitioner may save; the rest is recomputed from that, convolutions included. `relayout` lays volumes out
    channels-last (passes/channels_last_3d.py), `store_gradients` gives sums of gradients memory of their own
    (passes/stored_gradients.py).
    """

    microbatches: Microbatches | None = None
    saved: float = 1.0
    relayout: bool = True
    store_gradients: bool = False


# The batch at once, nothing recomputed that PyTorch would not recompute by itself.
FULL_BATCH = Variant()


def compared_variant(variant: Variant) -> Variant:
    """The variant whose problem was built for `variant`: the same whatever number of slices is held."""
    return (
        variant
        if variant.microbatches is None
        else replace(variant, microbatches=replace(variant.microbatches, held=0))
    )


@dataclass(frozen=True)
class Candidate:
    """A variant and its predicted plan: its `noise`, that of its noisiest `layer`, and its `slowdown`, as a fraction of
    the plain step."""

    variant: Variant
    noise: float
    slowdown: float
    layer: float = 0.0

    def cost(self, prefer: str) -> tuple[float, float]:
        """Smaller is better; the second number decides among equals in the first."""
        if prefer == "exact":
            return self.noise, self.slowdown
        if prefer == "speed":
            return round(self.slowdown, 2), self.noise
        return self.slowdown + NOISE_PRICE * self.noise, self.noise

    def limited(self, name: str) -> float:
        """What the option `name`, one of `options.LIMITS`, limits."""
        return {"max_noise": self.noise, "max_layer_noise": self.layer, "max_slowdown": self.slowdown}[name]


def select(candidates: Sequence[Candidate], options: Options) -> list[Candidate]:
    """The candidates that the limits which the user gave allow, best first.

    Raises `OptionError` when there are candidates, but none within a limit.
    """
    for name, limit in options.given_limits().items():
        if not candidates:
            break
        least = min(candidate.limited(name) for candidate in candidates)
        allowed = limit * (1 + SLACK)
        if least > allowed:
            raise over(name, limit, least)
        candidates = [candidate for candidate in candidates if candidate.limited(name) <= allowed]
    return sorted(candidates, key=lambda candidate: candidate.cost(options.prefer))


def over(name: str, limit: float, least: float) -> OptionError:
    """The error for a limit that no plan within the budget keeps, the best of which reaches `least`."""
    hint = f"no plan within the budget has less than {at_least(least)}; write that, or a larger mem_budget"
    return OptionError(name, limit, hint)


def at_least(value: float) -> str:
    """A positive number in two digits, rounded up: a limit of that allows the number."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step - 1e-9) * step:.2g}"


def allowed_seconds(
    planning: PlanningProblem, whole: PlanningProblem, microbatches: Microbatches | None, limit: float | None
) -> float | None:
    """What choices for a slice may add, in seconds, for a `slowdown` within the limit; None where there is none."""
    if limit is None:
        return None
    total = (1 + limit) * sum(whole.seconds.values())
    if microbatches is None:
        return total - sum(planning.seconds.values())
    total -= (microbatches.count - microbatches.held) * planning.seconds["forward"]
    return total / microbatches.count - CALL * len(planning.phases) - sum(planning.seconds.values())


def best_candidates(
    planning: PlanningProblem, options: Options, whole: PlanningProblem, variant: Variant
) -> list[Candidate]:
    """The candidates within the budget that are worth a comparison, best first.

    `planning` is the problem of the variant, for any number of slices held; `whole` is that of `FULL_BATCH`, to whose
    time slowdowns refer.
    """
    microbatches = variant.microbatches
    if microbatches is None:
        found = _solution(planning, options, allowed_seconds(planning, whole, None, options.max_slowdown))
        if found is None:
            return []
        layer = noisiest(planning.problem, found.choice)
        return [Candidate(variant, found.noise, slowdown(planning, whole, None, found.time), layer)]
    held = _Held(planning, microbatches, options, whole)
    candidates = []
    for number in held.candidates():
        solution = held.solution(number, exact=False)
        if solution is not None:
            some = replace(microbatches, held=number)
            slower = slowdown(planning, whole, some, solution.time)
            layer = noisiest(planning.problem, solution.choice)
            candidates.append(Candidate(replace(variant, microbatches=some), solution.noise, slower, layer))
    return sorted(candidates, key=lambda candidate: candidate.cost(options.prefer))


def slowdown(
    planning: PlanningProblem, whole: PlanningProblem, microbatches: Microbatches | None, codecs: float
) -> float:
    """How much longer than the plain step of `whole` a step takes, as a fraction of that.

    `codecs` is what the choices for a slice add, in seconds.
    """
    plain = sum(whole.seconds.values())
    once = sum(planning.seconds.values()) + codecs
    if microbatches is None:
        return once / plain - 1
    again = (microbatches.count - microbatches.held) * planning.seconds["forward"]
    return (microbatches.count * (once + CALL * len(planning.phases)) + again) / plain - 1


class _Held:
    """Plans of a sliced step by the number of slices that are held, each solved for once."""

    def __init__(
        self, planning: PlanningProblem, microbatches: Microbatches, options: Options, whole: PlanningProblem
    ) -> None:
        self.planning, self.microbatches, self.options, self.whole = planning, microbatches, options, whole
        self.solved: dict[tuple[int, bool], Solution | None] = {}

    def solution(self, held: int, exact: bool) -> Solution | None:
        if (held, exact) not in self.solved:
            microbatches = replace(self.microbatches, held=held)
            options = replace(self.options, prefer="exact") if exact else self.options
            seconds = allowed_seconds(self.planning, self.whole, microbatches, options.max_slowdown)
            self.solved[held, exact] = _solution(slice_step(self.planning, microbatches), options, seconds)
        return self.solved[held, exact]

    def candidates(self) -> list[int]:
        """All slices held, as many as fit without noise, a number between the two, and none."""
        low, high = -1, self.microbatches.count
        while low < high:
            middle = (low + high + 1) // 2
            solution = self.solution(middle, exact=True)
            low, high = (middle, high) if solution is not None and solution.noise == 0 else (low, middle - 1)
        return sorted({self.microbatches.count, (self.microbatches.count + max(low, 0)) // 2, max(low, 0), 0})


def _solution(planning: PlanningProblem, options: Options, seconds: float | None) -> Solution | None:
    assert options.mem_budget is not None
    if seconds is not None and seconds < 0:
        return None
    usable = options.limit().usable
    kept = limits(options, seconds)
    try:
        return solve(planning.problem, usable, **effort(GLANCE), tradeoff=tradeoff(planning, options), limits=kept)
    except (Infeasible, OverLimits):
        return None
