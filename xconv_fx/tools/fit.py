"""`fit`: the largest batch, or spatial size, that trains within a budget, by plain Inductor and by xconv.

Memory grows with the size, nearly in proportion. So a size that does not fit says where to look next, by what it would
have needed; from a size that fits the search goes on in growing strides, and ends at neighbours of which the smaller
fits and the larger does not. That takes a handful of plans, which are traced without memory.

Known gap: a size that can be cut into slices may fit where a smaller one that cannot, a prime number of samples, say,
does not; the search takes the order for granted and names one such pair of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xconv_fx.errors import BudgetInfeasibleError, OptionError, UsageError
from xconv_fx.options import LIMITS, Options
from xconv_fx.plan import Totals
from xconv_fx.progress import doing

from .workload import InputSpec, Workload, names_callable

ALONG = ("batch", "spatial")
# Sizes beyond this are not looked at.
LIMIT = 1 << 20
# The options of `explain` that make a plan for something else, not a plan of another kind.
SCENARIO = ("loss", "targets", "device", "gpu", "amp", "channels_last", "optimizer", "reserve")


@dataclass(frozen=True)
class Trial:
    """What planning for one `size` came to.

    `needs` is the budget in bytes that the plan needs, or the lowest one of the size when none fits (None: plans fit,
    but none within the limits of noise and time). `share` is the budget that was given as a fraction of that, more or
    less. `time` is in extra seconds a step, `noise` the added variance.
    """

    size: int
    fits: bool
    needs: int | None
    share: float
    time: float = 0.0
    noise: float = 0.0
    slices: int = 1


@dataclass(frozen=True)
class Fit:
    """By one `method`: the largest size that fits (None: none does), the next one, which does not (None: not looked
    for, beyond `LIMIT`), and the number of plans made."""

    method: str
    largest: Trial | None
    beyond: Trial | None
    plans: int


def fit(workload: Workload, budget: int, along: str = "batch", multiple: int = 1, **options: Any) -> list[Fit]:
    """The largest sizes within `budget` bytes: by plain Inductor, by exact codecs and by all, or by the `codecs` given.

    `along` "batch" varies dimension 0 of every input and label; "spatial" gives all dimensions behind the channels the
    same size. Sizes are multiples of `multiple`. `options` are those of `explain`. Raises `UsageError` for inputs that
    are not given as shapes, and for what goes wrong in the model.
    """
    size = _first_size(workload, along, multiple)
    codecs = options.pop("codecs", None)
    plain = {name: value for name, value in options.items() if name in SCENARIO}
    methods: dict[str, dict[str, Any]] = {"inductor": plain}
    for name in ("exact", "all") if codecs is None else (codecs,):
        methods[f"xconv, {name}"] = {**options, "codecs": name, "mem_budget": budget}
    found: list[Fit] = []
    for method, chosen in methods.items():

        def trial(size: int, method: str = method, chosen: dict[str, Any] = chosen) -> Trial:
            with doing(f"{method}, {along} {size}"):
                return _trial(resized(workload, along, size), size, budget, chosen)

        found.append(search(trial, method, size, multiple))
        # What one method trains, the next one does as well: it starts from there.
        size = max(size, found[-1].largest.size) if found[-1].largest else size
    return found


def search(trial: Callable[[int], Trial], method: str, start: int, step: int) -> Fit:
    """The largest multiple of `step` that fits, looked for from `start` on; `trial` says whether a size does."""
    largest: Trial | None = None
    beyond: Trial | None = None
    size, stride, plans, proportional = start, step, 0, True
    while size <= LIMIT:
        found = trial(size)
        plans += 1
        if found.fits:
            largest = found
        else:
            # What the first one needs says where to look; when that is wrong, halving what is left is safe.
            proportional, beyond = beyond is None, found
        low = largest.size if largest else 0
        if beyond is None:
            size *= 2
        elif beyond.size - low <= step:
            break
        elif not proportional:
            size = (low + beyond.size) // 2 // step * step
        elif found.fits:
            size, stride = size + stride, 2 * stride
        else:
            size = int(size * found.share) // step * step
        if beyond is not None:
            size = min(max(size, low + step), beyond.size - step)
    return Fit(method, largest, beyond, plans)


def _trial(workload: Workload, size: int, budget: int, options: dict[str, Any]) -> Trial:
    """Plan for one size; options without a budget are those of plain Inductor."""
    try:
        plans = workload.plans(**options)
    except BudgetInfeasibleError as error:
        return Trial(size, False, error.smallest, budget / error.smallest)
    except OptionError as error:
        if error.option not in LIMITS:
            raise
        return Trial(size, False, None, 0.9)
    totals = Totals.of(plans)
    needs = Options.parse({"reserve": options.get("reserve", 0)}).smallest_for(totals.peak)
    return Trial(
        size,
        fits=needs <= budget,
        needs=needs,
        share=budget / needs,
        time=totals.time,
        noise=totals.noise,
        slices=totals.slices,
    )


def resized(workload: Workload, along: str, size: int) -> Workload:
    """The workload with inputs and labels of another size."""
    inputs = tuple(str(_resize(InputSpec.parse(text), along, size, channels=True)) for text in workload.inputs)
    labels = tuple(str(_resize(InputSpec.parse(text), along, size, channels=False)) for text in workload.labels)
    return replace(workload, inputs=inputs, labels=labels)


def _resize(spec: InputSpec, along: str, size: int, channels: bool) -> InputSpec:
    """Labels of every pixel have no dimension of channels."""
    fixed = 2 if channels else 1
    if along == "batch":
        return replace(spec, shape=(size, *spec.shape[1:]))
    return replace(spec, shape=(*spec.shape[:fixed], *(size for _ in spec.shape[fixed:])))


def _first_size(workload: Workload, along: str, multiple: int) -> int:
    """Where the search begins: at the size that is given, rounded to the multiple. Raises `UsageError`."""
    for option, texts in zip(workload.spelling, (workload.inputs, workload.labels), strict=True):
        for text in texts:
            if names_callable(text):
                hint = f"{option} with a shape such as 4x3x64x64, of which fit varies the sizes"
                raise UsageError(f"{option} {text} names a callable, whose sizes are its own", hint)
    shapes = [InputSpec.parse(text).shape for text in workload.inputs]
    sizes = {shape[0] for shape in shapes} if along == "batch" else {n for shape in shapes for n in shape[2:]}
    if not sizes:
        raise UsageError(f"--along {along}: no input has spatial dimensions", "--along batch")
    return max(multiple, min(sizes) // multiple * multiple)
