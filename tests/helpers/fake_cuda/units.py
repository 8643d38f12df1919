"""Codec operators alone: their CUDA code, and the interpreter's run of it against the operators themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xconv_fx.ops  # noqa: F401 (defines the operators)
from xconv_fx.ops import layout

from .records import Half

ops = torch.ops.xconv


@dataclass(frozen=True)
class Unit:
    """An operator, a name of `UNITS`, on a tensor of `size` in memory `order`, in `bits` (or so many probes)."""

    name: str
    size: tuple[int, ...]
    order: tuple[int, ...]
    bits: int = 0
    dtype: str = "float32"

    def inputs(self) -> list[Tensor]:
        """What the operator reads: a tensor, and a seed."""
        torch.manual_seed(3)
        x = torch.randn(self.size).to(getattr(torch, self.dtype))
        physical = x.permute(self.order).contiguous()
        return [physical.permute(layout.inverse(self.order)), torch.tensor([-1234567890123456789])]


def _quantize(unit: Unit, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    codes, ranges = ops.quantize(x * 1.0, seed, unit.bits, list(unit.order))
    decoded = ops.dequantize(codes, ranges, list(unit.size), list(unit.order), unit.bits, x.dtype)
    return codes, ranges, decoded


def _encode(unit: Unit, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return tuple(ops.quantize(x, seed, unit.bits, list(unit.order)))


def _fold(unit: Unit, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    sums = ops.fold(x * 1.0, seed, unit.bits, list(unit.order))
    return sums, ops.unfold(sums, seed, list(unit.size), list(unit.order), x.dtype)


def _mask(unit: Unit, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    words = ops.pack_mask(x <= 0, list(unit.order))
    return words, ops.unpack_mask(words, list(unit.size), list(unit.order))


UNITS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "quantize": _quantize, "encode": _encode, "fold": _fold, "mask": _mask,
}  # fmt: skip


def generate(unit: Unit) -> Half:
    """The CUDA code of an operator alone."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from xconv_fx import hooks
    from xconv_fx.ops import lowering

    from .generate import _half, _installed

    _installed(90)
    lowering.install()
    codes: list[str] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda:0") for t in unit.inputs()]

        def function(*values: Any) -> tuple[Tensor, ...]:
            return UNITS[unit.name](unit, *values)

        gm = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
        with hooks.generated_code(codes.append), hooks.cheap_strides(True), hooks.Deferred().collect():
            compile_fx_inner(gm, fakes)
    return _half(gm, False, codes[0])


def interpret(unit: Unit, half: Half, folder: str) -> Any:
    """What the kernels compute of the unit's inputs."""
    from .interpreter import interpret_function

    return interpret_function(half, unit.inputs(), folder)


def local_memory(bits: int, capability: int) -> int:
    """Bytes of spills and stack of the kernel that reads once, for groups of 256 columns."""
    from triton.compiler import ASTSource

    from xconv_fx.ops import quantize, quantize_kernel

    from .cubins import usage

    kernel = quantize_kernel.quantize_kernel
    fraction, top = quantize.fixed_point(bits)
    constants = {
        "STREAM": quantize.STREAM, "BITS": bits, "FRACTION": fraction, "TOP": top,
        "LARGEST": torch.finfo(torch.float32).max, "ROWS": 32 // bits, "RUN": 1, "COLUMNS": 256, "BLOCK": 256,
    }  # fmt: skip
    pointers = {"x": "*fp32", "seed": "*i64", "words": "*i32", "ranges": "*fp32"}
    signature = {
        **pointers,
        **dict.fromkeys(("rows", "width", "groups"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    warps = max(4, min(16, 32 // bits * 256 // 1024))
    return usage("quantize_kernel", ASTSource(kernel, signature, places), capability, {"num_warps": warps}).local
