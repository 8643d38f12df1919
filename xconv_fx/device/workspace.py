"""Bytes that kernels of ATen, of libraries and of ours allocate inside a call, beyond their results.

Every call that is not known to allocate nothing is made once, on tensors of the same shapes and strides, with the
allocator watched (`device/scratch.py`). What convolutions take is up to the backend that ATen chooses and to the
processor:

* the native ones unfold their input (im2col), which can dwarf every activation;
* oneDNN's reorder weights, pad them to the processor's vectors, add up weight gradients for every thread, and copy
  contiguous images and volumes into blocked layouts of their own.

All of that is constant, or grows along a line, in the number of samples and nearly so in the rows of an image or
volume, as long as ATen chooses the same backend. So a convolution that is much arithmetic is measured on few samples,
where that is still too much on few rows, and continued.

Plans for no machine in particular have rough rules instead. A custom operator of the user's is never run: what it
allocates inside is counted as nothing unless it is declared (`declare`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx.hooks import dispatch
from xconv_fx.hooks.dispatch import OpOverload
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.ops import conv3d
from xconv_fx.reproducible import is_portable

from .cudnn import cudnn_workspace
from .rough_workspace import rough_bytes
from .scratch import Shaped, continued, copies, measured, shapes, signature

aten, xconv = torch.ops.aten, torch.ops.xconv

# Operations of a call that is made as it is, and of one that is made with few samples: some hundredths of a second.
WORK, WORK_OF_FEW = 1e8, 4e8
# Rows of an image or volume, and rows of a matrix, that a call of more work is cut down to, at least.
ROWS, MATRIX_ROWS = 8, 512

# What may be run to see what it allocates. Others may have side effects.
_PURE = {"aten", "prims", "xconv", "mkldnn"}
# These advance a stream of seeds.
_DRAWS = {"xconv::seeds", "xconv::stream_seeds", "xconv::draw_seed", "xconv::noted_gradients"}

_declared: dict[Any, Callable[..., int]] = {}


def declare(operator: OpOverload, allocated: Callable[..., int]) -> None:
    """Say what a custom operator allocates inside its calls: `allocated(*args, **kwargs)` bytes; tensors may be fake.

    Raises `ValueError` when the operator has been declared before.
    """
    if operator in _declared:
        raise ValueError(f"{operator} has been declared before")
    _declared[operator] = allocated


def is_counted(func: Any) -> bool:
    """Whether what an operation allocates inside is known at all."""
    return dispatch.is_view(func) or func.namespace in _PURE or func in _declared


def workspace_bytes(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, results: Any = ()
) -> int:
    """Bytes allocated and freed within one call of `func` beyond its `results`; tensors may be fake.

    On CUDA, what convolutions are assumed to take (`cudnn.py`). 0 for other devices, and for operators that nobody
    declared.
    """
    named = kwargs or {}
    if _on_cuda((args, named)):
        return _declared[func](*args, **named) if func in _declared else cudnn_workspace(func, args, results)
    if dispatch.is_view(func) or not _on_cpu((args, named)):
        return 0
    if func in _declared:
        return _declared[func](*args, **named)
    if is_portable():
        return rough_bytes(func, args)
    if func.namespace not in _PURE or func.name() in _DRAWS:
        return 0
    if func is xconv.volume_weight_gradient.default:
        args = tuple(map(_cut, conv3d.two_slabs(args), args))
    try:
        call, rest, returned = signature(args), signature(named), signature(results)
    except TypeError:  # A sparse tensor, or a tensor on another device.
        return 0
    found = None if dispatch.is_profiled() else _found(func, call, rest, dispatch.settings())
    return max(copies(call, returned), rough_bytes(func, args)) if found is None else found


@functools.cache
def _found(func: Any, args: Any, kwargs: Any, settings: Any) -> int | None:
    """What is measured of the call, or of smaller ones; None where none can be made. `settings` are those of now."""
    if func in _PRODUCTS:
        return _product(func, args, kwargs)
    if func not in _SAMPLES:
        return measured(func, args, kwargs)
    tensors, sizes = _SAMPLES[func]

    def few(samples: int) -> int | None:
        fewer = tuple(
            arg.cut(0, samples) if place in tensors and isinstance(arg, Shaped)
            else (samples, *arg[1:]) if place in sizes
            else arg
            for place, arg in enumerate(args)
        )  # fmt: skip
        return _few_rows(func, fewer, kwargs)

    if _is_small(func, args):
        return measured(func, args, kwargs)
    samples = args[0].size[0]
    least = _least_samples(func, args, samples)
    return continued(samples, least, least, few)


def _is_small(func: Any, args: Any) -> bool:
    """Whether a call is made with all samples."""
    if func in _WITH_ROWS:
        return _Rows(func, args).work <= WORK
    return func not in conv3d.OPERATORS and sum(shaped.bytes for shaped in shapes(args)) <= SMALL


# Operands, in bytes, of calls other than convolutions that are made with all samples.
SMALL = 1 << 24

_WITH_ROWS = (aten.convolution.default, aten.convolution_backward.default, xconv.single_convolution.default)
# Which arguments have samples along their first dimension, and which are sizes that begin with their number.
_SAMPLES: dict[Any, tuple[Sequence[int], Sequence[int]]] = {
    aten.convolution.default: ((0,), ()),
    aten.convolution_backward.default: ((0, 1), ()),
    xconv.single_convolution.default: ((0,), ()),
    xconv.pointwise_convolution.default: ((0,), ()),
    xconv.volume_weight_gradient.default: ((0, 1), ()),
    aten.avg_pool2d_backward.default: ((0, 1), ()),
    aten.avg_pool3d_backward.default: ((0, 1), ()),
    aten._adaptive_avg_pool2d_backward.default: ((0, 1), ()),
    aten._adaptive_avg_pool3d_backward.default: ((0, 1), ()),
    aten.upsample_bicubic2d_backward.default: ((0,), (2,)),
    aten.upsample_trilinear3d_backward.default: ((0,), (2,)),
    aten._scaled_dot_product_flash_attention_for_cpu.default: ((0, 1, 2), ()),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: ((0, 1, 2, 3, 4, 5), ()),
}


def _least_samples(func: Any, args: Any, samples: int) -> int:
    """How many samples are like many: for which ATen chooses the same backend, with some work for every thread."""
    least = max(2, torch.get_num_threads())
    if func is aten.convolution_backward.default and args[1].dtype.itemsize < 4:
        least *= 4  # The sums of 16-bit weight gradients are kept for each thread.
    if func in (aten.convolution.default, aten.convolution_backward.default):
        tensors, _ = _SAMPLES[func]
        wanted = _backend(func, args)

        def alike(number: int) -> bool:
            few = tuple(arg.cut(0, number) if place in tensors else arg for place, arg in enumerate(args))
            return _backend(func, few) == wanted

        while 2 * least < samples and not (alike(least) and alike(2 * least)):
            least *= 2
    return least


def _few_rows(func: Any, args: Any, kwargs: Any) -> int | None:
    """A call of few samples; of a convolution that is much work on few rows, continued."""
    if func not in _WITH_ROWS or (rows := _Rows(func, args)).work <= WORK_OF_FEW:
        return measured(func, args, kwargs)
    least = ROWS
    while least + ROWS < rows.count and not rows.alike(least):
        least += ROWS
    return continued(rows.count, least, ROWS, lambda count: measured(func, rows.cut(count), kwargs))


class _Rows:
    """A convolution, or its backward, by rows: of its output, or of the input of a transposed one."""

    def __init__(self, func: Any, args: Any) -> None:
        self.func, self.args = func, args
        self.backward = func is aten.convolution_backward.default
        self.x, self.weight = args[1:3] if self.backward else args[:2]
        self.geometry = args[4:10] if self.backward else args[3:9]
        stride, padding, dilation, self.transposed = self.geometry[:4]
        self.stride, padding, dilation = (part[0] for part in (stride, padding, dilation))
        self.margin = dilation * (self.weight.size[2] - 1) + 1 - 2 * padding
        if self.transposed:
            self.count = self.x.size[2]
        else:
            self.count, over = divmod(self.x.size[2] - self.margin, self.stride)
            self.count, self.margin = self.count + 1, self.margin + over

    @property
    def work(self) -> float:
        """Operations of the call."""
        spatial = [
            self.count,
            *(n if self.transposed else -(-n // self.stride) for n in self.x.size[3:]),
        ]
        return 2.0 * prod(self.weight.size) * self.x.size[0] * prod(spatial)

    def cut(self, count: int) -> Any:
        """The arguments with so many rows."""
        if count == self.count:
            return self.args
        wide = max(1, (count - 1) * self.stride + self.margin)
        if not self.backward:
            return (self.x.cut(2, count if self.transposed else wide), *self.args[1:])
        grad, x = (wide, count) if self.transposed else (count, wide)
        return (self.args[0].cut(2, grad), self.x.cut(2, x), *self.args[2:])

    def alike(self, count: int) -> bool:
        """Whether ATen chooses the same backend for so many rows, and `ROWS` more, as for all."""
        if self.func is xconv.single_convolution.default:
            return True
        return all(_backend(self.func, self.cut(n)) == _backend(self.func, self.args) for n in (count, count + ROWS))


def _backend(func: Any, args: Any) -> str:
    x, weight = args[1:3] if func is aten.convolution_backward.default else args[:2]
    geometry = args[4:10] if func is aten.convolution_backward.default else args[3:9]
    return _backend_of(x, weight, geometry, dispatch.settings())


@functools.cache
def _backend_of(x: Shaped, weight: Shaped, geometry: Any, settings: Any) -> str:
    return dispatch.convolution_backend(x.stand_in(), weight.stand_in(), None, geometry)


# Products of matrices: where their left operand is.
_PRODUCTS = {aten.mm.default: 0, aten.mm.out: 0, aten.addmm.default: 1, aten.addmm.out: 1}


def _product(func: Any, args: Any, kwargs: Any) -> int | None:
    """A product of matrices; one that is much work by fewer rows of the left one, continued."""
    left = _PRODUCTS[func]
    rows, inner = args[left].size
    if 2.0 * rows * inner * args[left + 1].size[1] <= WORK_OF_FEW:
        return measured(func, args, kwargs)

    def few(count: int) -> int | None:
        first = [arg.cut(0, count) if len(arg.size) == 2 and arg.size[0] == rows else arg for arg in args[:left]]
        out = tuple((name, value.cut(0, count) if name == "out" else value) for name, value in kwargs)
        return measured(func, (*first, args[left].cut(0, count), *args[left + 1 :]), out)

    return continued(rows, MATRIX_ROWS, MATRIX_ROWS, few)


def node_workspace(node: fx.Node, images_last: bool = True) -> int:
    """`workspace_bytes` of a graph's node, if it is a call, its arguments taken from their fake tensors.

    `images_last` says that Inductor will lay out images channels-last; on the CPU it does so for nearly all networks.
    """
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    if _on_cuda(values):
        args: Any = fx.node.map_arg(
            node.args, lambda arg: _described(arg.meta["val"]) if images_last else arg.meta["val"]
        )
        return cudnn_workspace(node.target, args, node.meta.get("val"))
    if not dispatch.is_called(node.target) or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return 0
    if node.target not in (aten.convolution.default, aten.convolution_backward.default):
        call: Any = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        return workspace_bytes(node.target, call[0], call[1], node.meta.get("val"))
    laid_out: Any = fx.node.map_arg(node.args, lambda arg: _laid_out(arg.meta["val"]))  # type: ignore[arg-type]
    kernel = conv3d.operator_for(node.target, laid_out)
    return workspace_bytes(
        kernel or node.target, conv3d.arguments_for(kernel, laid_out, laid_out) if kernel else laid_out
    )


def _on_cuda(values: Any) -> bool:
    """Whether a tensor among the values is on CUDA."""
    return any(isinstance(v, Tensor) and v.device.type == "cuda" for v in tree_leaves(values))


def _on_cpu(values: Any) -> bool:
    """Whether there are tensors among the values, all of them on the CPU."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def _cut(part: Any, whole: Any) -> Any:
    """A part of an operand, with memory of its own if the whole has that; a view is copied by the library."""
    if not isinstance(part, Tensor) or part.shape == whole.shape:
        return part
    return torch.empty_like(part) if Shaped.of(whole).reach == whole.numel() else part


def _laid_out(value: Tensor) -> Tensor:
    """An operand as Inductor will lay it out: images channels-last, as it decides for nearly all networks."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _described(value: Any) -> Any:
    """An operand on CUDA as it will be laid out: an image without memory, for autograd may know no such device."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    shape = [int(extent) for extent in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta", memory_format=torch.channels_last)
