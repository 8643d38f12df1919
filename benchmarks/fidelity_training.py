"""The methods of the fidelity study, and how one of them trains a task from several seeds in one process.

`METHODS` is the whole list: Inductor as it is, xconv within a share of Inductor's measured peak and at the lowest
budget that is feasible, the published systems at whatever memory they take, and the same in bfloat16. For one seed, all
methods start from the same parameters and see the same batches for the same number of steps, so that all they differ in
is what is held between forward and backward, and the draws that this costs.

A method compiles a task once; a seed is new parameters and buffers in the same compiled network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from fidelity_tasks import STUDIES
from harness.gradients import gradients
from harness.lowest import at_lowest_budget
from harness.subject import compiled
from torch import Tensor, nn

import xconv_fx
from xconv_fx.measure import training_peak
from xconv_fx.plan import Totals

# The first steps warm caches and allocator up; their times say nothing about the rest.
UNTIMED_STEPS = 3
LOWEST = 0


@dataclass(frozen=True)
class Method:
    """One way to hold residuals. `options` are xconv's; None is plain Inductor.

    `share` is the budget in per cent of the measured peak of the method `reference`, `LOWEST` the lowest feasible one,
    None no budget at all. `reference` is also what scores and step times are compared with. `slow` is by how much
    longer than Inductor in float32 a run takes, for the estimate of the total.
    """

    name: str
    seeds: int = 3
    options: tuple[tuple[str, Any], ...] | None = ()
    share: int | None = None
    reference: str = "exact"
    bf16: bool = False
    slow: float = 1.5


def _preset(name: str) -> Method:
    return Method(name, options=(("codecs", name),))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("exact", seeds=5, options=None, slow=1),
        Method("xconv-60%", share=60),
        Method("xconv-40%", share=40),
        Method("xconv-lowest", share=LOWEST, slow=2),
        *(_preset(name) for name in ("actnn:L1", "actnn:L2", "actnn:L3", "xconv")),
        # No preset: what it takes is what its codes can save.
        Method("fixed:4", options=(("codecs", "fixed:4"),), share=LOWEST),
        Method("bf16-exact", options=None, reference="bf16-exact", bf16=True),
        Method("bf16-xconv-60%", share=60, reference="bf16-exact", bf16=True),
        Method("bf16-xconv-40%", share=40, reference="bf16-exact", bf16=True),
        Method("bf16-xconv-lowest", share=LOWEST, reference="bf16-exact", bf16=True, slow=2),
    )
}


@dataclass(frozen=True)
class Run:
    """What training from one seed came to. Bytes and seconds; None is not known.

    `step` is the median processor time of a step, optimiser included; `seconds` all of the run by the clock, with
    compiling in the first run of a process. `noise` is the variance that the plan predicts, relative to the energy of
    what it replaces. `error` is that of a gradient of the trained network, relative to the exact one, and `of_sgd` its
    ratio to the variance of exact gradients from batch to batch, both as energies of all parameters' gradients.
    `baseline` is the score that needs no learning.
    """

    scores: dict[str, float]
    peak: int
    step: float
    seconds: float
    final_loss: float
    error: float
    of_sgd: float
    baseline: float
    budget: int | None = None
    noise: float | None = None
    slices: int | None = None
    held: int | None = None

    @property
    def score(self) -> float:
        return next(iter(self.scores.values()))


class InPrecision(nn.Module):
    """A network under autocast, whose results come out in float32, or as it is."""

    def __init__(self, inner: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.inner, self.bf16 = inner, bf16

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.inner(*inputs).float()


class Trainer:
    """A task under a method, compiled when it first trains.

    `peak` is that of the method's reference, in bytes, of which the budget is a share.
    """

    def __init__(self, task: str, method: Method, peak: int | None = None) -> None:
        if method.share and peak is None:
            raise ValueError(f"{method.name} has a share of {method.reference}'s peak, which must be given")
        self.task = STUDIES[task].make()
        self.method = method
        self.reference_peak = peak
        self.model = self.task.build()
        self.budget: int | None = None
        self.run_step: InPrecision | None = None

    def train(self, seed: int, steps: int) -> dict[str, Any]:
        """Train from scratch with Adam and a cosine schedule; what `Run` says, as a dict that a pipe and JSON carry."""
        started = time.perf_counter()
        self._restart(seed)
        run = self._compiled()
        # Compiling has drawn numbers, and trained batch norm's statistics on one batch.
        self._restart(seed)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(self.model.parameters(), lr=self.task.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        times, losses = [], []
        for _ in range(steps):
            inputs, target = self._batch(generator)
            before = time.process_time()
            optimiser.zero_grad(set_to_none=True)
            loss = self.task.loss(run(*inputs), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            times.append(time.process_time() - before)
            schedule.step()
        scores = self._scores()
        error, of_sgd = self._gradient_noise(generator)
        inputs, target = self._batch(generator)
        peak = training_peak(run, inputs, lambda output: self.task.loss(output, target))
        result = Run(
            scores=scores,
            peak=peak.bytes,
            step=statistics.median(times[UNTIMED_STEPS:] or times),
            seconds=time.perf_counter() - started,
            final_loss=statistics.mean(losses[-10:]),
            error=error,
            of_sgd=of_sgd,
            baseline=self.task.baseline(),
            budget=self.budget,
        )
        return asdict(self._with_plan(result))

    def _restart(self, seed: int) -> None:
        """The parameters, buffers and random state that this seed begins with."""
        torch.manual_seed(seed)
        self.model.load_state_dict(self.task.build().state_dict())
        self.model.train()

    def _batch(self, generator: torch.Generator) -> tuple[Sequence[Tensor], Tensor]:
        inputs, target = self.task.batch(generator)
        return ((inputs,) if isinstance(inputs, Tensor) else inputs), target

    def _compiled(self) -> InPrecision:
        """The network as the method runs it, after its first step."""
        if self.run_step is not None:
            return self.run_step
        if self.method.share == LOWEST:
            self.budget, self.run_step = lowest = at_lowest_budget(self._first_step)
            return lowest[1]
        if self.method.share is not None and self.reference_peak is not None:
            self.budget = self.reference_peak * self.method.share // 100
        self.run_step = run = self._first_step(self.budget)
        return run

    def _first_step(self, budget: int | None) -> InPrecision:
        torch.compiler.reset()
        options = None if self.method.options is None else dict(self.method.options)
        if options is not None and budget is not None:
            options["mem_budget"] = budget
        run = InPrecision(compiled(self.model, options), self.method.bf16)
        inputs, target = self._batch(torch.Generator().manual_seed(0))
        self.task.loss(run(*inputs), target).backward()
        return run

    def _scores(self) -> dict[str, float]:
        """By plain PyTorch in float32, whatever the method."""
        self.model.eval()
        with torch.no_grad():
            scores = self.task.score(self.model)
        self.model.train()
        return scores

    def _gradient_noise(self, generator: torch.Generator) -> tuple[float, float]:
        """`error` and `of_sgd` of `Run`, from two batches.

        Half the squared distance of two batches' exact gradients is an unbiased estimate of the variance of one.
        """
        assert self.run_step is not None
        exact = InPrecision(self.model, self.method.bf16)
        added, energy, gradients = 0.0, 0.0, []
        for _ in range(2):
            inputs, target = self._batch(generator)
            found, true = (self._gradient(run, inputs, target) for run in (self.run_step, exact))
            added += float((found - true).square().sum())
            energy += float(true.square().sum())
            gradients.append(true)
        of_batches = float((gradients[0] - gradients[1]).square().sum()) / 2
        return added / energy, added / 2 / of_batches

    def _gradient(self, run: nn.Module, inputs: Sequence[Tensor], target: Tensor) -> Tensor:
        found = gradients(self.model, lambda: self.task.loss(run(*inputs), target))
        return torch.cat([gradient.flatten() for gradient in found.values()])

    def _with_plan(self, run: Run) -> Run:
        """With what xconv's plans say, if there are any."""
        if self.method.options is None or self.run_step is None:
            return run
        plans = xconv_fx.plans(self.run_step.inner)
        totals = Totals.of(plans)
        held = sum(plan.saved_after for plan in plans)
        return replace(run, noise=totals.noise, slices=totals.slices, held=held)
