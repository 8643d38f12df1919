"""Convolution and linear layers that hold a sketch of their input, as dispatcher ops with registered autograd.

`torch.ops.xconv.convolution` and `torch.ops.xconv.linear` compute what `aten.convolution` and `aten.linear` compute.
Between forward and backward they hold, in place of the input, a few random sums of it (XConv, arXiv 2106.06998; the
"probe" codec), and estimate the weight gradient from those. The estimate is unbiased; input and bias gradients are
exact. This is the estimator without the compiler: in eager code, in a `torch.fx` graph that is never compiled, under
autocast, under `torch.utils.checkpoint`.

Each layer is two ops. The public one is a composite: it draws the seed, encodes the detached input, and calls
`xconv::sketched_convolution` or `xconv::sketched_linear`. That inner op takes the payload as an input and owns the
autograd formula, which saves payload, seed and weight and never the input. A tracer that looks through composites
(AOTAutograd) sees the codec ops; one that does not (`torch.fx.symbolic_trace`) sees one node a layer. For a frozen
weight no payload is held, for a frozen input no weight. Layers that read one tensor hold one sketch
(`sketch_sharing.py`).

The four arguments that say what is held:

* `probes`: sums held per sample, dim 0 of the input counting the samples; at most one a value, which makes the gradient
  of kind "fold" or "orthogonal" exact. With 0 the values themselves are held in `bits` bits, below 32 (the "quantize"
  codec).
* `kind`: "fold" (signed sums of disjoint parts of a sample), "gaussian", "rademacher", "orthogonal" or "independent"
  (`probes` sums for every channel).
* `bits`: 32 holds the sums as they are, 16, 8, 4, 2 or 1 quantises them with stochastic rounding.
* `means`: hold the mean over dims 2 and up, if there are any, exactly and sketch only the deviation from it. None: as
  the compiler does, beside folds of fewer sums than values.

A seed is drawn in every forward of a trainable weight, also without gradients, and for a layer that takes the sketch
of another: the first run of a checkpointed segment has no gradients, and what else is random in the segment must not
notice the difference. The inner op gets what was `drawn`, so that no compiler drops a draw.

Known gaps: not twice differentiable (the second backward raises), no `vmap` rule. Subtracting means costs a transient
copy of the input in the forward, decoding one in the backward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xconv_fx.codec_spec import CodecSpec

from .codec import SavedAs, codec_of
from .conv import input_gradient, weight_gradient
from .dense import KINDS as DENSE_KINDS
from .fold import PLAIN_BITS, fitted
from .layout import order_of
from .seed import draw_seed
from .sketch_sharing import begin_backward, shared

aten = torch.ops.aten
ops = torch.ops.xconv

Recipe = tuple[int, str, int, bool]


def sample_order(x: Tensor) -> tuple[int, ...]:
    """The dims of `x` as they lie in memory, outermost first, but the samples (dim 0) before all others."""
    return (0, *(dim + 1 for dim in order_of(x.shape[1:], x.stride()[1:])))


def _recipe(x: Tensor, probes: int, kind: str, bits: int, means: bool | None) -> Recipe:
    """The four arguments as they apply to an input of the size of `x`."""
    probes, means = fitted(x.shape, probes, kind, means)
    return probes, kind, bits, means


def _held(x: Tensor, probes: int, kind: str, bits: int, means: bool) -> SavedAs:
    probe = CodecSpec("probe", bits=bits, probes=probes, kind=kind, means=means)
    spec = probe if probes else CodecSpec("quantize", bits=bits)
    return SavedAs(spec, tuple(x.shape), x.dtype, sample_order(x))


def _encode(
    x: Tensor, source: Tensor, weight: Tensor, seed: Tensor | None, recipe: Recipe
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Payload and seed to hold for the backward of a layer, and the seed that was drawn for it, if any.

    `source` and `weight` are what the layer was called with, `x` what it computes with. Nothing is held where no weight
    gradient will be asked for.
    """
    if not weight.requires_grad or x.numel() == 0:
        return [], None, None
    x = x.detach()
    drawn = draw_seed(x, weight.detach()) if seed is None else None
    if not torch.is_grad_enabled():
        return [], None, drawn
    held = _held(x, *recipe)

    def encode(seed: Tensor) -> Sequence[Tensor]:
        return codec_of(held.spec.codec).encode(x, seed, held)

    if drawn is not None:
        return *shared(source, weight, drawn, held, encode), drawn
    assert seed is not None
    return list(encode(seed)), seed, None


def _decode(payload: Sequence[Tensor], seed: Tensor, held: SavedAs, like: Tensor) -> Tensor:
    """The estimate of a layer's input. Raises `RuntimeError` when an inner op was called without a payload."""
    if math.prod(held.size) == 0:
        return like.new_zeros(held.size)
    if not payload:
        raise RuntimeError("xconv: a weight gradient was asked for, but the forward held no sketch of the input")
    return codec_of(held.spec.codec).decode(tuple(payload), seed, held)


def _hold(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the payload, the seed and, for the input gradient, the weight: all that the backward of a layer reads."""
    x, weight, _, payload, seed, *settings, _ = inputs
    ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, seed, *payload)
    ctx.held, ctx.weight_size, ctx.geometry = _held(x, *settings[-4:]), weight.shape, settings[:-4]


def _cast(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the arguments of a layer: all but doubles go to the dtype of the region."""
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _layer(
    inner: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dims: int,
    geometry: Sequence[Any],
    asked: Any,
    seed: Any,
) -> Tensor:
    """What a public op returns: by its `inner` op, for an `x` that without samples has so many `dims`."""
    source, parameter, device = x, weight, x.device.type
    off: Any = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):
        x, weight, bias = _cast(device, x, weight, bias)  # type: ignore[assignment]
        off = torch.autocast(device, enabled=False)
    with off:
        alone = x.dim() == dims
        if alone:
            x = x.unsqueeze(0)
        recipe = _recipe(x, *asked)
        payload, seed, drawn = _encode(x, source, parameter, seed, recipe)
        out = inner(x, weight, bias, payload, seed, *geometry, *recipe, drawn)
        return out.squeeze(0) if alone else out


