"""Let interpolation have a gather as its backward (`ops/interpolate.py`), instead of many scatters.

Works on the graph that Dynamo traced, before autograd sees it: forward operations stay torch's own, and what autograd
would make of them is one operator. Whatever the operator does not do stays as it is: `area` and antialiasing, symbolic
sizes, whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from xconv_fx.ops.interpolate import axes, gathers

_MODES = {
    "nearest": "nearest",
    "nearest-exact": "nearest-exact",
    "linear": "linear",
    "bilinear": "linear",
    "trilinear": "linear",
    "bicubic": "cubic",
}
_NAMES = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


@dataclass(frozen=True)
class _Call:
    """The arguments of `torch.nn.functional.interpolate` besides its input, in their order."""

    size: int | Sequence[int] | None = None
    scale_factor: float | Sequence[float] | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    recompute_scale_factor: bool | None = None
    antialias: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, C, *in) to (N, C, *out)."""
        return F.interpolate(x, **vars(self))

    def scales(self, dims: int) -> list[float]:
        """The factors that torch reckons with in each dim, 0.0 where it goes by sizes."""
        given = None if self.recompute_scale_factor else self.scale_factor
        if given is None:
            return [0.0] * dims
        return [float(one) for one in (given if isinstance(given, Sequence) else [given] * dims)]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        ctx.call, ctx.size, ctx.dtype = call, [int(size) for size in x.shape[2:]], x.dtype
        return call(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mode, align_corners = _MODES[ctx.call.mode], bool(ctx.call.align_corners)
        scales = ctx.call.scales(len(ctx.size))
        found = torch.ops.xconv.interpolate_backward(grad, ctx.size, mode, align_corners, scales)
        return found.to(ctx.dtype), None


def interpolate(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.interpolate`, whose gradient is gathered: for what `_gathers` says."""
    call = _Call(*args, **kwargs)
    return _Gathered.apply(input, call) if input.requires_grad else call(input)


def _gathers(node: fx.Node) -> bool:
    """Whether the operator computes the gradient of a call."""
    given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    x, found = given.pop("input").meta.get("example_value"), node.meta.get("example_value")
    call = _Call(**given)
    if call.mode not in _MODES or call.antialias or x is None or found is None or not x.dtype.is_floating_point:
        return False
    inputs, outputs = ([_fixed(size) for size in value.shape[2:]] for value in (x, found))
    if min(*inputs, *outputs) <= 0:
        return False
    scales = call.scales(len(inputs))
    return gathers(axes(outputs, inputs, _MODES[call.mode], bool(call.align_corners), scales, x.dtype))


def _fixed(size: int | torch.SymInt) -> int:
    """A size; 0 where it is not one number."""
    return size if isinstance(size, int) else size.node.maybe_as_int() or 0


def gather_interpolation(gm: fx.GraphModule) -> None:
    """Rewrite a Dynamo graph in place; not one in which torch.func transforms anything."""
    if any("functorch" in str(getattr(node.target, "__module__", "")) for node in gm.graph.nodes):
        return
    for node in gm.graph.find_nodes(op="call_function", target=F.interpolate):
        if _gathers(node):
            node.target = interpolate
    gm.recompile()
