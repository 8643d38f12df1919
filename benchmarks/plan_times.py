"""What planning costs: `python benchmarks/plan_times.py` prints the CPU seconds of `xconv plan`, process included.

Large networks, as they are trained, none of which is allocated. "First" is a process that finds nothing of ours on
disk, "second" one after it, which knows what library calls allocate (`xconv_fx/device/known_scratch.py`) but plans
anew. The parts of the first are imports and building the network, tracing (Dynamo and AOTAutograd), library calls that
are made to see what they allocate, and the rest: analyses and the solver.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import records
from harness.clock import Clock
from harness.console import wide
from nets import Logits, plain_unet
from rich.table import Table
from torch import nn

SOURCES = ("benchmarks/plan_times.py",)
PARTS = ("imports, building", "tracing", "library calls", "analyses, solver")
BUDGET = "50%"


def resnet50() -> nn.Module:
    """ResNet-50 (arXiv 1512.03385) from transformers."""
    return _resnet([3, 4, 6, 3])


def resnet152() -> nn.Module:
    """ResNet-152 (arXiv 1512.03385) from transformers."""
    return _resnet([3, 8, 36, 3])


def _resnet(depths: list[int]) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=1000)))


def nnunet3d() -> nn.Module:
    """nnU-Net's PlainConvUNet in 3D, as it is configured for patches of 128^3."""
    return plain_unet(nn.Conv3d, nn.InstanceNorm3d, features=(32, 64, 128, 256, 320, 320), classes=3)


def monai_unet3d() -> nn.Module:
    """MONAI's residual 3D U-Net with five levels, as in its tutorials on the spleen."""
    from monai.networks.nets import UNet

    return UNet(3, 1, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


INPUTS = {
    "monai_unet3d": "2x1x128x128x128",
    "nnunet3d": "2x1x128x128x128",
    "resnet50": "64x3x224x224",
    "resnet152": "256x3x224x224",
}


@dataclass(frozen=True)
class Record:
    """CPU seconds of a first process, by part, and of a second one."""

    net: str
    parts: dict[str, float]
    second: float
    commit: str
    torch: str
    options: dict[str, Any]

    @property
    def first(self) -> float:
        return sum(self.parts.values())


def one(net: str) -> dict[str, float]:
    """What this process needs to plan a network, by part."""
    import torch._functorch.aot_autograd as aot

    from xconv_fx.cli import main
    from xconv_fx.device import scratch
    from xconv_fx.step import explain

    clock = Clock()
    clock.watch(aot, "create_aot_state", "tracing")
    clock.watch(aot, "aot_stage1_graph_capture", "tracing")
    clock.watch(scratch, "_made", "library calls")
    clock.watch(explain, "_plan_together", "analyses, solver")
    clock.watch(explain.FakeTrainingStep, "graphs", "tracing")
    target = f"{Path(__file__).resolve()}:{net}"
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["plan", target, "--input", INPUTS[net], "--budget", BUDGET])
    if code:
        raise RuntimeError(f"xconv plan ended with {code}")
    used = resource.getrusage(resource.RUSAGE_SELF)
    parts = {part: clock.spent[part] for part in PARTS[1:]}
    parts[PARTS[0]] = used.ru_utime + used.ru_stime - sum(clock.spent.values())
    return parts


def measured(net: str, cache: str) -> dict[str, float]:
    """The same of a process of its own, with our cache in this folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XCONV_FX_CACHE": cache}
    command = [sys.executable, "-W", "ignore", __file__, "--one", net]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measurements(nets: Sequence[str]) -> Iterator[Record]:
    """Of each network in turn."""
    made_by = records.made_by({"budget": BUDGET}, *SOURCES)
    for net in nets:
        with tempfile.TemporaryDirectory() as cache:
            yield Record(net, measured(net, cache), sum(measured(net, cache).values()), **made_by)


def newest(results: Path) -> list[Record]:
    """What is known of each network."""
    found = records.latest(results, "net")
    return [Record(**found[net]) for net in INPUTS if net in found]


def table(found: Sequence[Record]) -> Table:
    rows = Table("network", "input", "first", *PARTS, "second")
    for record in found:
        parts = (f"{record.parts[part]:.1f}" for part in PARTS)
        rows.add_row(record.net, INPUTS[record.net], f"{record.first:.1f} s", *parts, f"{record.second:.1f} s")
    return rows


def readme(results: Path) -> str | None:
    """README's table; None before all is known."""
    found = newest(results)
    if len(found) < len(INPUTS):
        return None
    lines = ["| network, input | first process | of that tracing | second process |", "|---|---|---|---|"]
    lines += [
        f"| {r.net}, {INPUTS[r.net]} | {r.first:.0f} s | {r.parts['tracing']:.0f} s | {r.second:.0f} s |" for r in found
    ]
    return "\n".join(lines)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--nets", nargs="*", default=list(INPUTS), choices=list(INPUTS))
    records.add_arguments(parse, __file__)
    parse.add_argument("--one", choices=list(INPUTS), help="measure in this process, and print JSON")
    given = parse.parse_args()
    if given.one:
        print(json.dumps(one(given.one)))
        return
    found = newest(given.results) if given.report else list[Record]()
    for record in [] if given.report else measurements(given.nets):
        records.append(given.results, asdict(record))
        found.append(record)
    wide(140).print(table(found))


if __name__ == "__main__":
    main()
