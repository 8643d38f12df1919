"""Generated kernels run by Triton's interpreter, on the CPU, against the graph that they were generated of.

For a process of its own, with TRITON_INTERPRET=1. Kernels are Inductor's, word for word; what surrounds them is
replaced: the launcher, which would autotune, a few helpers that the interpreter cannot run, allocation (filled with
what must not be read), and convolutions, whose results are laid out as cuDNN lays them out.

Every launch counts the bytes that it reads and writes: each address once a launch, as a cache would have it.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import xconv_fx.ops.lowering  # noqa: F401 (defines the operators)
from xconv_fx.ops import probe_kernel, quantize_kernel, triton_words

from . import wrapper
from .records import Half, Value

# Inductor leaves out masks where this divides a size: a larger block would write out of bounds.
_LARGEST_BLOCK, _LARGEST_TILE, _LARGEST_REDUCED = 4096, 256, 2048
_DEVICE = re.compile(r"device\(type='cuda', index=0\)")


@dataclass
class Launch:
    """One launch of a kernel, and the bytes that it reads and writes."""

    kernel: str
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Compared:
    """A result of a half, as the kernels and as the graph give it.

    `error` is the norm of the difference, relative to that of the graph's; `differing` are the elements of other bits,
    among `elements`.
    """

    name: str
    dtype: str
    elements: int
    differing: int
    error: float


@dataclass(frozen=True)
class Interpreted:
    """What both halves gave, and the launches of the kernels."""

    forward: tuple[Compared, ...]
    backward: tuple[Compared, ...]
    launches: tuple[Launch, ...] = field(default=())

    @property
    def compared(self) -> tuple[Compared, ...]:
        return (*self.forward, *self.backward)


def interpret(halves: Sequence[Half], results: int, folder: str) -> Interpreted:
    """Run a step's forward, and its backward on what the graph's forward saved, with random inputs."""
    made = _Launcher.begin(folder)
    draws = torch.Generator().manual_seed(1)
    forward, *rest = halves
    takes = [_random(value, draws) for value in forward.takes]
    wanted, found = _both(forward, takes)
    backward: tuple[Compared, ...] = ()
    for half in rest:
        saved = iter(wanted[results:])
        takes = [_random(v, draws) if v.name.startswith("tangents") else next(saved) for v in half.takes]
        backward = _compared(half, *_both(half, takes))
    return Interpreted(_compared(forward, wanted, found), backward, tuple(made))


def interpret_function(half: Half, takes: Sequence[torch.Tensor], folder: str) -> Interpreted:
    """Run a graph on these inputs."""
    made = _Launcher.begin(folder)
    return Interpreted(_compared(half, *_both(half, list(takes))), (), tuple(made))


def _both(half: Half, takes: list[Any]) -> tuple[list[Any], list[Any]]:
    """What the graph and the generated code give."""
    torch.manual_seed(7)
    wanted = list(_graph(half)(*map(_copy, takes)))
    torch.manual_seed(7)
    with mock.patch.object(triton_words, "usable", lambda _: True):
        return wanted, list(_code(half.code)([_copy(value) for value in takes]))


def _random(value: Value, draws: torch.Generator) -> Any:
    """Normal numbers, of a variance of one where they are few (scales), and of a tenth elsewhere."""
    if value.number is not None:
        return value.number
    dtype = getattr(torch, value.dtype)
    tensor = torch.zeros(1).new_empty(0, dtype=dtype).new_empty_strided(value.size, value.stride)
    if not dtype.is_floating_point:
        return tensor.zero_()
    scale = 0.3 if len(value.size) > 1 else 1.0
    return tensor.copy_((torch.randn(value.size, generator=draws) * scale).abs() if len(value.size) == 1 else
                        torch.randn(value.size, generator=draws) * scale)  # fmt: skip


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype).copy_(value)


def _compared(half: Half, wanted: Sequence[Any], found: Sequence[Any]) -> tuple[Compared, ...]:
    rows = []
    for name, one, other in zip(half.gives, wanted, found, strict=True):
        if not isinstance(one, torch.Tensor):
            continue
        assert (one.shape, one.dtype) == (other.shape, other.dtype), (name, one.shape, other.shape, other.dtype)
        differing = int((one != other).sum())
        error = 0.0
        if one.dtype.is_floating_point and differing:
            gap, norm = (one.double() - other.double()).norm(), one.double().norm()
            error = float(gap / norm.clamp(min=1e-30))
        rows.append(Compared(name, str(one.dtype).removeprefix("torch."), one.numel(), differing, error))
    return tuple(rows)


def _graph(half: Half) -> Callable[..., Any]:
    """The graph's own code, on the CPU."""
    space = {
        "torch": torch,
        "device": torch.device,
        "inf": math.inf,
        "nan": math.nan,
        "operator": operator,
        "NoneType": type(None),
        "fx_pytree": torch.fx._pytree,
    }
    exec(_DEVICE.sub("device(type='cpu')", half.graph), space)
    forward: Any = space["forward"]
    return lambda *arguments: forward(None, *arguments)


