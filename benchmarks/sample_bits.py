"""What do codes of another width for each sample gain, at equal bytes? Measured on networks that read digits.

ActNN (Chen et al., ICML 2021, section 4.2) shares bits out among samples as well as layers. The preset `actnn:L3` does
so in every step: by the ranges of the samples' values, and by their gradients where `xconv_fx.SampleGradients` has
noted them, here in the last epoch. For the network of examples/mnist_resnet.py, with batch normalisation as it is and
with group normalisation in its place, trained for some epochs, this prints the variance that codes of 2 bits on average
add to the gradient of a batch, relative to the gradient's energy, when samples have

    equal      equal widths (`sample_bits=False`)
    ranges     widths by ranges
    gradients  widths by ranges and last epoch's gradients

as means over batches, and the latter two relative to the first (mean and standard error over batches). Group
normalisation computes samples apart; batch normalisation mixes them, and leaves less to gain. All three hold the same
number of bits; `bytes` is what is held, relative to equal widths.

    python benchmarks/sample_bits.py
    python benchmarks/sample_bits.py --epochs 6 --batches 16
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import xconv_fx
from xconv_fx.report import read_json

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from mnist_resnet import BATCH, Digits, build

GROUPS = 8


def in_groups(model: nn.Module) -> nn.Module:
    """The network with group in the place of batch normalisation."""
    for name, child in model.named_children():
        norm = nn.GroupNorm(GROUPS, child.num_features) if isinstance(child, nn.BatchNorm2d) else child
        setattr(model, name, in_groups(norm))
    return model


@dataclass(frozen=True)
class Way:
    """The network under the preset: how it runs, and how many bytes it holds."""

    run: nn.Module
    held: Callable[[], int]

    @staticmethod
    def of(model: nn.Module, folder: Path, sample_bits: bool) -> Way:
        report = folder / f"{sample_bits}.json"
        options = {"codecs": "actnn:L3", "sample_bits": sample_bits, "report": report}
        run = torch.compile(model, backend="xconv", options=options)
        return Way(run, lambda: sum(plan.saved_after for plan in read_json(report)))  # type: ignore[arg-type]


def gradient(run: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    run.zero_grad(set_to_none=True)
    F.cross_entropy(run(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in run.parameters() if p.grad is not None])


def train(way: Way, data: Digits, seen: xconv_fx.SampleGradients, epochs: int) -> None:
    optimiser = torch.optim.Adam(way.run.parameters(), lr=data.learning_rate)
    for _ in range(epochs):
        for indices in torch.randperm(len(data.train_images)).split(BATCH)[:-1]:
            with seen.batch(indices):
                gradient(way.run, data.train_images[indices], data.train_labels[indices])
            optimiser.step()


def variances(
    ways: dict[str, Way], model: nn.Module, data: Digits, seen: xconv_fx.SampleGradients, draws: int
) -> dict[str, float]:
    """Of one batch's gradient, relative to its energy, by how samples share bits."""
    indices = torch.randperm(len(data.train_images))[:BATCH]
    batch = data.train_images[indices], data.train_labels[indices]
    exact, noted = gradient(model, *batch), seen.squares.clone()

    def drawn(run: nn.Module) -> float:
        return statistics.mean(float((gradient(run, *batch) - exact).square().sum()) for _ in range(draws))

    found = {"equal": drawn(ways["equal"].run), "ranges": drawn(ways["shared"].run)}
    losses = []
    for _ in range(draws):
        with seen.batch(indices):
            losses.append(float((gradient(ways["shared"].run, *batch) - exact).square().sum()))
        # What this step noted is not known in training.
        seen.squares.copy_(noted)
    found["gradients"] = statistics.mean(losses)
    return {name: value / float(exact.square().sum()) for name, value in found.items()}


def relative(found: list[dict[str, float]], name: str) -> str:
    ratios = [each[name] / each["equal"] for each in found]
    return f"{statistics.mean(ratios):.2f} ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.2f}"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--epochs", type=int, default=4)
    parse.add_argument("--batches", type=int, default=8)
    parse.add_argument("--draws", type=int, default=16)
    chosen = parse.parse_args()
    torch.set_num_threads(1)
    data, table = (
        Digits(),
        Table("normalisation", "accuracy", "bytes", "equal", "ranges", "gradients", "by ranges", "by gradients"),
    )
    for norm, change in (("batch", lambda model: model), ("group", in_groups)):
        torch.manual_seed(0)
        model, seen = change(build()), xconv_fx.SampleGradients(len(data.train_images))
        with tempfile.TemporaryDirectory() as folder:
            ways = {"equal": Way.of(model, Path(folder), False), "shared": Way.of(model, Path(folder), True)}
            train(ways["shared"], data, seen, chosen.epochs)
            found = [variances(ways, model, data, seen, chosen.draws) for _ in range(chosen.batches)]
            share = ways["shared"].held() / ways["equal"].held()
        means = [f"{statistics.mean(each[name] for each in found):.3g}" for name in ("equal", "ranges", "gradients")]
        model.eval()
        accuracy = data.score(model)["accuracy"]
        table.add_row(
            norm, f"{accuracy:.3f}", f"{share:.3f}", *means, relative(found, "ranges"), relative(found, "gradients")
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
