"""Dense probes: the estimator of XConv, and the reference that folding is measured against.

XConv (Louboutin et al., arXiv 2106.06998) holds S = X Z instead of the input X of a convolution: X is N samples of
D = channels x pixels values in logical order, Z is D x r random with E[Z Z^T] / r = I. The backward reads
X^ = S Z^T / r in place of X, which is unbiased because a weight gradient is linear in X. Four kinds of Z:

* `gaussian`: independent normal entries (Box-Muller on hashed bits);
* `rademacher`: independent signs, the least noise of independent entries;
* `orthogonal`: sqrt(D) times the orthogonal polar factor of a Gaussian matrix. Its columns span what a QR of that
  matrix would span, so the projection is the same, and r = D gives X back to rounding;
* `independent`: normal entries, every channel projected apart. That holds r sums a channel, C r a sample, and the noise
  is that of `gaussian` for as many values as a channel has pixels: the same at equal bytes.

Z is never stored. Entry (d, j) is a function of the seed, d and j (`xconv_fx.ops.counter_rng`), drawn again wherever it
is read, in blocks of at most `BLOCK` entries, and of a sixteenth of the input's where that is less (but at least
`LEAST_BLOCK`, or one row of max(r, N) entries). Besides inputs and outputs encoding and decoding hold at most six such
blocks: less than half of the input, and 6 MB in single precision, whatever N and D are. On a GPU a kernel of ours draws
a block (`xconv_fx.ops.probe_kernel`) where plain operations hold four to draw one: blocks are three times as large.

What it costs: D r hashed entries and 2 N D r flops to encode, and again to decode. `orthogonal` draws Z twice each
time and adds 2 D r^2 flops in double precision for a Gram matrix, and an r x r eigendecomposition: for large D it is
the r^2 term that hurts. Folding (`xconv_fx.ops.fold`) reaches the noise of orthogonal probes for O(N D).

Known gaps: these ops run as calls, also inside compiled graphs, where each is one opaque node. Eigenvalues of the Gram
matrix are asked for by the host, so that no CUDA graph captures `orthogonal`, whose ops have names of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import probe_kernel, triton_words
from .conv import weight_gradient
from .counter_rng import TENSORS, constants, derive_keys, keyed_hash, random_signs, split_seed, uniform
from .layout import accumulator, inverse

BLOCK, LEAST_BLOCK = 2**18, 2**12
# How much larger blocks are that are drawn by a kernel, and none besides the one that it writes.
_DRAWN_AT_ONCE = 3


def _signs(index: Tensor, keys: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    return random_signs(keyed_hash(index, keys(0), TENSORS))


def _normals(index: Tensor, keys: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    # 1 - u lies in (0, 1]: the logarithm is finite.
    radius = (1 - uniform(keyed_hash(index, keys(0), TENSORS))).log_().mul_(-2).sqrt_()
    return radius.mul_(uniform(keyed_hash(index, keys(1), TENSORS)).mul_(2 * math.pi).cos_())


_ENTRIES = {"gaussian": _normals, "rademacher": _signs, "orthogonal": _normals, "independent": _normals}
KINDS = tuple(_ENTRIES)


class Probes:
    """The matrix Z of one residual: `count` columns, one row per feature, drawn block by block and never whole.

    It is for `samples` samples.
    """

    def __init__(
        self, seed: Tensor, kind: str, count: int, features: int, dtype: torch.dtype, samples: int = BLOCK
    ) -> None:
        check(kind, count, features)
        self._own = triton_words.usable(seed.device)
        self.entries = min(BLOCK, max(LEAST_BLOCK, samples * features // 16)) * (_DRAWN_AT_ONCE if self._own else 1)
        self.kind, self.count, self.features, self.dtype, self.device = kind, count, features, dtype, seed.device
        self._drawn = seed
        if not self._own:
            self._seed = split_seed(seed.reshape(()))
            # Every column has streams of its own, so that an index is a feature and never overflows an int32.
            streams = [[constants(2 * column + draw) for column in range(count)] for draw in range(2)]
            self._constants = torch.tensor(streams, dtype=torch.int32, device=self.device).movedim(2, 1)
        self._mixing = self._orthogonaliser() if kind == "orthogonal" else None

    def block(self, first: int, last: int, columns: slice = slice(None)) -> Tensor:
        """Rows `first` to `last` of Z, (last - first, columns)."""
        if self._mixing is not None:
            return self._entries(first, last, slice(None)) @ self._mixing[:, columns]
        return self._entries(first, last, columns)

    def rows_per_block(self, width: int = 0) -> int:
        """How many rows a block has, for operands of at least `width` entries a row."""
        return max(1, self.entries // max(width, self.count))

    def samples(self, columns: slice) -> Tensor:
        """Some columns of Z as rows, (columns, D), as if they were samples of the input."""
        width = len(range(*columns.indices(self.count)))
        out = torch.empty(width, self.features, dtype=self.dtype, device=self.device)
        step = self.rows_per_block()
        for first in range(0, self.features, step):
            last = min(first + step, self.features)
            out[:, first:last] = self.block(first, last, columns).t()
        return out

    def _entries(self, first: int, last: int, columns: slice) -> Tensor:
        if self._own:
            among = range(*columns.indices(self.count))
            return probe_kernel.entries(self._drawn, first, last, among, self.kind == "rademacher", self.dtype)
        index = torch.arange(first, last, dtype=torch.int32, device=self.device).unsqueeze(1)
        constants: Any = self._constants[:, :, columns]

        def keys(draw: int) -> tuple[Tensor, Tensor]:
            return derive_keys(*self._seed, (constants[draw, 0], constants[draw, 1]), TENSORS)

        return _ENTRIES[self.kind](index, keys).to(self.dtype)

    def _orthogonaliser(self) -> Tensor:
        """sqrt(D) (G^T G)^(-1/2) for the Gaussian matrix G, by which G becomes orthogonal; r x r."""
        gram = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.device)
        step = self.rows_per_block()
        for first in range(0, self.features, step):
            rows = self._entries(first, min(first + step, self.features), slice(None)).double()
            gram.addmm_(rows.t(), rows)
        values, vectors = torch.linalg.eigh(gram)
        scale = (self.features / values.clamp(min=values[-1] * 1e-14)).sqrt()
        return ((vectors * scale) @ vectors.t()).to(self.dtype)


def check(kind: str, probes: int, features: int) -> None:
    """Raise `ValueError` unless `kind` is known and `probes` is possible for samples of `features` values."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choices: {', '.join(KINDS)}")
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least 1 is needed")
    if kind == "orthogonal" and probes > features:
        raise ValueError(f"probes is {probes}; at most {features}, the values of a sample, can be orthogonal")


