"""Is the mean gradient the exact one? 64 draws of every network of the main job under the tightest budget there is.

In float64, so that rounding does not blur the comparison with plain autograd; the budget is the smallest feasible one,
where every large residual is held approximately. For every parameter the error of the mean
of the draws is projected on random directions and divided by its own standard error: under no bias each of these is a
t value with 63 degrees of freedom. The table shows the largest of them next to what chance alone exceeds once in
twenty tables, and the share of single coordinates whose 95% confidence interval holds the exact value. Parameters whose
gradient does not vary between draws must agree to 1e-9 of it, or of the largest gradient where it is all but zero.

The smallest budget approximates few tensors where one transient sets the peak. `--probes N` also holds the input of
every layer as N probes a sample, so that every weight gradient is noisy.

    python benchmarks/unbiased.py --net vgg
    python benchmarks/unbiased.py --net vgg --probes 64
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from lowest import at_lowest_budget
from nets import MAIN_JOB
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn

DIRECTIONS = 4
DOUBT = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the draws of one network say. `limit` is the two-sided Bonferroni bound on `largest`."""

    net: str
    tensors: int
    noisy: int
    noise: float
    largest: float
    limit: float
    coverage: float
    exact_error: float

    @property
    def unbiased(self) -> bool:
        return self.largest <= self.limit and self.exact_error <= 1e-9


def gradients(model: nn.Module, run: nn.Module, inputs: Tensor, loss: object) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss(run(inputs)).backward()  # type: ignore[operator]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def lowest(model: nn.Module, inputs: Tensor, probes: int | None) -> nn.Module:
    """The model compiled at the smallest budget that the backend accepts."""
    more = {} if probes is None else {"probes": probes}

    def attempt(budget: int) -> nn.Module:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="xconv", options={"mem_budget": budget, **more})
        compiled(inputs)
        return cast(nn.Module, compiled)

    return at_lowest_budget(attempt)[1]


def judge(name: str, draws: int, probes: int | None) -> Verdict:
    """Run one network; in a process of its own."""
    net = MAIN_JOB[name]
    torch.manual_seed(0)
    model = net.build().double()
    inputs, target = net.batch(dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def loss(output: Tensor) -> Tensor:
        return net.loss(output, target)

    exact = gradients(model, model, inputs, loss)
    model.load_state_dict(state)
    compiled = lowest(model, inputs, probes)
    torch.manual_seed(1)
    errors = [Errors(g) for g in exact]
    for _ in range(draws):
        model.load_state_dict(state)
        for seen, grad in zip(errors, gradients(model, compiled, inputs, loss), strict=True):
            seen.add(grad)
    return verdict(name, errors, draws)


class Errors:
    """The errors of one parameter's gradient: their sums, their squares, and every draw's projections on DIRECTIONS."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self.sums, self.squares = torch.zeros_like(exact), torch.zeros_like(exact)
        generator = torch.Generator().manual_seed(exact.numel())
        self.signs = torch.randint(0, 2, (DIRECTIONS, exact.numel()), generator=generator).to(exact.dtype) * 2 - 1
        self.projections: list[Tensor] = []

    def add(self, grad: Tensor) -> None:
        error = grad - self.exact
        self.sums += error
        self.squares += error.square()
        self.projections.append(self.signs @ error.flatten())


def verdict(name: str, errors: list[Errors], draws: int) -> Verdict:
    """Test the accumulated errors of the draws.

    Each projection has its own standard error, from its own draws: what a normalisation layer passes on is correlated
    between the coordinates of a gradient.
    """
    scores, inside, counted, noise, fixed = [], 0, 0, [], 0.0
    # The gradient of a bias in front of a normalisation is zero, and rounding all that is seen of it.
    rounding = 1e-12 * max(float(seen.exact.norm()) for seen in errors)
    quantile = float(stats.t.ppf(0.975, draws - 1))
    for seen in errors:
        mean = seen.sums / draws
        spread = ((seen.squares / draws - mean.square()) * draws / (draws - 1)).clamp(min=0).sqrt()
        scale = float(seen.exact.norm())
        if float(spread.norm()) <= max(1e-9 * scale, rounding):
            fixed = max(fixed, float(mean.norm()) / max(scale, 1e3 * rounding))
            continue
        noise.append(float(spread.norm()) / scale)
        error = spread / draws**0.5
        varying = error > 0
        inside += int((mean.abs()[varying] <= quantile * error[varying]).sum())
        counted += int(varying.sum())
        projected = torch.stack(seen.projections)
        scores += (projected.mean(0) / (projected.std(0) / draws**0.5)).tolist()
    limit = float(stats.t.ppf(1 - DOUBT / 2 / max(1, len(scores)), draws - 1))
    return Verdict(
        name, len(errors), len(noise), float(np.median(noise)) if noise else 0.0,
        max((abs(score) for score in scores), default=0.0), limit, inside / max(1, counted), fixed,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=sorted(MAIN_JOB), help="a network (repeatable; default: all)")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--probes", type=int, help="hold the input of every layer as so many probes a sample")
    chosen = parser.parse_args(arguments)
    how = "" if chosen.probes is None else f", {chosen.probes} probes a layer"
    table = Table(title=f"{chosen.draws} draws at the smallest feasible budget, float64{how}")
    for column in ("network", "parameters", "with noise", "noise of a draw", "largest |t|", "limit", "within 95% CI"):
        table.add_column(column, justify="left" if column == "network" else "right")
    good = True
    for name in chosen.net or list(MAIN_JOB):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(judge, name, chosen.draws, chosen.probes).result()
        good &= row.unbiased
        table.add_row(
            row.net, str(row.tensors), str(row.noisy), f"{row.noise:.1e}", f"{row.largest:.2f}", f"{row.limit:.2f}",
            f"{row.coverage:.1%}",
        )  # fmt: skip
    Console(width=110).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
