"""What is asked of a fake CUDA device, and what it answers: values that are sent between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.plan import Plan


@dataclass(frozen=True)
class Case:
    """A step to generate code for: a network of `nets.NETS`, and options of the backend as (name, value).

    `force` is how every residual is held for which there is a candidate of that codec, bits, probes and kind (None: as
    planned under the options). `amp` is the dtype of autocast. With `slices`, so many micro-batches, `held` of them.
    """

    net: str
    options: tuple[tuple[str, Any], ...] = ()
    force: CodecSpec | None = None
    amp: str | None = None
    slices: int = 1
    held: int = 0
    channels_last: bool = False

    @property
    def label(self) -> str:
        """A short name for tables."""
        parts = [self.net, *(f"{name}={value}" for name, value in self.options if name != "codecs" or not self.force)]
        if self.force is not None:
            spec = self.force
            parts.append(f"{spec.kind or spec.codec}{spec.bits or ''}{'-means' if spec.means else ''}")
        parts += [self.amp] if self.amp else []
        parts += [f"{self.slices} slices"] if self.slices > 1 else []
        return " ".join(parts + ["channels-last"] * self.channels_last)


@dataclass(frozen=True)
class Value:
    """A tensor that a half takes: its name, and how it lies in memory; a number where `number` is given."""

    name: str
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    number: Any = None


@dataclass(frozen=True)
class Half:
    """Forward or backward: the graph that Inductor was given, as code, what it takes and gives, and Inductor's code.

    A result that is no tensor has the name "".
    """

    is_backward: bool
    graph: str
    takes: tuple[Value, ...]
    gives: tuple[str, ...]
    code: str


@dataclass(frozen=True)
class Generated:
    """A case's step: both halves, its plan, and its peaks in bytes by phase as audited and as predicted."""

    case: Case
    halves: tuple[Half, ...]
    plan: Plan | None
    audited: dict[str, int]
    predicted: dict[str, int]
    seconds: float
    results: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def forward(self) -> Half:
        return self.halves[0]

    @property
    def backward(self) -> Half:
        return self.halves[1]


@dataclass(frozen=True)
class Cubin:
    """What a kernel takes on a GPU of a compute capability: registers a thread, bytes of local memory (spills and
    stack) and of shared memory, and the divisions of its PTX."""

    kernel: str
    capability: int
    registers: int
    local: int
    shared: int
    divisions: tuple[str, ...]