def sums_held(kind: str, probes: int, size: Sequence[int]) -> int:
    """How many sums a sample of an input of `size` (N, C, ...) has: r, or r for every channel."""
    return probes * int(size[1]) if kind == "independent" else probes


def dense_noise(kind: str, probes: int, features: int, channels: int = 1) -> float:
    """E |X^ - X|^2 / |X|^2 for `probes` probes of samples of `features` values in `channels`. Exact for any X.

    With z_j the columns of Z, E[(Z Z^T)^2] is r (r + D + 1) I for normal entries, r (r + D - 1) I for signs and
    D r I for orthogonal columns of length sqrt(D); divide by r^2 and subtract 1.
    """
    check(kind, probes, features)
    energy = {
        "gaussian": features + 1,
        "rademacher": features - 1,
        "orthogonal": features - probes,
        "independent": features // channels + 1,
    }
    return energy[kind] / probes


def encode(x: Tensor, seed: Tensor, probes: int, kind: str) -> Tensor:
    """`dense_encode`, by the name that says whether CUDA graphs may capture it."""
    return (orthogonal_encode if kind == "orthogonal" else dense_encode)(x, seed, probes, kind)


def decode(sums: Tensor, seed: Tensor, size: Sequence[int], kind: str, dtype: torch.dtype) -> Tensor:
    """`dense_decode`, likewise."""
    return (orthogonal_decode if kind == "orthogonal" else dense_decode)(sums, seed, size, kind, dtype)


