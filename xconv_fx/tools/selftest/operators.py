"""Every operator on the device, eagerly and in generated kernels, against the reference on the CPU.

Words of codes and masks must be equal. What is decoded is decoded from the reference's payload, and may differ in the
last place. Sums are added up in another order, so that those of probes are compared by their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import SavedAs, codec_of, fixed, layout, lowering

from .result import Finding

# Channels-last images with awkward rows, and volumes.
IMAGE, VOLUME = ((4, 24, 15, 13), (0, 2, 3, 1)), ((2, 8, 6, 7, 10), (0, 1, 2, 3, 4))
# How far sums may be off, relative to the largest of them.
SUMS = 1e-5


@dataclass(frozen=True)
class Case:
    """A codec for a tensor of a size, an order in memory and a type."""

    spec: CodecSpec
    size: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @property
    def held(self) -> SavedAs:
        return SavedAs(self.spec, self.size, self.dtype, self.order)

    def __str__(self) -> str:
        spec = self.spec
        name = ":".join(str(part) for part in (spec.codec, spec.kind, spec.bits, spec.by_sample) if part)
        return f"{name}-{len(self.size) - 2}d-{str(self.dtype).removeprefix('torch.')}"


_SPECS = (
    CodecSpec("bitmask"),
    *(CodecSpec("quantize", bits=bits) for bits in (8, 4, 2, 1)),
    CodecSpec("quantize", bits=2, by_sample="mixed"),
    *(CodecSpec("fixed", bits=bits) for bits in (8, 4, 2)),
    CodecSpec("probe", probes=56, kind="fold", means=True),
    CodecSpec("probe", probes=56, kind="fold", bits=4),
    *(CodecSpec("probe", probes=8, kind=kind) for kind in ("gaussian", "rademacher", "orthogonal")),
)
_TYPES = ((IMAGE, torch.float32), (IMAGE, torch.bfloat16), (VOLUME, torch.float32))
CASES = tuple(
    Case(spec, size, order, torch.bool if spec.codec == "bitmask" else dtype)
    for spec in _SPECS
    for (size, order), dtype in _TYPES
    if spec.codec != "bitmask" or dtype is torch.float32
)


def check(case: Case, device: str) -> Finding:
    """Encode and decode on the device; on the CPU what is generated alone, for the rest is the reference itself."""
    lowering.install()
    x, seed = _tensor(case), _seed(case)
    payload = _encode(case, x, seed)
    decoded = _decode(case, payload, seed)
    there = [value.to(device) for value in (x, seed, *payload)]
    faults: list[str] = []
    numbers: dict[str, float] = {}
    for way in ("compiled",) if device == "cpu" else ("eager", "compiled"):
        encode, decode = _compiled() if way == "compiled" else (_encode, _decode)
        found = [part.cpu() for part in encode(case, *there[:2])]
        ulps = _ulps(decode(case, tuple(there[2:]), there[1]).cpu(), decoded)
        unequal, off = _unequal(found, payload), _sums_off(found, payload)
        numbers |= {f"{way}: unequal words": unequal, "sums off": off, "ulps of what is decoded": ulps}
        faults += [f"{way}: {unequal:.2g} of the words are not those of the CPU"] if unequal else []
        faults += [f"{way}: sums are off by {off:.2g}"] if not off <= SUMS else []
        faults += [f"{way}: decoded values are off by {ulps:g} ulps"] if not ulps <= _allowed(case) else []
    return Finding(off="; ".join(faults), numbers=numbers)


def _compiled() -> tuple[Any, Any]:
    return torch.compile(_encode, dynamic=False), torch.compile(_decode, dynamic=False)


def _allowed(case: Case) -> float:
    """Units in the last place: products of matrices are added up in any order."""
    dense = case.spec.codec == "probe" and case.spec.kind != "fold"
    return 4096.0 if dense and case.dtype is torch.float32 else 1.0


def _tensor(case: Case) -> Tensor:
    physical = torch.randn(layout.physical_size(case.size, case.order))
    x = layout.to_logical(physical.to(torch.float32 if case.dtype is torch.bool else case.dtype), case.order)
    return x > 0.3 if case.dtype is torch.bool else x


def _seed(case: Case) -> Tensor:
    """A seed, or the table that fixed point reads in its place."""
    if case.spec.codec != "fixed":
        return torch.tensor([20261130])
    channels = torch.linspace(0.5, 1.5, case.size[1])
    return fixed.scales(channels[None] - 1, channels[None], None, None, case.spec.bits or 0)


def _encode(case: Case, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return codec_of(case.spec.codec).encode(x, seed, case.held)


def _decode(case: Case, payload: tuple[Tensor, ...], seed: Tensor) -> Tensor:
    return codec_of(case.spec.codec).decode(payload, seed, case.held)


def _unequal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The share of words that differ."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if not a.is_floating_point()]
    count = sum(b.numel() for _, b in pairs)
    return sum(int((a != b).sum()) for a, b in pairs) / max(count, 1)


def _sums_off(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far sums and ranges are off at most, relative to the largest."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a.is_floating_point()]
    return max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs), default=0.0)


def _ulps(found: Tensor, expected: Tensor) -> float:
    """The largest difference in units in the last place; infinite where one is no number and the other is."""
    if found.dtype is torch.bool:
        return 0.0 if torch.equal(found, expected) else float("inf")
    step = torch.finfo(found.dtype).eps * torch.maximum(found.double().abs(), expected.double().abs())
    difference = (found.double() - expected.double()).abs()
    return float((difference / step.clamp(min=1e-30)).where(difference > 0, 0.0).nan_to_num(nan=float("inf")).max())
