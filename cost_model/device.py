"""What a machine sustains: memory bandwidth, arithmetic and the cost of starting a kernel.

The two defaults are generic. They rank options by time; they do not predict the time of a given machine. Numbers are
sustained rates, a stated fraction of the vendor's peak, because kernels of convolutional networks reach no more.

Known gaps: one rate for all kernels of a type; no caches; float64 counts as float32.
"""

from __future__ import annotations

from dataclasses import dataclass

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class DeviceSpec:
    """Sustained rates: `bandwidth` in bytes/s, `flops32` and `flops16` in flop/s (a multiply-add counts as two),
    `launch` in seconds a kernel."""

    name: str
    bandwidth: float
    flops32: float
    flops16: float
    launch: float

    def __post_init__(self) -> None:
        for field in ("bandwidth", "flops32", "flops16"):
            if not getattr(self, field) > 0:
                raise ValueError(f"device {self.name!r}: {field} {getattr(self, field)!r} is not a positive rate")
        if not self.launch >= 0:
            raise ValueError(f"device {self.name!r}: launch {self.launch!r} is negative")

    def flops(self, dtype: str) -> float:
        """flop/s for a dtype name with or without "torch."; all but 16-bit floats count as float32."""
        return self.flops16 if dtype.removeprefix("torch.") in _HALF else self.flops32


DEVICES = {
    spec.name: spec
    for spec in (
        # Two channels of DDR4-3200 (51 GB/s by JEDEC's data rate), of which a copy sustains about 40 %. Four AVX2 cores
        # at 3 GHz, 2 fused multiply-adds of 8 lanes a cycle: 384 Gflop/s, of which convolutions sustain about half.
        # Without AMX or AVX512-BF16, 16-bit floats are computed in float32.
        DeviceSpec("cpu", bandwidth=20e9, flops32=190e9, flops16=190e9, launch=2e-6),
        # NVIDIA A100 40 GB (data sheet): 1555 GB/s, of which copies sustain about 80 %; tensor cores 156 Tflop/s in
        # TF32 (PyTorch's default for float32 convolutions) and 312 in 16 bits, of which convolutions sustain about
        # 40 %. A launch takes some 4 microseconds when the queue runs empty.
        DeviceSpec("cuda", bandwidth=1.25e12, flops32=60e12, flops16=120e12, launch=4e-6),
    )
}


def device(name: str) -> DeviceSpec:
    """The default of a device type, "cuda:1" being a "cuda". Raises `ValueError` naming the choices."""
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device {name!r}: no defaults; choose from {', '.join(sorted(DEVICES))} or give a DeviceSpec")
    return DEVICES[kind]
