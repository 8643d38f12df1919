"""What passes know of operations: one table, in which a row says all of an operation that any pass asks for.

A row names operators of ATen (`prims.` for PyTorch's primitives, `xconv.` for ours): `add.Tensor` one overload, `sum`
all of them. Then it says what holds of them, and by which rule of `batch_rules.py` samples go through. What torch
itself tags as pointwise or as a reduction need not be said again; an operation of which no row is known is none of
these.

    view        the result may share memory with the first operand
    moved       its elements are those of the operand, whose dimensions are put in another order, added or taken away
    reshaped    its elements are those of the operand in their order, under another shape
    same        each element is the operand's in the same place, up to rounding
    filled      all elements are equal
    pointwise   Inductor generates it as a loop over its result, which it may fuse or inline
    replayable  cheap to compute again in the backward
    comparison  booleans that say how values compare, or the opposite of such
    reduction   it sums up, or takes extrema or moments
    sum         a sum over elements
    product     a product of matrices, whose factors are the last two operands
    linear      in all tensor operands together
    bilinear    linear in each of two operands
    affine      in its operands: a sum of what is linear and of constants, or that of pieces (relu)
    step        scales or shifts its operand: a step of a normalisation
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xconv_fx import ops  # noqa: F401 (defines operators)
from xconv_fx.hooks.inductor_prims import prims

aten = torch.ops.aten
_SPACES = {"aten": aten, "prims": prims, "xconv": torch.ops.xconv}

PROPERTIES = (
    "view", "moved", "reshaped", "same", "filled", "pointwise", "replayable", "comparison", "reduction", "sum",
    "product", "linear", "bilinear", "affine", "step",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Operators, separated by spaces, what `holds` of them, and their rule for the `batch` ("" for none)."""

    names: str
    holds: str = ""
    batch: str = ""


