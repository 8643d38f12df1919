"""How fast the codecs' generated kernels are: milliseconds of encode and decode, and how many plain copies that is.

Every row is one codec on one tensor, compiled by Inductor with our lowerings. A copy is `x.clone()`; the row "negate"
is `-x` compiled by Inductor, which is what one pass over memory costs a generated kernel. A bit mask is encoded from a
comparison (`x > 0`) and decoded into the gradient it masks (`where(mask, g, 0)`), which is how masks occur. All kernels
of a tensor and its copy are timed in turn, and ratios are ratios of their medians: absolute times depend on what else
the machine does.

    python benchmarks/codecs.py --quick
    python benchmarks/codecs.py --tensor volume --codec quantize --dtype float32 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness.console import wide
from harness.malloc import keep_freed_memory
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import fresh_cache

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.measure import interleaved_times
from xconv_fx.ops import SavedAs, codec_of, fitting_probes, fixed, layout, lowering
from xconv_fx.units import format_size

CHANNELS_LAST = (0, 2, 3, 1)
FOLD = 16
# Of a normalisation whose result's sign is kept.
SHIFT = 0.3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADINGS = ("encode ms", "of a copy", "decode ms", "of a copy", "payload", "of tensor", "compile s")


@dataclass(frozen=True)
class Shape:
    """A tensor to encode. `order`: its dimensions from the outermost in memory to the innermost."""

    size: tuple[int, ...]
    order: tuple[int, ...]


# Some 30 MB each in float32, read and written: more than most caches hold. Extents of the odd ones divide by no word
# or group.
TENSORS = {
    "contiguous": Shape((16, 64, 88, 88), (0, 1, 2, 3)),
    "channels_last": Shape((16, 64, 88, 88), CHANNELS_LAST),
    "volume": Shape((2, 16, 48, 64, 72), (0, 1, 2, 3, 4)),
    "odd": Shape((13, 61, 97, 101), (0, 1, 2, 3)),
    "odd_channels_last": Shape((13, 61, 97, 101), CHANNELS_LAST),
}
QUICK = ("channels_last", "odd")

# Name, and the fields of `CodecSpec`.
CODECS: dict[str, dict[str, Any]] = {
    "bitmask": {"codec": "bitmask"},
    **{f"quantize {bits}": {"codec": "quantize", "bits": bits} for bits in (8, 4, 2, 1)},
    **{f"fixed {bits}": {"codec": "fixed", "bits": bits} for bits in (8, 4, 2)},
    "probe": {"codec": "probe", "kind": "fold"},
    **{f"probe {bits}": {"codec": "probe", "kind": "fold", "bits": bits} for bits in (4, 2)},
}


@dataclass(frozen=True)
class Kernels:
    """Compiled encode and decode of one tensor by one codec, as functions of nothing."""

    encode: Callable[[], object]
    decode: Callable[[], object]
    payload_bytes: int
    compile_seconds: float


def tensor(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Normal values that lie in memory as `shape` says."""
    return layout.to_logical(torch.randn(layout.physical_size(shape.size, shape.order)).to(dtype), shape.order)


