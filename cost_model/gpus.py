"""GPUs by name, with the numbers that NVIDIA publishes of them: what a plan for a GPU that is not there is made for.

Memory, bandwidth and *dense* rates: where a data sheet gives tensor core rates with 2:4 sparsity, half of that is
listed. float32 means what cuDNN uses for float32 convolutions, PyTorch's default: TF32 tensor cores, and plain float32
units before Ampere. 16-bit rates are those with float32 accumulation.

Sources, all by NVIDIA: data sheets "Tesla V100" (2020), "T4" (2019), "A100" (80 GB: 2021, 40 GB: 2020), "A10" (2021),
"A30" (2022), "A40" (2021), "L4" (2023), "L40S" (2023), "H100" (2023), "H200" (2024); for RTX A6000 and GeForce 3090 the
"Ampere GA102 GPU Architecture" white paper (2021), for GeForce 4090 and RTX 6000 Ada the "Ada GPU Architecture" (2023),
for GeForce 5090 the "RTX Blackwell GPU Architecture" (2025).

Known gaps: clocks under load, power limits and caches are left out, and so is what ECC takes of GDDR memory. A gigabyte
of memory is 10^9 bytes here, as it is printed; the boards with HBM have somewhat more.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import DEVICES, DeviceSpec

GB = 10**9
# What kernels of convolutional networks sustain of a data sheet's numbers, as in `device.py`.
OF_BANDWIDTH = 0.8
OF_RATE = 0.4


@dataclass(frozen=True)
class Gpu:
    """A data sheet: `memory` in bytes, `bandwidth` in bytes/s, dense `flops32` and `flops16` in flop/s.

    `bfloat16` says whether `flops16` goes for bfloat16 as well, or for float16 alone.
    """

    name: str
    memory: int
    bandwidth: float
    flops32: float
    flops16: float
    bfloat16: bool = True

    def spec(self) -> DeviceSpec:
        """The sustained rates that times are predicted with."""
        flops32, flops16 = OF_RATE * self.flops32, OF_RATE * self.flops16
        launch = DEVICES["cuda"].launch
        return DeviceSpec("cuda", OF_BANDWIDTH * self.bandwidth, flops32, flops16, flops32, flops16, launch)


def _gpu(name: str, gigabytes: int, gigabytes_per_s: int, tera32: float, tera16: float, bfloat16: bool = True) -> Gpu:
    return Gpu(name, gigabytes * GB, gigabytes_per_s * 1e9, tera32 * 1e12, tera16 * 1e12, bfloat16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        #                GB   GB/s  float32 16 bits
        _gpu("v100", 32, 900, 15.7, 125, bfloat16=False),
        _gpu("v100-16gb", 16, 900, 15.7, 125, bfloat16=False),
        _gpu("t4", 16, 300, 8.1, 65, bfloat16=False),
        _gpu("a100", 80, 2039, 156, 312),
        _gpu("a100-40gb", 40, 1555, 156, 312),
        _gpu("a10", 24, 600, 62.5, 125),
        _gpu("a30", 24, 933, 82, 165),
        _gpu("a40", 48, 696, 74.8, 149.7),
        _gpu("a6000", 48, 768, 77.4, 154.8),
        _gpu("l4", 24, 300, 60, 121),
        _gpu("l40s", 48, 864, 183, 362),
        _gpu("h100", 80, 3350, 494.5, 989.5),
        _gpu("h100-pcie", 80, 2000, 378, 756.5),
        _gpu("h200", 141, 4800, 494.5, 989.5),
        _gpu("rtx3090", 24, 936, 35.6, 71),
        _gpu("rtx4090", 24, 1008, 82.6, 165.2),
        _gpu("rtx5090", 32, 1792, 104.8, 209.5),
        _gpu("rtx6000-ada", 48, 960, 182.1, 364.2),
    )
}
