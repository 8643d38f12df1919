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
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness.digits import train
from harness.errors import Errors
from harness.examples import BATCH, DIGIT_RESNETS, Digits
from harness.gradients import gradients
from harness.subject import compiled
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import xconv_fx


def under_preset(model: nn.Module, sample_bits: bool) -> nn.Module:
    return compiled(model, {"codecs": "actnn:L3", "sample_bits": sample_bits})


def held(run: nn.Module) -> int:
    """Bytes between forward and backward."""
    return sum(plan.saved_after for plan in xconv_fx.plans(run))


def gradient(run: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of the weights of convolutions and linear layers."""
    images, labels = batch
    found = gradients(run, lambda: F.cross_entropy(run(images), labels))
    return [gradient for gradient in found.values() if gradient.dim() > 1]


def batches(data: Digits, seen: xconv_fx.SampleGradients, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All batches of so many epochs; what samples' gradients are is noted while one is in use."""
    for _ in range(epochs):
        for indices in torch.randperm(len(data.train_images)).split(BATCH)[:-1]:
            with seen.batch(indices):
                yield data.train_images[indices], data.train_labels[indices]


def variances(
    ways: dict[str, nn.Module], model: nn.Module, data: Digits, seen: xconv_fx.SampleGradients, draws: int
) -> dict[str, Tensor]:
    """Of one batch's gradient, for each layer, by how samples share bits; relative to the energy of all of it."""
    indices = torch.randperm(len(data.train_images))[:BATCH]
    batch = data.train_images[indices], data.train_labels[indices]
    exact, noted = gradient(model, batch), seen.squares.clone()

    def drawn(way: str, known: bool) -> Tensor:
        errors = [Errors(layer) for layer in exact]
        for _ in range(draws):
            with seen.batch(indices) if known else contextlib.nullcontext():
                found = gradient(ways[way], batch)
            # What this step notes is not known in training.
            seen.squares.copy_(noted)
            for layer, draw in zip(errors, found, strict=True):
                layer.add(draw)
        return torch.tensor([layer.loss for layer in errors]) / sum(layer.energy for layer in errors)

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
    for norm, build in DIGIT_RESNETS.items():
        torch.manual_seed(0)
        model, seen = build(), xconv_fx.SampleGradients(len(data.train_images))
        ways = {"equal": under_preset(model, False), "shared": under_preset(model, True)}
        train(ways["shared"], batches(data, seen, chosen.epochs), data.learning_rate)
        found = [variances(ways, model, data, seen, chosen.draws) for _ in range(chosen.batches)]
        share = held(ways["shared"]) / held(ways["equal"])
        means = [f"{torch.stack([each[name].sum() for each in found]).mean():.3g}" for name in found[0]]
        model.eval()
        accuracy = data.score(model)["accuracy"]
        ratios = [*relative(found, "ranges"), *relative(found, "gradients")]
        table.add_row(norm, f"{accuracy:.3f}", f"{share:.3f}", *means, *ratios)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
