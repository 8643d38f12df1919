"""What do codes of another width for each sample gain, at equal bytes? Measured on networks that read digits.

ActNN (Chen et al., ICML 2021, section 4.2) shares bits out among samples as well as layers. The preset `actnn:L3` does
so in every step: by the ranges of the samples' values, and by their gradients where `xconv_fx.SampleGradients` has
noted them, here in the last epoch. For the network of examples/mnist_resnet.py, with batch normalisation as it is and
with group normalisation in its place, trained for some epochs, this prints the variance that codes of 2 bits on average
add to the gradient of a batch, relative to the gradient's energy, when samples have

    equal      equal widths (`sample_bits=False`)
    ranges     widths by ranges
    gradients  widths by ranges and last epoch's gradients

over all of the gradient, and the latter two relative to the first: in the whole gradient, and in that of the median
layer (means and standard errors over batches). Layers of 1 bit have nothing to share out; where one of them is the
noisiest, the whole does not show what the others gain. Group normalisation computes samples apart; batch normalisation
mixes them, and leaves less to gain. All three hold the same number of bits; `bytes` is what is held, relative to equal
widths.

    python benchmarks/sample_bits.py
    python benchmarks/sample_bits.py --epochs 4 --batches 16
"""

from __future__ import annotations

import argparse
import contextlib
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
from xconv_fx.plan.report import read_json

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


def gradient(run: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the weights of convolutions and linear layers."""
    run.zero_grad(set_to_none=True)
    F.cross_entropy(run(images), labels).backward()
    return [p.grad for p in run.parameters() if p.grad is not None and p.dim() > 1]


def train(way: Way, data: Digits, seen: xconv_fx.SampleGradients, epochs: int) -> None:
    optimiser = torch.optim.Adam(way.run.parameters(), lr=data.learning_rate)
    for _ in range(epochs):
        for indices in torch.randperm(len(data.train_images)).split(BATCH)[:-1]:
            with seen.batch(indices):
                gradient(way.run, data.train_images[indices], data.train_labels[indices])
            optimiser.step()


def variances(
    ways: dict[str, Way], model: nn.Module, data: Digits, seen: xconv_fx.SampleGradients, draws: int
) -> dict[str, Tensor]:
    """Of one batch's gradient, for each layer, by how samples share bits; relative to the energy of all of it."""
    indices = torch.randperm(len(data.train_images))[:BATCH]
    batch = data.train_images[indices], data.train_labels[indices]
    exact, noted = gradient(model, *batch), seen.squares.clone()
    energy = sum(float(layer.square().sum()) for layer in exact)

    def drawn(way: str, known: bool) -> Tensor:
        losses = []
        for _ in range(draws):
            with seen.batch(indices) if known else contextlib.nullcontext():
                found = gradient(ways[way].run, *batch)
            # What this step notes is not known in training.
            seen.squares.copy_(noted)
            losses.append([float((one - true).square().sum()) / energy for one, true in zip(found, exact, strict=True)])
        return torch.tensor(losses).mean(0)

    return {
        "equal": drawn("equal", False),
        "ranges": drawn("shared", False),
        "gradients": drawn("shared", True),
    }


def relative(found: list[dict[str, Tensor]], name: str) -> list[str]:
    """What is left of the variance of equal widths: of the whole gradient, and of the median layer's."""
    whole = torch.stack([each[name].sum() / each["equal"].sum() for each in found])
    layers = torch.stack([(each[name] / each["equal"])[each["equal"] > 1e-9].median() for each in found])
    return [f"{value.mean():.2f} ± {value.std() / len(value) ** 0.5:.2f}" for value in (whole, layers)]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--epochs", type=int, default=8)
    parse.add_argument("--batches", type=int, default=8)
    parse.add_argument("--draws", type=int, default=16)
    chosen = parse.parse_args()
    torch.set_num_threads(1)
    data = Digits()
    table = Table("normalisation", "accuracy", "bytes", "equal", "ranges", "gradients", title="variance")
    for column in ("ranges / equal", "median layer", "gradients / equal", "median layer"):
        table.add_column(column)
    for norm, change in (("batch", lambda model: model), ("group", in_groups)):
        torch.manual_seed(0)
        model, seen = change(build()), xconv_fx.SampleGradients(len(data.train_images))
        with tempfile.TemporaryDirectory() as folder:
            ways = {"equal": Way.of(model, Path(folder), False), "shared": Way.of(model, Path(folder), True)}
            train(ways["shared"], data, seen, chosen.epochs)
            found = [variances(ways, model, data, seen, chosen.draws) for _ in range(chosen.batches)]
            share = ways["shared"].held() / ways["equal"].held()
        means = [f"{torch.stack([each[name].sum() for each in found]).mean():.3g}" for name in found[0]]
        model.eval()
        accuracy = data.score(model)["accuracy"]
        ratios = [*relative(found, "ranges"), *relative(found, "gradients")]
        table.add_row(norm, f"{accuracy:.3f}", f"{share:.3f}", *means, *ratios)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
