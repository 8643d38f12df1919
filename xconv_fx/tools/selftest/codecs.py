"""How long generated kernels take to encode and to decode, as a share of the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.measure import interleaved_times
from xconv_fx.ops import SavedAs, codec_of, lowering

from .result import Finding

# Images, channels-last: 4 MB, which a CPU's caches hold, and 256 MB.
SIZES = {"cpu": (4, 64, 64, 64), "cuda": (64, 64, 128, 128)}
ORDER = (0, 2, 3, 1)


@dataclass(frozen=True)
class Case:
    """A codec for a tensor in single precision."""

    name: str
    spec: CodecSpec

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("bitmask", CodecSpec("bitmask")),
    *(Case(f"quantize{bits}", CodecSpec("quantize", bits=bits)) for bits in (8, 4, 2)),
    Case("fold", CodecSpec("probe", probes=1024, kind="fold")),
    Case("fold4", CodecSpec("probe", probes=4096, kind="fold", bits=4, means=True)),
)


def check(case: Case, device: str) -> Finding:
    """Nothing of this is off; a share far below one is what to look at."""
    lowering.install()
    size = SIZES[device]
    x: Any = torch.randn(size, device=device).to(memory_format=torch.channels_last)
    target, seed = torch.empty_like(x), torch.tensor([7], device=device)
    copied = x.clone()
    if case.spec.codec == "bitmask":
        x = x > 0
    held, codec = SavedAs(case.spec, size, x.dtype, ORDER), codec_of(case.spec.codec)
    encode = torch.compile(lambda x, seed: codec.encode(x, seed, held), dynamic=False)
    decode = torch.compile(lambda payload, seed: codec.decode(payload, seed, held), dynamic=False)
    payload = encode(x, seed)
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(copied),
        "encode": lambda: encode(x, seed),
        "decode": lambda: decode(payload, seed),
    }
    times = interleaved_times(functions, repeats=7)
    bandwidth = 2 * copied.nbytes / times["copy"]
    moved = x.nbytes + sum(part.nbytes for part in payload)
    shares = {f"{way}: share of a copy's bandwidth": moved / times[way] / bandwidth for way in ("encode", "decode")}
    return Finding(numbers={**shares, "copy, bytes/s": bandwidth, "payload": moved - x.nbytes})