@torch.library.custom_op("xconv::dense_encode", mutates_args=())
def dense_encode(x: Tensor, seed: Tensor, probes: int, kind: str) -> Tensor:
    """S = X Z of `x` (N, C, ...), read in logical order whatever its memory format.

    Args:
        x: any floating dtype, at least two dims.
        seed: int64 with one element.
        probes: r, the number of columns of Z.
        kind: one of `KINDS`.

    Returns:
        (N, `sums_held`) in single precision, in double for a double `x`.

    Raises:
        ValueError: an unknown kind, no probes, or more orthogonal ones than there are values in a sample.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = accumulator(x.dtype)
        z = Probes(seed, kind, probes, _features(x.shape), dtype, x.shape[0])
        pixels = _planes(x)
        sums = torch.zeros(x.shape[0], sums_held(kind, probes, x.shape), dtype=dtype, device=x.device)
        if kind == "independent":
            return _project_channels(pixels, z, sums)
        for (first, last), (channels, positions) in _tiles(pixels.shape, z.rows_per_block(x.shape[0])):
            rows = pixels[:, channels, positions].reshape(x.shape[0], last - first)
            sums.addmm_(rows.to(dtype), z.block(first, last))
        return sums


@torch.library.custom_op("xconv::orthogonal_encode", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def orthogonal_encode(x: Tensor, seed: Tensor, probes: int, kind: str) -> Tensor:
    """`dense_encode` of a kind that waits for its eigenvalues."""
    return dense_encode(x, seed, probes, kind)


@orthogonal_encode.register_fake
@dense_encode.register_fake
def _(x: Tensor, seed: Tensor, probes: int, kind: str) -> Tensor:
    check(kind, probes, _features(x.shape))
    return x.new_empty((x.shape[0], sums_held(kind, probes, x.shape)), dtype=accumulator(x.dtype))


@torch.library.custom_op("xconv::dense_decode", mutates_args=())
def dense_decode(sums: Tensor, seed: Tensor, size: Sequence[int], kind: str, dtype: torch.dtype) -> Tensor:
    """X^ = S Z^T / r, of shape `size` (N, C, ...) and `dtype`, contiguous, from `sums` (N, r) of `dense_encode`."""
    with torch.autocast(sums.device.type, enabled=False):
        features, count = _features(size), _count(sums, kind, size)
        z = Probes(seed, kind, count, features, sums.dtype, size[0])
        out = torch.empty(size[0], features, dtype=dtype, device=sums.device)
        scaled = sums / count
        if kind == "independent":
            _expand_channels(scaled, z, out.view(size[0], size[1], -1))
            return out.view(size)
        step = z.rows_per_block(size[0])
        for first in range(0, features, step):
            last = min(first + step, features)
            out[:, first:last] = scaled @ z.block(first, last).t()
        return out.view(size)


@torch.library.custom_op("xconv::orthogonal_decode", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def orthogonal_decode(sums: Tensor, seed: Tensor, size: Sequence[int], kind: str, dtype: torch.dtype) -> Tensor:
    """`dense_decode` of a kind that waits for its eigenvalues."""
    return dense_decode(sums, seed, size, kind, dtype)


@orthogonal_decode.register_fake
@dense_decode.register_fake
def _(sums: Tensor, seed: Tensor, size: Sequence[int], kind: str, dtype: torch.dtype) -> Tensor:
    return sums.new_empty(size, dtype=dtype)


@torch.library.custom_op("xconv::dense_weight_gradient", mutates_args=())
def dense_weight_gradient(
    grad_out: Tensor,
    sums: Tensor,
    seed: Tensor,
    kind: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The estimated weight gradient of a convolution of an input of `input_size`, from the `sums` (N, r) of it.

    With fewer probes than samples it is cheaper to convolve the probes than the decoded samples: the gradient is
    linear in the sum over samples of X^ times `grad_out`, and that sum may be taken over probes first. Both forms are
    the same number; probes of their own for every channel have only the second. `weight_size` and the dtype of
    `grad_out` are those of the result.
    """
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    shared = kind != "independent" and sums.shape[1] < sums.shape[0]
    form = gradient_by_probe if shared else gradient_by_sample
    with torch.autocast(sums.device.type, enabled=False):
        return form(grad_out, sums, seed, kind, input_size, weight_size, geometry)


