"""Probes: a tensor held as few random projections of every sample, for gradients that are linear in it.

XConv (arXiv 2106.06998) holds S = X Z instead of X, with E[Z Z^T] / r = I, and reads X^ = S Z^T / r in its place: the
weight gradient of a convolution or a linear layer stays unbiased. Folding is the sparse limit of the paper's
orthogonal probes: the r columns of Z have disjoint supports and random signs,

    S[n, j] = sum over g of sign(n, g, j) x[n, g r + j],        x^[n, g r + j] = sign(n, g, j) S[n, j],

with elements counted in physical order within sample n. It costs one pass over x instead of r, its noise is that of
orthogonal probes (D / r - 1, relative to the energy of x, for D elements a sample), and r = D gives x exactly.

Sums may be stored in 16, 8, 4, 2 or 1 bits through `quantize`; at equal bytes many coarse sums have far less variance
than few precise ones. With `means` the mean of every channel of every sample is held exactly and only the deviation
is folded. The paper's dense projections (`kind` gaussian, rademacher, orthogonal, independent) are in `dense`.

Known gap: folding does not see that neighbouring elements are alike; a smooth field is folded as if it were noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import dense, layout
from .codec import Codec, SavedAs, register
from .counter_rng import check_countable, random_bits, random_signs
from .quantize import bits_of, code_bytes, draws, group_noise

STREAM = 2
KINDS = ("fold", *dense.KINDS)
PLAIN_BITS = 32
# Fewer sums a sample are not worth a codec.
FEWEST = 8


@torch.library.custom_op(
    "xconv::fold",
    mutates_args=(),
    schema="(Tensor x, Tensor seed, int probes, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def fold(x: Tensor, seed: Tensor, probes: int, order: Sequence[int]) -> Tensor:
    """Signed sums of the elements of every sample.

    Args:
        x: floating point, samples first. `seed`: int64, one element.
        probes: sums a sample, 1 .. elements a sample; `layout.fitting_probes` names fast ones.
        order: dimensions from the outermost in memory to the innermost; must begin with 0.

    Returns:
        (samples, probes), float32 (float64 for float64).
    """
    plan = _plan(x, probes, order)
    flat = layout.to_physical(x, order).reshape(plan.samples, plan.length)
    sums = flat.new_zeros(plan.samples, probes, dtype=layout.accumulator(x.dtype))
    for samples, elements, signs in _signs(plan, seed, sums.dtype):
        part = flat[samples, elements].to(sums.dtype)
        missing = signs[0].numel() - part.shape[1]
        terms = torch.nn.functional.pad(part, (0, missing)) if missing else part
        sums[samples] += (terms.reshape(signs.shape) * signs).sum(1)
    return sums


@fold.register_fake
def _(x: Tensor, seed: Tensor, probes: int, order: Sequence[int]) -> Tensor:
    plan = _plan(x, probes, order)
    return x.new_empty(plan.samples, probes, dtype=layout.accumulator(x.dtype))


@torch.library.custom_op(
    "xconv::unfold",
    mutates_args=(),
    schema="(Tensor sums, Tensor seed, int[] size, int[] order, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def unfold(sums: Tensor, seed: Tensor, size: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The unbiased estimate of the tensor of shape `size` that `fold` summed, with strides dense in `order`."""
    plan = layout.folding(size, order, int(sums.shape[1]))
    flat = sums.new_empty(plan.samples, plan.length, dtype=dtype)
    for samples, elements, signs in _signs(plan, seed, sums.dtype):
        part = flat[samples, elements]
        part.copy_((sums[samples].unsqueeze(1) * signs).flatten(1)[:, : part.shape[1]])
    return layout.to_logical(flat.view(plan.physical), order)


