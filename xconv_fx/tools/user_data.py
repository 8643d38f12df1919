"""Batches to measure a model on, from the user's code or from shapes, for `xconv calibrate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.errors import UsageError, XConvError
from xconv_fx.hooks.pytree import tree_leaves, tree_map_only
from xconv_fx.noise.calibrate import calibrate
from xconv_fx.options.statistics import Statistics

from .target import Target, called, summary
from .workload import Workload

PAIRS_HINT = "return a list such as [(inputs, targets), ...] from it, or yield such pairs"


def measured_on_data(step: Workload, data: str, count: int) -> Statistics:
    """The statistics of a workload's model on at most `count` batches of the callable that `data` names.

    The workload's own inputs and labels are not used. Raises `UsageError`, whatever the user's code raises.
    """
    target = Target.parse(data)
    loss, model = step.training_loss(), step.model()
    try:
        batches = iter(called(target, "cpu"))
    except TypeError as error:
        raise UsageError(f"--data {data} gives nothing to iterate over: {summary(error)}", PAIRS_HINT) from error
    try:
        return calibrate(model, as_function(loss), itertools.islice(batches, count))
    except XConvError:
        raise
    except Exception as error:
        hint = "a model, data and loss that run together; --debug shows the whole error"
        raise UsageError(f"{type(model).__name__} failed on --data {data}: {summary(error)}", hint) from error


def measured_on_inputs(
    model: nn.Module,
    *inputs: Any,
    batches: int,
    loss: str | Callable[..., Tensor] = "mean",
    targets: Sequence[Any] = (),
) -> Statistics:
    """The statistics of a model on batches like these inputs; zeros in them are replaced by normal numbers.

    A tensor of zeros stands for a shape that the user gave; any other tensor is the user's and is taken as it is.
    """

    def drawn() -> Iterator[tuple[Any, Any]]:
        for _ in range(batches):
            yield tree_map_only(Tensor, _filled, inputs), tuple(targets)

    return calibrate(model, as_function(loss), drawn())


def _filled(value: Tensor) -> Tensor:
    return torch.randn_like(value) if value.is_floating_point() and not value.any() else value


def as_function(loss: str | Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """A loss as a function of the output and the targets; "mean" (also None) and "sum" are of every float in the
    output, and ignore targets."""
    if callable(loss):
        return loss
    reduce = torch.Tensor.sum if loss == "sum" else torch.Tensor.mean

    def total(output: Any, *_: Any) -> Tensor:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return torch.stack([reduce(leaf) for leaf in leaves]).sum()

    return total