@dense_weight_gradient.register_fake
def _(
    grad_out: Tensor,
    sums: Tensor,
    seed: Tensor,
    kind: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    return grad_out.new_empty(weight_size)


def gradient_by_sample(
    grad_out: Tensor,
    sums: Tensor,
    seed: Tensor,
    kind: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    geometry: tuple,
) -> Tensor:
    """conv_weight(S Z^T / r, dY): one exact weight gradient and a decoded input. For r >= N."""
    x = dense_decode(sums, seed, input_size, kind, grad_out.dtype)
    return weight_gradient(grad_out, x, weight_size, *geometry).contiguous()


def gradient_by_probe(
    grad_out: Tensor,
    sums: Tensor,
    seed: Tensor,
    kind: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    geometry: tuple,
) -> Tensor:
    """conv_weight(Z, S^T dY) / r: r / N of an exact weight gradient, and no decoded input. For r < N.

    Holds a block, or D, entries of Z and as many probes' share of S^T dY at a time. Half precision is widened, at the
    price of a transient copy of `grad_out`: S is sqrt(D) times larger than X, too large for float16.
    """
    count = sums.shape[1]
    z = Probes(seed, kind, count, _features(input_size), sums.dtype, input_size[0])
    # Flattened in physical order, so that a channels-last gradient is a view too.
    order = [0, *sorted(range(1, grad_out.dim()), key=grad_out.stride, reverse=True)]
    physical = grad_out.to(sums.dtype).permute(order)
    flat = physical.reshape(grad_out.shape[0], -1)
    total = torch.zeros(list(weight_size), dtype=sums.dtype, device=sums.device)
    step = max(1, z.entries // z.features)
    for first in range(0, count, step):
        columns = slice(first, min(first + step, count))
        probes = z.samples(columns).view(-1, *input_size[1:])
        mixed = (sums[:, columns].t() @ flat).view(-1, *physical.shape[1:]).permute(inverse(order))
        total += weight_gradient(mixed, probes, weight_size, *geometry)
    return total.div_(count).to(grad_out.dtype)


def _project_channels(pixels: Tensor, z: Probes, sums: Tensor) -> Tensor:
    """Add to `sums` (N, C r) those of every channel of `pixels` (N, C, P) apart."""
    by_channel = sums.view(sums.shape[0], -1, z.count)
    for (first, last), (channels, positions) in _tiles(pixels.shape, z.rows_per_block(sums.shape[0])):
        tile = pixels[:, channels, positions].to(z.dtype)
        block = z.block(first, last).view(tile.shape[1], tile.shape[2], z.count)
        by_channel[:, channels] += torch.einsum("ncp,cpr->ncr", tile, block)
    return sums


def _expand_channels(sums: Tensor, z: Probes, out: Tensor) -> None:
    """Inverse of `_project_channels`, up to noise: fills `out` (N, C, P)."""
    by_channel = sums.view(sums.shape[0], -1, z.count)
    for (first, last), (channels, positions) in _tiles(out.shape, z.rows_per_block(sums.shape[0])):
        tile = out[:, channels, positions]
        block = z.block(first, last).view(tile.shape[1], tile.shape[2], z.count)
        tile.copy_(torch.einsum("ncr,cpr->ncp", by_channel[:, channels], block))


def _count(sums: Tensor, kind: str, size: Sequence[int]) -> int:
    """r, from what is held of an input of `size`."""
    return sums.shape[1] // sums_held(kind, 1, size)


def _features(size: Sequence[int]) -> int:
    return math.prod(size[1:])


def _planes(x: Tensor) -> Tensor:
    """`x` as (N, C, pixels): a view in every memory format, where (N, C * pixels) would copy a channels-last one."""
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))


def _tiles(shape: Sequence[int], rows: int) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Cut the features of (N, C, pixels) into runs of about `rows`: ((first, last) feature, (channels, pixels))."""
    _, channels, pixels = shape
    deep = max(1, rows // pixels)
    wide = min(rows, pixels)
    for channel in range(0, channels, deep):
        upto = min(channel + deep, channels)
        for pixel in range(0, pixels, wide):
            end = min(pixel + wide, pixels)
            run = (channel * pixels + pixel, (upto - 1) * pixels + end)
            yield run, (slice(channel, upto), slice(pixel, end))
