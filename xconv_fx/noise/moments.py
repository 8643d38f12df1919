"""What one layer contributes to `Statistics`, from its input, its output gradient and its geometry.

The weight gradient of a convolution or linear layer is bilinear in its input x and its output gradient dy. Both maps
that are needed come from differentiating the layer's own function, so that strides, groups, dilation and transposition
are right by construction: the weight gradient itself, and D = `reach`, for every element of x the squared output
gradients that it meets (the input gradient of dy^2 under a weight of ones).

What a codec does is measured on the codec: its real codes, sums and groups, for a part of the batch. Folding needs no
draw. Elements of a sum disturb each other, and the errors of two of them are correlated, so that the variance is

    sum over sums of (sum x^2) (sum D) - sum x^2 D    +    what pairs in a sum share of the gradient's own energy

where the second part is the squared gradient of each sample beyond E, as far as pairs of elements that meet in a weight
(those of one channel) also meet in a sum. Rounding takes one draw for each width. `options/statistics.py` says what the
numbers are for.

Known gaps: dim 0 counts the samples. Folds are measured at a few numbers of terms, cut into rows as the planner does.
With fewer than some 200 sums a sample, samples share the ranges of codes, and which do depends on the number of sums:
the noise of 1-bit sums between those that were measured can then be off by two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.hooks.modules import BATCH_NORM, CONVOLUTION, INSTANCE_NORM, TRANSPOSED_CONVOLUTION, convolved
from xconv_fx.ops import SavedAs, codec_of, layout
from xconv_fx.ops.conv import left_over
from xconv_fx.ops.fold import FEWEST, fold_noise
from xconv_fx.ops.quantize import group_noise
from xconv_fx.options.codecs import BITS
from xconv_fx.options.statistics import Fold, Pairs, Spread

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
WEIGHTED = (CONVOLUTION, nn.Linear)
NORMALISATIONS = (BATCH_NORM, INSTANCE_NORM, nn.GroupNorm, nn.LayerNorm)

# Terms of a sum at which folding is measured, and widths to which sums are rounded: of wider codes little is seen.
TERMS = (2, 4, 8, 16, 32, 64, 128)
SUM_BITS = (1, 2, 4)
# Elements of the part of a batch on which codecs are run; draws of small tensors' codes and sums, and how many rounded
# values make more draws unnecessary.
PART, DRAWS, DRAWS_OF_SUMS, ENOUGH = 2**17, 16, 4, 2**14


@dataclass(frozen=True)
class Bilinear:
    """A layer without its bias: `function` of x (N, ...) and a weight of shape `weight`.

    `channel` is the dim of x along which elements never meet in a weight.
    """

    weight: tuple[int, ...]
    channel: int
    function: Callable[[Tensor, Tensor], Tensor]

    @staticmethod
    def of(module: nn.Module, x: Tensor, out: Tensor) -> Bilinear:
        """Of a module of `WEIGHTED` that was called with `x` and returned `out`."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.Linear):
            return Bilinear(tuple(weight.shape), x.dim() - 1, F.linear)
        if isinstance(module, TRANSPOSED_CONVOLUTION):
            return Bilinear(tuple(weight.shape), 1, functools.partial(_transposed, module, out.shape[2:]))
        return Bilinear(tuple(weight.shape), 1, functools.partial(convolved, module, bias=None))

    @torch.enable_grad()
    def gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The weight gradient."""
        weight = x.new_zeros(self.weight).requires_grad_()
        return torch.autograd.grad(self.function(x.detach(), weight), weight, dy)[0]

    def energies(self, x: Tensor, dy: Tensor) -> Tensor:
        """The squared norm of each sample's weight gradient, (N,)."""
        samples = zip(x.split(1), dy.split(1), strict=True)
        return torch.stack([self.gradient(*sample).square().sum() for sample in samples])

    @torch.enable_grad()
    def reach(self, x: Tensor, dy: Tensor) -> Tensor:
        """D, of the shape of x."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.function(x, x.new_ones(self.weight)), x, dy.square())[0]

    def terms(self, x: Tensor) -> Tensor:
        """In how many terms of the weight gradient each element of a sample's output gradient is."""
        return self.function(torch.ones_like(x[:1]), x.new_ones(self.weight))


def _transposed(module: Any, size: Sequence[int], x: Tensor, weight: Tensor) -> Tensor:
    """To outputs of this `size`, which the module may have been called with."""
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    extra = left_over(x.shape[2:], kernel, size, stride, padding, dilation)
    return TRANSPOSED[len(kernel)](x, weight, None, stride, padding, extra, module.groups, dilation)


def sample_noise(own: Tensor, gradient: Tensor) -> float:
    """The variance over batches of a batch's `gradient`, by the squared gradients `own` of its N > 1 samples."""
    count = len(own)
    return float(own.sum() - gradient.square().sum() / count) * count / (count - 1)


def deviation(x: Tensor) -> Tensor | None:
    """`x` without the mean over dims 2 and up; None where there are none."""
    return x - x.mean(list(range(2, x.dim())), keepdim=True) if x.dim() > 2 else None


def orders(x: Tensor) -> dict[str, tuple[int, ...]]:
    """The orders in memory in which codecs may meet the tensor, by name."""
    plain = tuple(range(x.dim()))
    return {"contiguous": plain, **({"channels_last": (0, *plain[2:], 1)} if x.dim() > 3 else {})}


