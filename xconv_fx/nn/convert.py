"""Models for training in little memory without compiling: `convert`, by names, and `plan_and_convert`, by a plan.

A layer is converted by giving it another class, that of `xconv_fx.nn` which extends its own. It stays the same object
with the same parameters, hooks, flags, dtype and device, in whatever places of the model it is.

Known gaps: functions that a model calls in its `forward` (`F.conv2d`, `F.relu`) are no layers; `nn/substitute.py`
replaces those of a `torch.fx` graph. Layers of a class of their own, derived from torch's, may compute anything and are
left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from xconv_fx import nn as xnn
from xconv_fx.errors import OptionError, UnsupportedModelError
from xconv_fx.hooks.modules import values_of
from xconv_fx.options import PROBES_HINT, Probes

from .assignment import EAGER_CODECS, Assignment, ByPattern, ByPlan
from .report import Conversion, Row
from .sketch import PLAIN_BITS, Sketch

SKETCHING: dict[type, type[xnn.Sketching]] = {
    nn.Conv1d: xnn.XConv1d,
    nn.Conv2d: xnn.XConv2d,
    nn.Conv3d: xnn.XConv3d,
    nn.ConvTranspose1d: xnn.XConvTranspose1d,
    nn.ConvTranspose2d: xnn.XConvTranspose2d,
    nn.ConvTranspose3d: xnn.XConvTranspose3d,
    nn.Linear: xnn.XLinear,
}


def convert(
    model: nn.Module,
    *,
    probes: int | Mapping[str, int] | None = None,
    bits: int = PLAIN_BITS,
    kind: str = "fold",
    means: bool | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Conversion]:
    """The model with convolution, linear and ReLU layers that hold less between forward and backward, and a report.

    `probes` is a number of random sums a sample for every layer, or a mapping of layer names or patterns to numbers,
    which leaves the others alone; None holds the values themselves, in `bits` bits. For `kind`, `bits` and `means` see
    `xconv_fx.nn`. Layers that are converted already get the new settings. Every ReLU holds bits, which is exact.

    The result is a copy that shares parameters and buffers with `model`, so that an optimiser made before goes on
    working; or with `inplace` the model itself. The report lists what was converted and what was not, and why.

    Raises `OptionError` for settings that make no sense or patterns that match no layer, and `UnsupportedModelError`
    for a model that cannot be copied.
    """
    base = Sketch.parse(None, kind, bits, means)
    counts = Probes.parse(probes)
    if counts == Probes() and base.plain:
        raise OptionError("probes", probes, f"nothing would be saved; {PROBES_HINT}, or write bits=8 or less")
    return _convert(model, ByPattern(counts, base), inplace)


def plan_and_convert(
    model: nn.Module,
    inputs: Any,
    *,
    mem_budget: str | int | None = None,
    inplace: bool = False,
    **options: Any,
) -> tuple[nn.Module, Conversion]:
    """The model with layers that hold what a plan for `mem_budget` chose, and a report with the plan.

    `inputs` is a tensor or a tuple of all inputs; `options` are those of `xconv_fx.step.explain.explain`, and so are
    the errors. Nothing is allocated for planning. A layer whose input the plan holds as probes or codes gets the same
    settings; one whose input it keeps stays as it is.

    **Eager code cannot honour all of a plan, and does not keep to the budget.** The plan is one of compiled code, which
    fuses operations and recomputes cheap ones. Eager code recomputes nothing, runs the whole batch at once instead of
    slices, and holds inputs of normalisation layers, and results of pooling, dropout and functions, as they are. So by
    default the plan uses what layers can hold, neither recomputation nor slices (`codecs` and `slices` overrule this),
    and the report's notes name what is still not honoured. Measure the peak with `xconv_fx.measure.training_peak`; for
    a budget that is kept, compile with `backend="xconv"`.
    """
    from xconv_fx.step.explain import explain

    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if mem_budget is not None:
        options = {"codecs": EAGER_CODECS, "slices": 1, **options}
    return _convert(model, ByPlan(explain(model, *arguments, mem_budget=mem_budget, **options).plans), inplace)


def _convert(model: nn.Module, assignment: Assignment, inplace: bool) -> tuple[nn.Module, Conversion]:
    layers = _layers(model)
    assignment.check({name for layer, names in layers.items() if _sketching(layer) for name in names})
    if not inplace:
        model = _sharing_copy(model)
        layers = _layers(model)
    rows = tuple(row for layer, names in layers.items() for row in _convert_layer(layer, names, assignment))
    return model, Conversion(rows, assignment.notes, assignment.plans)


def _layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All modules, each with all of its names."""
    layers: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        layers.setdefault(layer, []).append(name)
    return layers


def _sketching(layer: nn.Module) -> type[xnn.Sketching] | None:
    """The class that the layer is to have, or has, if it can hold a sketch."""
    return {**SKETCHING, **{kind: kind for kind in SKETCHING.values()}}.get(type(layer))


def _convert_layer(layer: nn.Module, names: list[str], assignment: Assignment) -> Iterator[Row]:
    """Convert one layer, if it is of a kind that can hold less: its row of the report."""
    kind, target = type(layer).__name__, _sketching(layer)
    if target is not None:
        sketch = assignment.sketch(names)
        if isinstance(sketch, Sketch):
            _become(layer, target, sketch)
            yield Row(names[0], kind, str(sketch))
        else:
            yield Row(names[0], kind, reason=sketch)
    elif type(layer) in (nn.ReLU, xnn.BitReLU):
        reason = assignment.why_whole(names)
        if not reason:
            layer.__class__ = xnn.BitReLU
        yield Row(names[0], kind, "" if reason else str(xnn.RELU_HOLDS), reason)
    elif isinstance(layer, (*SKETCHING, nn.ReLU)):
        yield Row(names[0], kind, reason=_why_left(layer))


def _become(layer: Any, target: type[xnn.Sketching], sketch: Sketch) -> None:
    layer.__class__, layer.sketch = target, sketch


def _why_left(layer: nn.Module) -> str:
    if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
        return "its sizes are not known yet: call the model once before"
    base = next(base for base in (*SKETCHING, nn.ReLU) if isinstance(layer, base))
    return f"a class of its own, derived from {base.__name__}"


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules that has the same parameters, buffers and other tensors."""
    memo: dict[int, Any] = {}
    for layer in model.modules():
        for value in values_of(layer):
            if isinstance(value, Tensor):
                memo[id(value)] = value
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        reason = f"it cannot be copied ({type(error).__name__}: {error})"
        raise UnsupportedModelError(type(model).__name__, reason, "convert it with inplace=True") from error