@unfold.register_fake
def _(sums: Tensor, seed: Tensor, size: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> Tensor:
    layout.folding(size, order, int(sums.shape[1]))
    return sums.new_empty_strided(tuple(size), layout.dense_strides(size, order), dtype=dtype)


def _plan(x: Tensor, probes: int, order: Sequence[int]) -> layout.Folding:
    layout.accumulator(x.dtype)
    layout.check_order(x.shape, order)
    plan = layout.folding(x.shape, order, probes)
    check_countable(x.shape, _counted(plan))
    return plan


def _counted(plan: layout.Folding) -> int:
    """How many hashes the signs take, or how many rows a sample has with those missing from the last terms."""
    return plan.batches * max(plan.samples * plan.probes, layout.UNROLLED_TERMS * plan.rows)


def _signs(plan: layout.Folding, seed: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """The signs of all elements, some at a time: which samples, which of their elements, and (samples, terms, probes).

    Term g of a sum takes bit g % 8 of hash number g // 8 of that sum. The last terms may have more signs than elements.
    """
    unrolled = min(layout.UNROLLED_TERMS, plan.terms)
    runs = max(1, min(plan.batches, layout.BLOCK // (unrolled * plan.probes)))
    step = max(1, layout.BLOCK // (runs * unrolled * plan.probes))
    for sample, batch in itertools.product(range(0, plan.samples, step), range(0, plan.batches, runs)):
        samples, batches = slice(sample, min(sample + step, plan.samples)), min(batch + runs, plan.batches)
        columns = _count(samples.start * plan.probes, samples.stop * plan.probes, seed)
        hashes = _count(batch, batches, seed) * (plan.samples * plan.probes)
        bits = random_bits(columns.view(-1, 1, plan.probes) + hashes.view(1, -1, 1), seed, STREAM)
        signs = torch.stack([random_signs(bits, bit, dtype) for bit in range(unrolled)], 2)
        first, last = batch * layout.UNROLLED_TERMS, min(batches * layout.UNROLLED_TERMS, plan.terms)
        chosen = signs.view(signs.shape[0], -1, plan.probes)[:, : last - first]
        yield samples, slice(first * plan.probes, last * plan.probes), chosen


def _count(first: int, last: int, like: Tensor) -> Tensor:
    return torch.arange(first, last, dtype=torch.int32, device=like.device)


def fitted(size: Sequence[int], probes: int, kind: str, means: bool | None = None) -> tuple[int, bool]:
    """Probes and means for a tensor of `size` (samples first), from what a user asked of layers of many sizes.

    A sample has no more probes than values. Means are held where there are pixels to take them over; if `means` is
    None, only beside folds of fewer sums than values.
    """
    length = math.prod(size[1:])
    wanted = kind == "fold" and probes < length if means is None else means
    return min(probes, length), wanted and len(size) > 2


def _probes_of(held: SavedAs) -> tuple[int, str]:
    """The number and the kind of the projections of a sample. Raises `ValueError` when one is missing or unknown."""
    if held.spec.probes is None:
        raise ValueError(f"probes=None: codec {held.spec.codec!r} needs the number of sums a sample")
    if held.spec.kind not in KINDS:
        raise ValueError(f"kind={held.spec.kind!r}: must be one of {', '.join(KINDS)}")
    return held.spec.probes, held.spec.kind


def _sums(held: SavedAs) -> int:
    """Sums a sample."""
    probes, kind = _probes_of(held)
    return dense.sums_held(kind, probes, held.size)


def _stores_codes(held: SavedAs) -> bool:
    return held.spec.bits not in (None, PLAIN_BITS)


def _pixel_dims(held: SavedAs) -> list[int]:
    if len(held.size) < 3:
        raise ValueError(f"means=True: needs samples, channels and pixels, not size {held.size}")
    return list(range(2, len(held.size)))


def _encode(x: Tensor, seed: Tensor, held: SavedAs) -> tuple[Tensor, ...]:
    (probes, kind), wide = _probes_of(held), layout.accumulator(held.dtype)
    means: tuple[Tensor, ...] = ()
    if held.spec.means:
        mean = torch.ops.aten.mean.dim(x, _pixel_dims(held), True, dtype=wide)
        x, means = torch.ops.aten.sub.Tensor(x, mean), (mean,)
    if kind == "fold":
        sums = torch.ops.xconv.fold.default(x, seed, probes, list(held.order))
    else:
        sums = dense.encode(x, seed, probes, kind)
    if not _stores_codes(held):
        return (sums, *means)
    return (*torch.ops.xconv.quantize.default(sums, seed, bits_of(held), [0, 1]), *means)


def _decode(payload: tuple[Tensor, ...], seed: Tensor, held: SavedAs) -> Tensor:
    wide = layout.accumulator(held.dtype)
    stored = payload[:-1] if held.spec.means else payload
    sums = stored[0]
    if _stores_codes(held):
        size = [held.size[0], _sums(held)]
        sums = torch.ops.xconv.dequantize.default(*stored, size, [0, 1], bits_of(held), wide)
    inner = wide if held.spec.means else held.dtype
    if held.spec.kind == "fold":
        x = torch.ops.xconv.unfold.default(sums, seed, list(held.size), list(held.order), inner)
    else:
        x = dense.decode(sums, seed, list(held.size), _probes_of(held)[1], inner)
    if held.spec.means:
        return torch.ops.prims.convert_element_type.default(torch.ops.aten.add.Tensor(x, payload[-1]), held.dtype)
    return x


def _payload_bytes(held: SavedAs) -> int:
    wide = layout.accumulator(held.dtype)
    means = math.prod(held.size[:2]) * wide.itemsize if held.spec.means else 0
    sums = (held.size[0], _sums(held))
    if _stores_codes(held):
        return means + code_bytes(sums, (0, 1), bits_of(held), wide)
    return means + math.prod(sums) * wide.itemsize


def fold_noise(plan: layout.Folding) -> float:
    """Variance of unfolded values relative to that of independent values: a sum of m terms adds m - 1 to each."""
    full, rest = plan.full, plan.probes - plan.full
    return (full * plan.terms * (plan.terms - 1) + rest * (plan.terms - 1) * (plan.terms - 2)) / plan.length


def _noise(held: SavedAs) -> float:
    probes, kind = _probes_of(held)
    length = math.prod(held.size[1:])
    if kind == "fold":
        noise = fold_noise(layout.folding(held.size, held.order, probes))
    else:
        noise = dense.dense_noise(kind, probes, length, held.size[1])
    if _stores_codes(held):
        sums = _sums(held)
        noise += length / sums * group_noise((held.size[0], sums), (0, 1), bits_of(held))
    return noise


def _counts(held: SavedAs) -> int:
    probes, kind = _probes_of(held)
    drawn = _counted(layout.folding(held.size, held.order, probes)) if kind == "fold" else math.prod(held.size[1:])
    return max(drawn, draws((held.size[0], _sums(held)), (0, 1), bits_of(held)) if _stores_codes(held) else 0)


def _traffic(held: SavedAs) -> int:
    # x is read once more when its means come first.
    passes = 3 if held.spec.means else 2
    return passes * math.prod(held.size) * held.dtype.itemsize + 2 * _payload_bytes(held)


PROBE = register(
    Codec(
        name="probe",
        lossless=False,
        encode=_encode,
        decode=_decode,
        payload_bytes=_payload_bytes,
        noise=_noise,
        traffic=_traffic,
        seeded=True,
        counts=_counts,
    )
)
