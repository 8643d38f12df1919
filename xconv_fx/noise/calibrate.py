"""`calibrate`: measure on the user's data how noisy a model's gradients are, and how sensitive its residuals.

Every batch is one exact step without an update. Forward hooks catch the input of each layer, hooks of its output the
gradient that arrives, and the layer's statistics are taken there and then, so that nothing outlives the backward but
numbers. What is measured of a layer is in `noise/moments.py`, what it means in `options/statistics.py`.

The SGD noise of a layer is the variance of its gradient over batches of this size. Where the layer's input has the
batch's samples as rows, it is estimated from the gradients g_n of N single samples, whose sum is the batch's:

    N / (N - 1) * (sum of |g_n|^2 - |sum of g_n|^2 / N),        mean over batches.

That needs one batch and takes samples for independent; what batch normalisation does to one through the others is part
of its g_n. Elsewhere (rows that are tokens or windows, batches of one) it is the sample variance of the gradients of
several batches.

Which normalisation layers a layer's input was made from, and so may be replayed from, is read from what autograd has
recorded (`noise/made_from.py`).

Known gaps: layers are known by their modules: functions that are called with weights (`F.conv2d` in a forward) are not
seen. A module that runs several times in a step has the mean of its runs as the statistics of each.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.errors import UnsupportedModelError
from xconv_fx.hooks.modules import uncompiled
from xconv_fx.options.statistics import Statistics
from xconv_fx.progress import announce

from .isolation import untouched
from .layer import Measurement, Source, measure_normalisation, measure_weighted
from .made_from import Makers
from .moments import NORMALISATIONS, WEIGHTED
from .norm_layers import reads_its_input

BATCHES_HINT = "a list such as [(input, target), ...], each a tensor or a tuple of them"


def calibrate(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[Any],
    path: str | os.PathLike[str] | None = None,
) -> Statistics:
    """The statistics of a model's layers on these batches, for the option `stats`; written to `path` if it is given.

    `batches` gives pairs (inputs, targets), each a tensor or a tuple of them, of the size that is trained with, on the
    device of the model; all are used: one to four are enough. `loss(model(*inputs), *targets)` is a scalar. A model in
    evaluation mode is measured in training mode. Parameters, buffers, gradients, modes and the state of torch's random
    generators are left as they were.

    Raises `UnsupportedModelError` where there is nothing to measure, and `OSError` when the file cannot be written.
    """
    model = uncompiled(model)
    catcher = _Catcher(model)
    count = 0
    with untouched(model), torch.enable_grad(), catcher:
        for batch in batches:
            count += 1
            announce(f"measuring batch {count}")
            inputs, targets = unpack(batch)
            catcher.begin(inputs)
            result = loss(model(*inputs), *targets)
            if not isinstance(result, Tensor) or result.numel() != 1:
                raise UnsupportedModelError("the loss", f"returned {_kind(result)}", "a scalar tensor, such as a mean")
            catcher.finish(result)
    if count == 0:
        raise UnsupportedModelError("batches", "there is none to measure", BATCHES_HINT)
    found = Statistics(catcher.layers(), count)
    if not found.sgd:
        hint = "train at least one convolution or linear layer that is a module of torch.nn"
        raise UnsupportedModelError(type(model).__name__, "no such layer of it has a gradient", hint)
    if path is not None:
        found.save(path)
    return found


def unpack(batch: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs and targets of a batch. Raises `UnsupportedModelError`."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UnsupportedModelError("batches", f"one is {_kind(batch)}, not a pair of inputs and targets", BATCHES_HINT)
    inputs, targets = (tuple(part) if isinstance(part, (tuple, list)) else (part,) for part in batch)
    return inputs, targets


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


class _Catcher:
    """Catches inputs and output gradients of a model's layers while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules() if _is_measured(module)}
        self.measured: dict[str, Measurement] = {}
        self.handles: list[Any] = []
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> _Catcher:
        self.handles = [module.register_forward_hook(self._called) for module in self.names]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self, inputs: Sequence[Any]) -> None:
        """A batch with these inputs is about to run."""
        first = next((value for value in inputs if isinstance(value, Tensor) and value.dim()), None)
        self.samples = 1 if first is None else len(first)
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)
        self.normalised: list[tuple[nn.Module, Tensor, Tensor, Any]] = []
        self.makers = Makers()
        self.listening = True

    def finish(self, loss: Tensor) -> None:
        """Run the backward of the batch's loss, and from each normalisation layer one for errors of its input."""
        if not self.parameters or not loss.requires_grad:
            return
        self.makers.of(loss)
        torch.autograd.grad(loss, self.parameters, allow_unused=True, retain_graph=True)
        self.listening = False
        for name, gradients in self.gradients.items():
            self.measured[name].add_gradient(torch.stack(gradients).sum(0))
        for module, given, dy, made in self.normalised:
            backward, signed = functools.partial(self._weight_gradients, given), made in self.makers.signed
            measure_normalisation(self._measurement(module), module, _wide(given.detach()), dy, backward, signed)

    def _weight_gradients(self, given: Tensor, error: Tensor) -> dict[str, Tensor]:
        """The weight gradients, by layer, that a gradient of a layer's input leads to."""
        if not given.requires_grad:
            return {}
        layers = {name: module.weight for module, name in self.names.items() if isinstance(module, WEIGHTED)}
        leaves = {name: weight for name, weight in layers.items() if isinstance(weight, nn.Parameter)}
        found = torch.autograd.grad(
            given, [*leaves.values()], error.to(given.dtype), allow_unused=True, retain_graph=True
        )
        return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}

    def _called(self, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if not isinstance(out, Tensor) or not out.requires_grad or not given:
            return
        x, made = given[0], out.grad_fn
        sources = [] if isinstance(module, NORMALISATIONS) else self._sources(x)
        self.makers.add(out, (module, x))
        out.register_hook(lambda dy: self._arrived(module, x, dy.detach(), made, sources))

    def _sources(self, x: Tensor) -> list[tuple[Any, nn.Module, Tensor]]:
        """The normalisation layers that x may be replayed from, with their inputs."""
        before = [(made, module, given) for made, (module, given) in self.makers.of(x)]
        return [
            (made, m, given) for made, m, given in before if isinstance(m, NORMALISATIONS) and given.shape == x.shape
        ]

    def _arrived(
        self, module: nn.Module, x: Tensor, dy: Tensor, made: Any, sources: list[tuple[Any, nn.Module, Tensor]]
    ) -> None:
        if not self.listening:
            return
        if isinstance(module, NORMALISATIONS):
            if reads_its_input(module):
                self.normalised.append((module, x, _wide(dy), made))
            return
        with torch.autocast(x.device.type, enabled=False):
            wide = _wide(x.detach()), _wide(dy)
            rows = len(x) == self.samples > 1
            near = (
                Source(self.names[norm], norm, _wide(given.detach()), node in self.makers.signed)
                for node, norm, given in sources
            )
            gradient = measure_weighted(self._measurement(module), module, *wide, rows, near)
            self.gradients[self.names[module]].append(gradient)

    def _measurement(self, module: nn.Module) -> Measurement:
        return self.measured.setdefault(self.names[module], Measurement(tuple(_shape(module))))

    def layers(self) -> dict[str, Any]:
        """What was measured, in the model's order. Raises `UnsupportedModelError`."""
        found = {}
        for name in self.names.values():
            if name in self.measured and self.measured[name].runs:
                found[name] = self.measured[name].statistics(name)
        return found


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _is_measured(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, NORMALISATIONS) or (
        isinstance(module, WEIGHTED) and isinstance(weight, Tensor) and weight.requires_grad
    )


def _shape(module: nn.Module) -> Sequence[int]:
    weight = getattr(module, "weight", None)
    return () if weight is None else weight.shape
