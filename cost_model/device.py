"""What a machine sustains: memory bandwidth, arithmetic and the cost of starting a kernel.

The two defaults are generic. They rank options by time; they do not predict the time of a given machine, which
`xconv profile-machine` measures (`xconv_fx/device/rates.py` looks its numbers up). Numbers are sustained rates, a
stated fraction of the vendor's peak, because kernels of convolutional networks reach no more.

Weight gradients have rates of their own: they sum over samples and pixels into few results, which blocks and spreads
over threads less well than a forward does.

Known gaps: two rates for all convolutions of a type; no caches; float64 counts as float32; memory that the operating
system has to map first, as for tensors above some 32 MB on Linux, is written several times slower than `bandwidth`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

_HALF = ("bfloat16", "float16")
RATES = ("bandwidth", "flops32", "flops16", "weight32", "weight16")


@dataclass(frozen=True)
class DeviceSpec:
    """Sustained rates: `bandwidth` in bytes/s, read and written both counted; `flops32` and `flops16` in flop/s (a
    multiply-add counts as two), `weight32` and `weight16` the same for weight gradients of convolutions; `launch` in
    seconds a kernel. `calibrated` says that they were measured on the machine at hand."""

    name: str
    bandwidth: float
    flops32: float
    flops16: float
    weight32: float
    weight16: float
    launch: float
    calibrated: bool = False

    def __post_init__(self) -> None:
        for field in RATES:
            if not 0 < getattr(self, field) < inf:
                raise ValueError(f"device {self.name!r}: {field} {getattr(self, field)!r} is not a positive rate")
        if not 0 <= self.launch < inf:
            raise ValueError(f"device {self.name!r}: launch {self.launch!r} is not a time")

    def flops(self, dtype: str) -> float:
        """flop/s for a dtype name with or without "torch."; all but 16-bit floats count as float32."""
        return self.flops16 if _is_half(dtype) else self.flops32

    def weight_flops(self, dtype: str) -> float:
        """flop/s of a convolution's weight gradient for a dtype name, as in `flops`."""
        return self.weight16 if _is_half(dtype) else self.weight32


def _is_half(dtype: str) -> bool:
    return dtype.removeprefix("torch.") in _HALF


DEVICES = {
    spec.name: spec
    for spec in (
        # Two channels of DDR4-3200 (51 GB/s by JEDEC's data rate), of which a copy sustains about 40 %. Four AVX2 cores
        # at 3 GHz, 2 fused multiply-adds of 8 lanes a cycle: 384 Gflop/s, of which convolutions sustain about half, and
        # oneDNN's weight gradients 60 % of that. 16-bit floats are counted alike: they are faster with AVX512-BF16 or
        # AMX, and more than ten times slower without.
        DeviceSpec("cpu", bandwidth=20e9, flops32=190e9, flops16=190e9, weight32=115e9, weight16=115e9, launch=2e-6),
        # NVIDIA A100 40 GB (data sheet): 1555 GB/s, of which copies sustain about 80 %; tensor cores 156 Tflop/s in
        # TF32 (PyTorch's default for float32 convolutions) and 312 in 16 bits, of which convolutions sustain about
        # 40 %; weight gradients count alike. A launch takes some 4 microseconds when the queue runs empty.
        DeviceSpec(
            "cuda", bandwidth=1.25e12, flops32=60e12, flops16=120e12, weight32=60e12, weight16=120e12, launch=4e-6
        ),
    )
}


def device(name: str) -> DeviceSpec:
    """The default of a device type, "cuda:1" being a "cuda". Raises `ValueError` naming the choices."""
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device {name!r}: no defaults; choose from {', '.join(sorted(DEVICES))} or give a DeviceSpec")
    return DEVICES[kind]
