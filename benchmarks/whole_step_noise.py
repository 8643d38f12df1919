"""Does a plan say how noisy each layer's gradient will be? Predictions of whole plans against draws of compiled steps.

measured_noise.py looks at one layer and one tensor at a time. Here the network of examples/mnist_resnet.py, with batch
normalisation as it is and with group normalisation in its place, is trained, calibrated on a held-out batch and
compiled as each published system, as `fixed` and as xconv plans it within a share of its peak. For every convolution
and linear layer this compares what the plan predicts by these statistics, everything that is held together (codes of
its own input, and of the inputs of normalisation layers behind it), with what `gradient_check` measures on that batch.
What is measured is the mean squared error: for stochastic codecs their variance, for `fixed`, which rounds
deterministically, what it is off by. A star marks what is more than 30% of the measured off. Errors that travel from a
few channels make the first layer's draws differ by half or more: of 32 draws the mean is then uncertain by 10%.

    python benchmarks/whole_step_noise.py
    python benchmarks/whole_step_noise.py --norm group --draws 64
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness.digits import train
from harness.examples import DIGIT_RESNETS, Digits
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import xconv_fx
from xconv_fx.plan.report import read_json

GOAL = 0.3
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"codecs": name} for name in ("actnn:L1", "actnn:L2", "actnn:L3")},
    **{f"xconv{kind}": {"codecs": f"xconv{kind}", "probes": 64} for kind in ("", ":orthogonal", ":independent")},
    "fixed:4": {"codecs": "fixed:4", "mem_budget": "60%", "slices": 1},
    "all, 50%": {"mem_budget": "50%", "slices": 1},
}


def trained(data: Digits, norm: str, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model, generator = DIGIT_RESNETS[norm](), torch.Generator().manual_seed(0)
    train(model, (data.batch(generator) for _ in range(steps)), data.learning_rate)
    return model


def compared(
    model: nn.Module, stats: xconv_fx.Statistics, batch: tuple[Tensor, Tensor], options: dict[str, Any], draws: int
) -> Iterator[tuple[str, float, float]]:
    """Layer, and predicted and measured noise of its gradient over its SGD noise."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "plans.json"
        torch.compiler.reset()
        check = xconv_fx.gradient_check(
            model, F.cross_entropy, batch, {**options, "stats": stats, "report": report}, draws
        )
        predicted = dict(read_json(report)[0].layers)
    for layer in check.layers:
        if layer.layer in predicted and stats.layers[layer.layer].sgd > 0:
            # The square of the mean's error is partly chance.
            off = max(0.0, layer.bias**2 - layer.chance**2)
            measured = (layer.variance + off) * layer.norm**2 / stats.layers[layer.layer].sgd
            yield layer.layer, predicted[layer.layer], measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=list(DIGIT_RESNETS), action="append", help="default: both")
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = Digits()
    batch = data.test_images[::16], data.test_labels[::16]
    total = missed = 0
    for norm in chosen.norm or DIGIT_RESNETS:
        model = trained(data, norm, chosen.steps)
        stats = xconv_fx.calibrate(model, F.cross_entropy, [batch])
        table = Table("layer", *OPTIONS, title=f"predicted / measured noise of weight gradients, {norm} normalisation")
        cells: dict[str, dict[str, str]] = {}
        for name, options in OPTIONS.items():
            for layer, predicted, measured in compared(model, stats, batch, options, chosen.draws):
                if predicted < 1e-9:  # Held exactly, and nothing travels.
                    continue
                miss = abs(predicted - measured) > GOAL * measured
                total, missed = total + 1, missed + miss
                cells.setdefault(layer, {})[name] = f"{predicted / measured:.2f}{'*' * miss}"
        for layer, row in cells.items():
            table.add_row(layer, *(row.get(name, "") for name in OPTIONS))
        Console(width=130).print(table)
    Console().print(f"{total} predictions, {missed} beyond {GOAL:.0%}.", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
