"""Plans for a GPU that is not there, against the audit of the CUDA code that Inductor generates for them.

    python benchmarks/cuda_audit.py [NETWORK ...]

For each of the networks that peers train: what `xconv plan --device cuda` predicts, and what the audit counts in code
that is generated on a device that is not there (`tests/helpers/fake_cuda`), of the plain step and of the plan within a
budget, which is read from the file of `--json`. The plan is made of tensors of a CPU, the code of tensors of CUDA. Both
count blocks of the caching allocator, and cuDNN's workspaces as they are assumed to be, by the same rules: what these
are on a GPU is no part of this. Needs triton and g++; takes some minutes. Exits with 1 where one is more than 3% off.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.console import wide
from nets import PEER_NETS
from rich.table import Table

from xconv_fx.plan import Totals
from xconv_fx.plan.report import write_json
from xconv_fx.step.explain import explain

TESTS = Path(__file__).parents[1] / "tests"
# The budget, of the plain step's peak, and how far a prediction may be from its audit.
SHARE, CLOSE = 0.65, 0.03


@dataclass(frozen=True)
class Row:
    """A step of a network: its peak as predicted and as audited, in bytes."""

    net: str
    step: str
    predicted: int
    audited: int

    @property
    def off(self) -> float:
        return self.predicted / self.audited - 1


def audited(name: str, options: dict[str, Any]) -> int:
    """The audited peak of a network's step under these options; for the process that has the device."""
    from helpers.fake_cuda import nets
    from helpers.fake_cuda.generate import generate
    from helpers.fake_cuda.records import Case

    net = PEER_NETS[name]
    nets.NETS[name] = nets.Net(net.build, net.input_shape)
    return max(generate(Case(name, tuple(options.items()))).audited.values())


def rows(name: str, worker: Any, folder: Path) -> Iterator[Row]:
    """The plain step, and the one within a budget."""
    net = PEER_NETS[name]
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = net.build(), torch.zeros(net.input_shape)
    plain = Totals.of(explain(model, x, device="cuda").plans).peak
    yield Row(name, "plain", plain, worker.call("cuda_audit:audited", name, {"mem_budget": 10 * plain}))
    found = explain(model, x, device="cuda", mem_budget=round(SHARE * plain), codecs="exact").plans
    path = folder / f"{name}.json"
    write_json(found, path)
    predicted = Totals.of(found).peak
    options = {"plan": str(path), "mem_budget": 10 * plain}
    yield Row(name, f"exact at {SHARE:.0%}", predicted, worker.call("cuda_audit:audited", name, options))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(PEER_NETS), help=f"of {', '.join(PEER_NETS)}")
    names = parser.parse_args().networks
    sys.path.append(str(TESTS))
    from helpers.fake_cuda import shim
    from helpers.fake_cuda.worker import Worker

    table = Table(title="Peaks on CUDA, in MB")
    table.add_column("network")
    for heading in ("step", "predicted", "audited", "off"):
        table.add_column(heading, justify="right")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(TESTS), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        worker = Worker(Path(folder), shim.build(Path(folder)), {"PYTHONPATH": path})
        for name in names:
            for row in rows(name, worker, Path(folder)):
                worst = max(worst, abs(row.off))
                sizes = [f"{size / 1e6:.1f}" for size in (row.predicted, row.audited)]
                table.add_row(row.net, row.step, *sizes, f"{row.off:+.1%}")
        worker.close()
    wide().print(table)
    return int(worst > CLOSE)


if __name__ == "__main__":
    raise SystemExit(main())