def spread(layer: Bilinear, x: Tensor, dy: Tensor, own: Tensor, energy: float) -> Spread:
    """For dense projections of x. `own` are the energies of its samples' gradients; all is relative to `energy`."""
    weighted = (dy * layer.terms(x).sqrt()).flatten(1)
    rows = x.flatten(1)
    pairs = (rows @ rows.t()) * (weighted @ weighted.t())
    unit = rows.shape[1] * energy
    alone = float(pairs.diagonal().sum())
    return Spread(alone / unit, (float(pairs.sum()) - alone) / unit, float(own.sum()) / unit)


def codes(x: Tensor, reach: Tensor, order: Sequence[int]) -> Pairs:
    """(bits, v): the noise of rounding x (N, ...) to codes, whose elements have the weights D, relative to E."""
    energy = float((x.square() * reach).sum())
    seeds = _seeds(x, DRAWS)
    return tuple((bits, _rounding(x, reach, _codes(x, bits, order), seeds) / energy) for bits in BITS)


def rounding_errors(x: Tensor, bits: int, draws: int) -> Iterator[Tensor]:
    """Errors of x (N, ...) in codes of so many bits, in the compiler's usual layout."""
    held = _codes(x, bits, [*orders(x).values()][-1])
    for _ in range(draws):
        yield _error(x, held, _seed(x))


def folds(x: Tensor, reach: Tensor, order: Sequence[int], shared: float, channel: int, energy: float) -> Iterator[Fold]:
    """How folding x (N, ...) compares with its closed form, for each number of terms.

    `shared` is by how much the squared gradients of the samples exceed their E. Noise is relative to `energy`: that of
    the tensor itself where x are its deviations.
    """
    length = math.prod(x.shape[1:])
    for terms in TERMS:
        if length // terms < FEWEST:
            return
        plan = layout.folding(x.shape, order, layout.fitting_probes(x.shape, order, length // terms))
        weights = _summed(reach, order, plan)
        disturbed = float((_summed(x.square(), order, plan) * weights).sum() - (x.square() * reach).sum())
        pairs = _pairs_in_sums(x.shape, order, plan, channel)
        held = _held(CodecSpec("probe", probes=plan.probes, kind="fold"), x, order)
        rounding = _rounding_of_sums(x, weights, held)
        closed = {bits: length / plan.probes * group_noise((len(x), plan.probes), (0, 1), bits) for bits in SUM_BITS}
        yield Fold(
            length / plan.probes,
            (disturbed + pairs * shared) / energy / fold_noise(plan),
            tuple((bits, rounding[bits] / energy / closed[bits]) for bits in SUM_BITS),
        )


def _held(spec: CodecSpec, x: Tensor, order: Sequence[int]) -> SavedAs:
    return SavedAs(spec, tuple(x.shape), x.dtype, tuple(order))


def _codes(x: Tensor, bits: int, order: Sequence[int]) -> SavedAs:
    return _held(CodecSpec("quantize", bits=bits), x, order)


def _seed(x: Tensor) -> Tensor:
    """A seed for what is drawn for x, on its device."""
    return torch.randint(2**62, (1,), device=x.device)


def _seeds(x: Tensor, most: int) -> list[Tensor]:
    """Seeds to average the errors of rounded values x over."""
    return [_seed(x) for _ in range(min(most, -(-ENOUGH // x.numel())))]


def _rounding(x: Tensor, weights: Tensor, held: SavedAs, seeds: Sequence[Tensor]) -> float:
    """Mean over draws of the weighted squared error of codes."""
    return sum(float((_error(x, held, seed).square() * weights).sum()) for seed in seeds) / len(seeds)


def _error(x: Tensor, held: SavedAs, seed: Tensor) -> Tensor:
    """What is off in x after a round trip through its codec."""
    row = codec_of(held.spec.codec)
    return row.decode(row.encode(x, seed, held), seed, held) - x


def _rounding_of_sums(x: Tensor, weights: Tensor, held: SavedAs) -> dict[int, float]:
    """What rounding sums adds, by bits; `weights` are the D of each sum's terms, added up."""
    seeds = _seeds(weights, DRAWS_OF_SUMS)
    noise = dict.fromkeys(SUM_BITS, 0.0)
    for seed in seeds:
        (sums,) = codec_of("probe").encode(x, seed, held)
        for bits in SUM_BITS:
            noise[bits] += _rounding(sums, weights, _codes(sums, bits, (0, 1)), [seed]) / len(seeds)
    return noise


def _summed(values: Tensor, order: Sequence[int], plan: layout.Folding) -> Tensor:
    """Sums over the elements of each sum, without signs: (N, probes)."""
    flat = layout.to_physical(values, order).reshape(plan.samples, plan.length)
    return F.pad(flat, (0, plan.terms * plan.probes - plan.length)).view(plan.samples, plan.terms, plan.probes).sum(1)


@functools.lru_cache(maxsize=256)
def _pairs_in_sums(size: Sequence[int], order: Sequence[int], plan: layout.Folding, channel: int) -> float:
    """Of the pairs of elements of one channel in a sample, the share that is in one sum."""
    channels, pixels = size[channel], plan.length // size[channel]
    if pixels == 1:
        return 0.0
    names = torch.arange(channels).view([-1 if dim == channel else 1 for dim in range(len(size))]).expand(1, *size[1:])
    places = layout.to_physical(names, order).reshape(-1) * plan.probes + torch.arange(plan.length) % plan.probes
    together = torch.unique(places, return_counts=True)[1]
    return float((together * (together - 1)).sum()) / (channels * pixels * (pixels - 1))