def held_as(shape: Shape, dtype: torch.dtype, fields: dict[str, Any]) -> SavedAs:
    probes = (
        fitting_probes(shape.size, shape.order, math.prod(shape.size[1:]) // FOLD)
        if fields["codec"] == "probe"
        else None
    )
    return SavedAs(CodecSpec(probes=probes, **fields), shape.size, dtype, shape.order)


def side(held: SavedAs, seed: Tensor) -> Tensor:
    """What both directions read besides: the seed, or the scales of channels of mean 0 and deviation 1."""
    if held.spec.codec != "fixed":
        return seed
    mean = torch.zeros(1, held.size[1])
    return fixed.scales(mean, mean + 1, mean + SHIFT, mean + 1, fixed.bits_of(held))


def build(held: SavedAs, x: Tensor, seed: Tensor) -> Kernels:
    """Compiles and runs both directions once. A mask is applied to `x` itself."""
    row, seed = codec_of(held.spec.codec), side(held, seed)

    def encode(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        if held.spec.codec == "fixed":
            return fixed.encode(x, seed, held, x + SHIFT > 0)
        return row.encode(x > 0 if held.spec.codec == "bitmask" else x, seed, held)

    def decode(payload: tuple[Tensor, ...], seed: Tensor, gradient: Tensor) -> Tensor:
        decoded = row.decode(payload, seed, held)
        return torch.where(decoded, gradient, 0) if held.spec.codec == "bitmask" else decoded

    torch._dynamo.reset()
    fast_encode, fast_decode = (torch.compile(function, dynamic=False, fullgraph=True) for function in (encode, decode))
    started = time.perf_counter()
    payload: Any = fast_encode(x, seed)
    fast_decode(payload, seed, x)
    return Kernels(
        encode=lambda: fast_encode(x, seed),
        decode=lambda: fast_decode(payload, seed, x),
        payload_bytes=sum(part.nbytes for part in payload),
        compile_seconds=time.perf_counter() - started,
    )


def time_tensor(name: str, dtype: torch.dtype, codecs: list[str], repeats: int, table: Table) -> None:
    """Adds the rows of one tensor."""
    torch.manual_seed(0)
    shape, seed = TENSORS[name], torch.tensor([1234567890123456789])
    x = tensor(shape, dtype)
    kernels = {label: build(held_as(shape, dtype, CODECS[label]), x, seed) for label in codecs}
    negate = torch.compile(torch.neg, dynamic=False)
    functions: dict[str, Callable[[], object]] = {"copy": x.clone, "negate": lambda: negate(x)}
    for label, both in kernels.items():
        functions |= {f"{label} encode": both.encode, f"{label} decode": both.decode}
    seconds = interleaved_times(functions, repeats=repeats)
    what = (name, "x".join(map(str, shape.size)), str(dtype).removeprefix("torch."))
    table.add_section()
    for label in ("copy", "negate"):
        ratio = seconds[label] / seconds["copy"]
        table.add_row(label, *what, "", "", f"{seconds[label] * 1e3:.2f}", f"{ratio:.2f}", format_size(x.nbytes))
    for label, both in kernels.items():
        times = [seconds[f"{label} {way}"] for way in ("encode", "decode")]
        cells = [cell for taken in times for cell in (f"{taken * 1e3:.2f}", f"{taken / seconds['copy']:.2f}")]
        share = f"1/{x.nbytes / both.payload_bytes:.1f}"
        table.add_row(label, *what, *cells, format_size(both.payload_bytes), share, f"{both.compile_seconds:.1f}")


def empty_table(threads: int) -> Table:
    capability = torch.backends.cpu.get_cpu_capability()
    title = f"Codec kernels, {threads} thread{'s' * (threads > 1)}, {capability}, probes fold {FOLD} elements"
    table = Table(title=title, title_justify="left")
    for heading in ("codec", "tensor", "size", "dtype"):
        table.add_column(heading)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tensor", action="append", choices=TENSORS, help="may be given several times; default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given several times; default: all")
    parser.add_argument("--codec", action="append", choices=CODECS, help="may be given several times; default: all")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of the generated kernels; default: 1")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of which the medians are taken; default: 15")
    parser.add_argument("--quick", action="store_true", help=f"float32 only, and only {' and '.join(QUICK)}")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()
    lowering.install()
    tensors = chosen.tensor or (QUICK if chosen.quick else tuple(TENSORS))
    dtypes = chosen.dtype or (["float32"] if chosen.quick else list(DTYPES))
    console = wide(160)
    table = empty_table(chosen.threads)
    # Inductor's caches do not know the sources of our lowerings.
    with fresh_cache():
        for name in tensors:
            for dtype in dtypes:
                time_tensor(name, DTYPES[dtype], chosen.codec or list(CODECS), chosen.repeats, table)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