ROWS = (
    # Arithmetic. What is pointwise has the rule `elementwise`.
    Row("add.Tensor sub.Tensor", "linear affine step"),
    Row("add.Scalar mul.Scalar", "linear step"),
    Row("sub.Scalar div.Scalar", "linear"),
    Row("neg where.self", "linear affine"),
    Row("mul.Tensor", "bilinear step"),
    Row("addcmul", "bilinear"),
    Row("div.Tensor", "step"),
    Row("relu", "affine"),
    Row("le lt ge gt eq ne logical_not bitwise_not", "comparison"),
    Row("clone prims.convert_element_type xconv.stored", "same pointwise linear affine"),
    Row("_to_copy", "same pointwise"),
    Row("copy.default", batch="elementwise"),
    # Constants.
    Row("full full_like zeros_like", "filled pointwise"),
    Row("ones_like scalar_tensor empty.memory_format empty_like", "filled"),
    Row("prims.iota", "pointwise"),
    # Views, and what moves elements.
    Row("alias detach", "view same", "unchanged"),
    Row("view_as_real view_as_complex", batch="unchanged"),
    Row("view.default reshape _unsafe_view", "view reshaped", "view"),
    Row("view.dtype", batch="view"),
    Row("permute transpose.int t unsqueeze select.int", "view moved", "rearranged"),
    Row("squeeze.default squeeze.dim squeeze.dims", "view moved", "rearranged"),
    Row("unbind.int", batch="rearranged"),
    Row("expand", "view moved", "expanded"),
    Row("as_strided", "view", "restrided"),
    Row("slice.Tensor split.Tensor split_with_sizes", "view", "along dim"),
    Row("chunk index_select", batch="along dim"),
    Row("unfold", batch="along dimension"),
    Row("flip roll", batch="along dims"),
    Row("prims.rev", "replayable linear affine", "along dims"),
    Row("repeat", batch="repeated"),
    Row("constant_pad_nd", "pointwise linear affine", "padded"),
    Row("cat", "replayable linear affine", "beside along"),
    Row("slice_scatter", "linear", "beside along"),
    Row("gather scatter.src scatter.value scatter_add scatter_reduce.two", batch="beside along"),
    Row("select_scatter", batch="select scattered"),
    Row("index.Tensor", "replayable linear affine", "indexed"),
    Row("_unsafe_index.Tensor", "pointwise replayable affine", "indexed"),
    Row("embedding", batch="looked up"),
    Row("bucketize.Tensor", batch="binned"),
    Row("triu tril", batch="last two"),
    # Reductions, and what goes along a dimension.
    Row("sum.default sum.dim_IntList", "sum reduction linear"),
    Row("mean.default mean.dim", "reduction linear"),
    Row("sum mean var_mean var amax amin max min any all", "reduction"),
    Row("_softmax _log_softmax glu cumsum cumprod logcumsumexp sort topk", batch="along dim"),
    Row("_fft_c2c _fft_r2c _fft_c2r", batch="along dim"),
    Row("native_layer_norm multinomial", batch="rows"),
    # Products and convolutions.
    Row("mm.default bmm.default addmm.default baddbmm.default", "product bilinear", "product"),
    Row("mm addmm bmm baddbmm", batch="product"),
    Row("convolution", "bilinear", "first dim"),
    Row("convolution_backward", "bilinear"),
    # Windows, sampling and padding, each plane apart.
    Row("max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d", batch="first dim"),
    Row("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d", batch="first dim"),
    Row("prims._low_memory_max_pool_with_offsets prims._low_memory_max_pool_offsets_to_indices", batch="first dim"),
    Row("upsample_nearest2d.vec upsample_nearest3d.vec", "replayable affine", "first dim"),
    Row("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d", batch="first dim"),
    Row("upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d", batch="first dim"),
    Row("pixel_shuffle pixel_unshuffle channel_shuffle native_group_norm im2col col2im", batch="first dim"),
    Row("reflection_pad1d reflection_pad2d reflection_pad3d", batch="first dim"),
    Row("replication_pad1d replication_pad2d replication_pad3d", batch="first dim"),
    Row("fractional_max_pool2d fractional_max_pool3d grid_sampler_2d grid_sampler_3d", batch="all first"),
    Row("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention.default", batch="all first"),
    Row("_scaled_dot_product_efficient_attention", batch="all first"),
    Row("upsample_nearest2d_backward upsample_nearest3d_backward", "linear"),
    Row("avg_pool2d_backward.default avg_pool3d_backward.default", "linear"),
    Row("xconv.interpolate_backward", "linear", "first dim"),
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What rows say of one operator."""

    holds: frozenset[str] = frozenset()
    batch: str = ""


@functools.cache
def table() -> dict[Any, Known]:
    """What all rows say, by operator. Raises `ValueError` for a property that there is not, or for two batch rules."""
    found: dict[Any, Known] = {}
    for row in ROWS:
        holds = frozenset(row.holds.split())
        if unknown := holds - set(PROPERTIES):
            raise ValueError(f"{row.names}: no such property as {sorted(unknown)}; they are {', '.join(PROPERTIES)}")
        for name in row.names.split():
            for target in operators(name):
                before = found.get(target, Known())
                if row.batch and before.batch not in ("", row.batch):
                    raise ValueError(f"{name}: the batch rule is {before.batch!r}, and {row.batch!r} elsewhere")
                found[target] = Known(before.holds | holds, row.batch or before.batch)
    return found


def operators(name: str) -> list[Any]:
    """The operators that a name in a row stands for. Raises `AttributeError` for one that torch does not have."""
    space, _, rest = name.partition(".")
    if space not in _SPACES:
        space, rest = "aten", name
    packet, _, overload = rest.partition(".")
    found = getattr(_SPACES[space], packet)
    return [getattr(found, one) for one in ([overload] if overload else found.overloads())]


def has(node: fx.Node, name: str) -> bool:
    """Whether this, one of `PROPERTIES`, holds of a node's operation."""
    return node.op == "call_function" and target_has(node.target, name)


def target_has(target: Any, name: str) -> bool:
    """The same of an operator."""
    known = table().get(target)
    return known is not None and name in known.holds


def operators_with(name: str) -> tuple[Any, ...]:
    """All operators of which it holds."""
    return tuple(target for target, known in table().items() if name in known.holds)


def batch_rule(target: Any) -> str:
    """The name of the rule by which samples go through an operator; "" where the table has none."""
    known = table().get(target)
    return "" if known is None else known.batch