def _code(code: str) -> Callable[..., Any]:
    """The wrapper's `call`, with kernels for the interpreter."""
    code = _DEVICE.sub("device(type='cpu')", code)
    code = re.sub(r"with torch\.cuda\._DeviceGuard\(\d+\):", "if True:", code)
    code = re.sub(r"torch\.cuda\.set_device\(\d+\)", "pass", code)
    sources = wrapper.kernels(code)
    tree = ast.parse(code)
    named = ("async_compile", "AsyncCompile", "_cuda_getCurrentRawStream")
    tree.body = [node for node in tree.body if not any(name in ast.dump(node) for name in named)]
    space: dict[str, Any] = {"__name__": "interpreted", "get_raw_stream": lambda index: 0}
    exec(compile(tree, "<wrapper>", "exec"), space)
    space.update({name: _Launcher.of(name, source) for name, source in sources.items()})
    space["empty_strided_cuda"] = _unread
    space["extern_kernels"] = types.SimpleNamespace(convolution=_convolution, **_products())
    space["assert_size_stride"] = _check_layout
    space["assert_alignment"] = lambda *_: None
    return space["call"]  # type: ignore[no-any-return]


def _products() -> dict[str, Any]:
    return {name: getattr(torch, name) for name in ("mm", "addmm", "bmm")}


def _unread(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory with what must not be read."""
    made = torch.empty_strided(size, stride, dtype=dtype)
    if dtype.is_floating_point:
        return made.fill_(math.nan)
    return made if dtype == torch.bool else made.fill_(99 if dtype.itemsize < 4 else -(1 << 30))


def _convolution(x: torch.Tensor, weight: torch.Tensor, **geometry: Any) -> torch.Tensor:
    """As cuDNN gives it: channels-last if an operand lies so."""
    bias = geometry.pop("bias")
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    result = torch.ops.aten.convolution(x, weight, bias, *(geometry[name] for name in names))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
    lies = any(one.is_contiguous(memory_format=last) and not one.is_contiguous() for one in (x, weight))
    return result.contiguous(memory_format=last if lies else torch.contiguous_format)


def _check_layout(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], *_: Any) -> None:
    assert tuple(tensor.shape) == tuple(size), (tensor.shape, size)
    dense = zip(size, tensor.stride(), stride, strict=True)
    assert all(extent == 1 or one == other for extent, one, other in dense), (tensor.stride(), stride)


class _Launcher:
    """Stands for what Inductor makes of a kernel, which would be tuned: `run` launches it in blocks of one size."""

    folder = Path()
    launches: list[Launch] = []  # noqa: RUF012 (those of the step that runs)

    @classmethod
    def begin(cls, folder: str) -> list[Launch]:
        cls.folder, cls.launches = Path(folder), []
        return cls.launches

    @staticmethod
    def of(name: str, source: str) -> Any:
        module = wrapper.module(name, source, _Launcher.folder, f"from {_PATCHES} import *")
        return getattr(module, name)

    def __init__(self, **_: Any) -> None:
        self.function: Any = None

    def __call__(self, function: Any) -> _Launcher:
        self.function = function
        return self

    def run(self, *arguments: Any, stream: Any = None, **_: Any) -> None:
        names = self.function.arg_names
        given = dict(zip(names, arguments, strict=False))
        sizes = {axis: given[f"{axis}numel"] for axis in ("x", "y", "z", "r0_") if f"{axis}numel" in given}
        tiled, reduced = "YBLOCK" in names, "r0_" in sizes
        largest = {
            "XBLOCK": _LARGEST_TILE if tiled else 64 if reduced else _LARGEST_BLOCK,
            "YBLOCK": _LARGEST_TILE,
            "ZBLOCK": 1,
            "R0_BLOCK": _LARGEST_REDUCED,
        }
        blocks = {
            name: min(_power_of_two(sizes[name.removesuffix("BLOCK").lower()]), most)
            for name, most in largest.items()
            if name in names
        }
        grid = tuple(triton.cdiv(sizes[axis], blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in "xyz" if axis in sizes)
        with _Counting.launch(self.function.__name__) as launch:
            self.function[grid](*arguments, **blocks)
        self.launches.append(launch)


class _Ours:
    """Stands for a kernel of this package: its launches are counted as those of generated ones are."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*arguments: Any, **named: Any) -> None:
            with _Counting.launch(self.kernel.__name__) as launch:
                self.kernel[grid](*arguments, **named)
            _Launcher.launches.append(launch)

        return run


def _power_of_two(size: int) -> int:
    return 1 << max(0, int(size) - 1).bit_length()


class _Counting:
    """Counts the addresses that a launch reads and writes."""

    current: _Counting | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, list[Any]] = {"read": [], "written": []}

    @classmethod
    def launch(cls, name: str) -> _Counting:
        return cls(name)

    def __enter__(self) -> Launch:
        _Counting.current, self.result = self, Launch(self.name)
        return self.result

    def __exit__(self, *_: object) -> None:
        _Counting.current = None
        self.result.read, self.result.written = (_distinct(self.seen[kind]) for kind in ("read", "written"))

    @classmethod
    def note(cls, kind: str, addresses: Any, mask: Any, width: int) -> None:
        if cls.current is not None:
            places = np.unique(np.broadcast_to(addresses, np.shape(mask))[np.asarray(mask, dtype=bool)])
            cls.current.seen[kind].append((places, width))