class _Once(torch.autograd.Function):
    """Identity on gradients that refuses to be differentiated; `sources` are what they depend on."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "xconv: a layer that holds a sketch of its input cannot be differentiated twice; use aten.convolution or "
            "aten.linear for layers that take part in a gradient penalty or a Hessian"
        )


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Any, ...]:
    """Gradients of all inputs of an inner op from those of input, weight and bias.

    They raise when differentiated, if a graph of the backward is being recorded.
    """
    if torch.is_grad_enabled():
        grads = _Once.apply(len(grads), *grads, *sources)
    needs = ctx.needs_input_grad
    return (*grads, [None] * len(needs[3]), *(None for _ in needs[4:]))


# Convolution


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    probes: int,
    kind: str = "fold",
    bits: int = PLAIN_BITS,
    means: bool | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """`aten.convolution` that holds a sketch of `x` (N, C, ...), or (C, ...), in place of `x` for its backward.

    `seed` is an int64 tensor with one element on the device of `x`; without it one is drawn from the default
    generator of that device, and `torch.manual_seed` makes the gradients reproducible.
    """
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    asked = (probes, kind, bits, means)
    return _layer(ops.sketched_convolution, x, weight, bias, weight.dim() - 1, geometry, asked, seed)


@torch.library.custom_op("xconv::sketched_convolution", mutates_args=())
def _sketched_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    payload: Sequence[Tensor],
    seed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    probes: int,
    kind: str,
    bits: int,
    means: bool,
    drawn: Tensor | None = None,
) -> Tensor:
    return aten.convolution.default(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@_sketched_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, payload: Any, seed: Any, *rest: Any) -> Tensor:
    return aten.convolution.default(x, weight, bias, *rest[:6])


def _convolution_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    begin_backward()
    weight, seed, *payload = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    with torch.no_grad():
        if ctx.needs_input_grad[1]:
            grad_weight = _convolution_estimate(grad_out, payload, seed, weight, ctx)
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad_out, weight, ctx.held.size, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_out.sum([0, *range(2, grad_out.dim())])
    return _gradients(ctx, (grad_x, grad_weight, grad_bias), grad_out, weight)


def _convolution_estimate(
    grad_out: Tensor, payload: Sequence[Tensor], seed: Tensor, weight: Tensor | None, ctx: Any
) -> Tensor:
    held: SavedAs = ctx.held
    if held.spec.kind in DENSE_KINDS and len(payload) == 1:
        # Plain sums of dense probes: with fewer probes than samples there is a form that decodes nothing.
        sketch = (payload[0], seed, held.spec.kind, held.size)
        return ops.dense_weight_gradient(grad_out, *sketch, ctx.weight_size, *ctx.geometry)
    x = _decode(payload, seed, held, grad_out)
    return weight_gradient(grad_out, x, ctx.weight_size, *ctx.geometry, like=weight)


_sketched_convolution.register_autograd(_convolution_backward, setup_context=_hold)


# Linear


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probes: int,
    kind: str = "fold",
    bits: int = PLAIN_BITS,
    means: bool | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """`aten.linear` that holds a sketch of `x` (*, F) in place of `x` for its backward.

    Dim 0 of `x` counts the samples: a sample of (B, T, F) has T F values, and its `means` are one a token. `seed` as
    in `convolution`.
    """
    return _layer(ops.sketched_linear, x, weight, bias, 1, (), (probes, kind, bits, means), seed)


@torch.library.custom_op("xconv::sketched_linear", mutates_args=())
def _sketched_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    payload: Sequence[Tensor],
    seed: Tensor | None,
    probes: int,
    kind: str,
    bits: int,
    means: bool,
    drawn: Tensor | None = None,
) -> Tensor:
    return aten.linear.default(x, weight, bias)


@_sketched_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return aten.linear.default(x, weight, bias)


def _linear_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    begin_backward()
    weight, seed, *payload = ctx.saved_tensors
    count, features = math.prod(ctx.held.size[:-1]), ctx.held.size[-1]
    grad_x = grad_weight = grad_bias = None
    with torch.no_grad():
        rows = grad_out.reshape(count, ctx.weight_size[0])
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ _decode(payload, seed, ctx.held, rows).reshape(count, features)
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight).view(ctx.held.size)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
    return _gradients(ctx, (grad_x, grad_weight, grad_bias), grad_out, weight)


_sketched_linear.register_autograd(_linear_backward, setup_context=_hold)


# The public ops are composites: whatever traces or differentiates looks through them.

_RECIPE = f'int probes, str kind="fold", int bits={PLAIN_BITS}, bool? means=None, Tensor? seed=None) -> Tensor'
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"

for _name, _arguments, _implementation in (
    ("convolution", f"Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, ", _convolution),
    ("linear", "Tensor x, Tensor weight, Tensor? bias, ", _linear),
):
    torch.library.define(f"xconv::{_name}", f"({_arguments}{_RECIPE}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"xconv::{_name}", "CompositeImplicitAutograd", _implementation)
