"""The ways of running a step that are compared: what each costs in noise and in time, and which is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cost_model.solver import Infeasible, Solution, solve
from .errors import OptionError
from .options import Options
from .passes.planning import NOISE_PRICE, tradeoff
from .passes.problem import Posed
from .passes.sliced import slice_step
from .portable import effort
from .slices import Slicing

# A plan that is exact and no slower than this is not compared with others.
NEGLIGIBLE = 0.05
# Seconds for one solution of the planning problem while ways are compared.
GLANCE = 0.5
# What a call of a kernel from Python takes besides the kernel: it counts once more for every slice.
CALL = 1e-5


@dataclass(frozen=True)
class Route:
    """What a graph is compiled as, before it is planned.

    `slicing` says in what slices of the batch it runs (None: all at once), `saved` what share of the residuals torch's
    partitioner may save; the rest is recomputed from that, convolutions included. `relayout` lays volumes out
    channels-last (passes/volumes.py).
    """

    slicing: Slicing | None = None
    saved: float = 1.0
    relayout: bool = True


# The batch at once, nothing recomputed that PyTorch would not recompute by itself.
AT_ONCE = Route()


@dataclass(frozen=True)
class Way:
    """A route and its predicted plan: `noise`, and `slowdown` as a fraction of the plain step."""

    route: Route
    noise: float
    slowdown: float

    def cost(self, prefer: str) -> tuple[float, float]:
        """Smaller is better; the second number decides among equals in the first."""
        if prefer == "exact":
            return self.noise, self.slowdown
        if prefer == "speed":
            return round(self.slowdown, 2), self.noise
        return self.slowdown + NOISE_PRICE * self.noise, self.noise


def select(ways: Sequence[Way], options: Options) -> list[Way]:
    """The ways that the options' limits allow, best first.

    Raises `OptionError` when there are ways, but none within a limit.
    """
    for name, limit in (("max_noise", options.max_noise), ("max_slowdown", options.max_slowdown)):
        if limit is None or not ways:
            continue
        values = [way.noise if name == "max_noise" else way.slowdown for way in ways]
        if min(values) > limit:
            hint = f"no plan within the budget has less than {min(values):.2g}; write that, or a larger mem_budget"
            raise OptionError(name, limit, hint)
        ways = [way for way, value in zip(ways, values, strict=True) if value <= limit]
    return sorted(ways, key=lambda way: way.cost(options.prefer))


def best_ways(posed: Posed, options: Options, whole: Posed, route: Route) -> list[Way]:
    """The ways to run the problem within the budget that are worth a comparison, best first.

    `posed` is the problem of the route, for any number of slices held; `whole` is that of `AT_ONCE`, to whose time
    slowdowns refer.
    """
    slicing = route.slicing
    if slicing is None:
        solution = _solution(posed, options)
        return [] if solution is None else [Way(route, solution.noise, slowdown(posed, whole, None, solution.time))]
    held = _Held(posed, slicing, options)
    found = []
    for number in held.candidates():
        solution = held.solution(number, exact=False)
        if solution is not None:
            some = replace(slicing, held=number)
            slower = slowdown(posed, whole, some, solution.time)
            found.append(Way(replace(route, slicing=some), solution.noise, slower))
    return sorted(found, key=lambda way: way.cost(options.prefer))


def slowdown(posed: Posed, whole: Posed, slicing: Slicing | None, codecs: float) -> float:
    """How much longer than the plain step of `whole` a step takes, as a fraction of that.

    `codecs` is what the choices for a slice add, in seconds.
    """
    plain = sum(whole.seconds.values())
    once = sum(posed.seconds.values()) + codecs
    if slicing is None:
        return once / plain - 1
    again = (slicing.count - slicing.held) * posed.seconds["forward"]
    return (slicing.count * (once + CALL * len(posed.phases)) + again) / plain - 1


class _Held:
    """Plans of a sliced step by the number of slices that are held, each solved for once."""

    def __init__(self, posed: Posed, slicing: Slicing, options: Options) -> None:
        self.posed, self.slicing, self.options = posed, slicing, options
        self.solved: dict[tuple[int, bool], Solution | None] = {}

    def solution(self, held: int, exact: bool) -> Solution | None:
        if (held, exact) not in self.solved:
            posed = slice_step(self.posed, replace(self.slicing, held=held))
            options = replace(self.options, prefer="exact") if exact else self.options
            self.solved[held, exact] = _solution(posed, options)
        return self.solved[held, exact]

    def candidates(self) -> list[int]:
        """All slices held, as many as fit without noise, a number between the two, and none."""
        low, high = -1, self.slicing.count
        while low < high:
            middle = (low + high + 1) // 2
            solution = self.solution(middle, exact=True)
            low, high = (middle, high) if solution is not None and solution.noise == 0 else (low, middle - 1)
        return sorted({self.slicing.count, (self.slicing.count + max(low, 0)) // 2, max(low, 0), 0})


def _solution(posed: Posed, options: Options) -> Solution | None:
    assert options.mem_budget is not None
    usable = options.usable(options.mem_budget.resolve(0))
    try:
        return solve(posed.problem, usable, **effort(GLANCE), tradeoff=tradeoff(posed, options))
    except Infeasible:
        return None