def _distinct(seen: list[Any]) -> int:
    """Bytes at distinct addresses."""
    widths = {width for _, width in seen}
    return sum(width * len(np.unique(np.concatenate([at for at, w in seen if w == width]))) for width in widths)


def _count_bytes() -> None:
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _Counting.note("read", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8 or 1)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _Counting.note("written", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8 or 1)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store


def _round_to_bfloat16() -> None:
    """The interpreter cuts float32 off to bfloat16; a GPU rounds to nearest, ties to even."""
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32).astype(np.uint64)
        halves = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), halves).reshape(data.shape)

    interpreter._convert_float = rounded


def _welford_reduce(value: Any, mean: Any, m2: Any, weight: Any, first: Any) -> Any:
    if first:
        return value, m2 * 0.0, weight * 0.0 + 1.0
    delta, count = value - mean, weight + 1
    mean = mean + delta / count
    return mean, m2 + delta * (value - mean), count


def _welford(mean: Any, m2: Any, weight: Any, dim: Any) -> Any:
    assert dim == 1
    total = tl.sum(weight, dim)
    middle = tl.sum(mean * weight, dim) / total
    delta = mean - middle[:, None]
    return middle, tl.sum(m2 + weight * delta * delta, dim), total


def _nearbyint(x: Any) -> Any:
    whole = tl.floor(x + 0.5)
    odd = whole - 2 * tl.floor(whole * 0.5)
    return tl.where((x + 0.5 == whole) & (odd != 0), whole - 1, whole)


def _late(name: str) -> Any:
    """A function of Triton's language as it is when it is called: the interpreter replaces them."""
    return lambda x: getattr(tl, name)(x)


_HELPERS = types.SimpleNamespace(
    maximum=lambda a, b: tl.where((a > b) | (a != a), a, b),
    minimum=lambda a, b: tl.where((a < b) | (a != a), a, b),
    max2=lambda x, dim: tl.max(x, dim),
    min2=lambda x, dim: tl.min(x, dim),
    welford_reduce=_welford_reduce,
    welford=_welford,
    promote_to_tensor=lambda x: x,
)
_LIBDEVICE = types.SimpleNamespace(
    isinf=lambda x: (x == math.inf) | (x == -math.inf),
    isnan=lambda x: x != x,
    nearbyint=_nearbyint,
    rsqrt=lambda x: 1.0 / tl.sqrt(x),
    **{name: _late(name) for name in ("sqrt", "floor", "abs", "exp", "log", "cos")},
)
_HEURISTICS = types.SimpleNamespace(pointwise=_Launcher, reduction=_Launcher, persistent_reduction=_Launcher)
_PATCHES = "xconv_interpreted_helpers"


def _install() -> None:
    patches = types.ModuleType(_PATCHES)
    vars(patches).update(
        triton_helpers=_HELPERS, triton_heuristics=_HEURISTICS, libdevice=_LIBDEVICE, tl_math=_LIBDEVICE
    )
    sys.modules[_PATCHES] = patches
    for module, name in ((quantize_kernel, "quantize_kernel"), (probe_kernel, "entries_kernel")):
        setattr(module, name, _Ours(getattr(module, name)))
    _round_to_bfloat16()
    _count_bytes()


_install()
