"""`bench`: a training step on this machine, by plain Inductor and by xconv, measured beside what was predicted.

Both are compiled and run in turn, so that a slow spell of the machine falls on both. The peak is the allocator's
(`measure.py`). What was predicted is the plan that is made ahead, without code; the audited peak is that of the code
that was generated.

Known gap: the optimiser's step is not part of what is run.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.hooks.pytree import tree_leaves, tree_map_only
from xconv_fx.measure import interleaved_times, physical_peak
from xconv_fx.options.budget import Budget
from xconv_fx.plan import Totals
from xconv_fx.plan.report import read_json
from xconv_fx.progress import announce
from xconv_fx.step.explain import explain

STEPS = 5


@dataclass(frozen=True)
class Row:
    """One way of training: its peak as `predicted`, `audited` (None: not known) and `measured`, in bytes; seconds of a
    step as measured, and `extra`, those that it is predicted to take more than plain Inductor; `noise` as predicted."""

    method: str
    predicted: int
    audited: int | None
    measured: int
    seconds: float
    extra: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Plain Inductor, and xconv under `budget` bytes."""

    budget: int
    inductor: Row
    xconv: Row

    @property
    def slowdown(self) -> float:
        """Measured extra time of xconv's step, as a fraction of Inductor's."""
        return self.xconv.seconds / self.inductor.seconds - 1


def bench(
    model: nn.Module,
    *inputs: Any,
    mem_budget: str | int,
    loss: str | Callable[..., Tensor] = "mean",
    targets: Sequence[Any] = (),
    device: str | None = None,
    steps: int = STEPS,
    **options: Any,
) -> Bench:
    """Train `steps` steps with these options of the backend, and as many by Inductor alone, on `device` (the CPU).

    `loss` and `targets` are those of `explain`. Floating-point inputs are filled with random numbers. Raises what the
    backend raises.
    """
    announce("planning")
    home = device or "cpu"
    model = model.to(home)
    arguments = [_there(value, home) for value in (*inputs, *targets)]
    step: dict[str, Any] = {"loss": loss, "targets": arguments[len(inputs) :]}
    plain = Totals.of(explain(model, *arguments[: len(inputs)], **step).plans)
    budget = Budget.parse(mem_budget).resolve_for(plain.peak)
    planned = Totals.of(explain(model, *arguments[: len(inputs)], mem_budget=budget, **step, **options).plans)
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "plans.json")
        settings = {**options, "mem_budget": budget, "report": report}
        ways = {
            "inductor": _Training(model, len(inputs), arguments, loss, backend="inductor"),
            "xconv": _Training(copy.deepcopy(model), len(inputs), arguments, loss, backend="xconv", options=settings),
        }
        peaks = {}
        for name, training in ways.items():
            announce(f"compiling with {name}")
            training.step()
            announce(f"measuring {name}")
            peaks[name] = training.peak()
        audited = max(plan.peak for plan in read_json(report))
    announce("timing")
    seconds = interleaved_times({name: training.step for name, training in ways.items()}, repeats=steps, warmup=1)
    return Bench(
        budget,
        Row("inductor", plain.peak, None, peaks["inductor"], seconds["inductor"]),
        Row("xconv", planned.peak, audited, peaks["xconv"], seconds["xconv"], planned.time, planned.noise),
    )


class _Training:
    """A model that trains compiled."""

    def __init__(
        self, model: nn.Module, count: int, arguments: Sequence[Any], loss: str | Callable[..., Tensor], **compiler: Any
    ) -> None:
        self.model, self.arguments, self.loss = model, arguments, loss

        def with_loss(*values: Any) -> Any:
            return loss(model(*values[:count]), *values[count:])  # type: ignore[operator]

        self.run = torch.compile(with_loss if callable(loss) else model, dynamic=False, **compiler)

    def step(self) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        result = self.run(*self.arguments)
        if not callable(self.loss):
            reduce = torch.Tensor.sum if self.loss == "sum" else torch.Tensor.mean
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            total = sum(reduce(leaf) for leaf in leaves)
        else:
            total = result
        total.backward()  # type: ignore[union-attr]

    def peak(self) -> int:
        """Measured bytes of a step, gradients included."""
        self.model.zero_grad(set_to_none=True)
        values = [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]
        held = [*self.model.parameters(), *self.model.buffers(), *values]
        return physical_peak(self.step, resident=held).bytes


def _there(value: Any, device: str) -> Any:
    """The tensors in `value` on a device, those of floats filled with random numbers: integers may be labels."""

    def filled(tensor: Tensor) -> Tensor:
        return (torch.randn_like(tensor) if tensor.is_floating_point() else tensor).to(device)

    return tree_map_only(Tensor, filled, value)
