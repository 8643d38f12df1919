"""`gradient_check`: how biased and how noisy the gradients of a model are with some options, before it is trained.

The exact gradient is plain autograd's, in eager mode; draws of the approximate one come from the model compiled by this
backend, each on the same batch from the same state. Bias is the error of the mean of the draws. A mean of so many draws
has an error without any bias, `chance`, and only bias beyond that says something.

Known gap: dropout and other random layers draw anew in every step, which counts as noise, as it does in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor, nn

from xconv_fx.errors import OptionError, UnsupportedModelError
from xconv_fx.hooks.modules import uncompiled
from xconv_fx.plan.report import Name, report_table
from xconv_fx.progress import announce

from .calibrate import unpack
from .isolation import saved_buffers, untouched

DRAWS = 16
# Bias beyond what chance explains once in some thousand layers is marked.
DOUBT = 3.0


@dataclass(frozen=True)
class LayerError:
    """The gradient of one layer's parameters together; all is relative to the norm of the exact gradient, squared for
    variances.

    `bias` is the error of the mean of the draws, `chance` what that is expected to be without bias, `variance` that of
    a draw; `cosine` is the mean between a draw and the exact gradient.
    """

    layer: str
    norm: float
    bias: float
    chance: float
    variance: float
    cosine: float

    @property
    def biased(self) -> bool:
        """Whether the bias is more than chance explains."""
        return self.bias > DOUBT * self.chance + 1e-4


@dataclass(frozen=True)
class GradientCheck:
    """Every layer's gradient, and the `total` of all, over so many draws. Renders itself with rich."""

    layers: tuple[LayerError, ...]
    total: LayerError
    draws: int

    @property
    def biased(self) -> tuple[str, ...]:
        """The layers whose bias is more than chance explains."""
        return tuple(error.layer for error in self.layers if error.biased)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = report_table()
        table.add_column("layer")
        for column in ("gradient", "bias", "by chance", "variance", "cosine"):
            table.add_column(column, justify="right", no_wrap=True)
        for error in self.layers:
            table.add_row(Name(error.layer), *_cells(error))
        table.add_section()
        table.add_row("all", *_cells(self.total), style="bold")
        yield table
        verdict = f"more than by chance in {', '.join(self.biased)}" if self.biased else "none beyond chance"
        yield Text(f" bias     {verdict}, over {self.draws} draws")


def gradient_check(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batch: Any,
    options: Mapping[str, Any] | None = None,
    draws: int = DRAWS,
) -> GradientCheck:
    """Compare the gradients of a model that is compiled with these options of the backend with the exact ones.

    `batch` is a pair (inputs, targets), each a tensor or a tuple of them, and `loss(model(*inputs), *targets)` a
    scalar. The loss is not compiled. Parameters, buffers, gradients, modes and the state of torch's random generators
    are left as they were. Raises what the backend raises, `OptionError` for fewer than two draws, and
    `UnsupportedModelError` for a model without gradients.
    """
    if not isinstance(draws, int) or draws < 2:
        raise OptionError("draws", draws, "write a number from 2; 16 tell biases of a quarter of a draw's error")
    model = uncompiled(model)
    inputs, targets = unpack(batch)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(run: Callable[..., Any]) -> dict[str, Tensor]:
        with saved_buffers(model):
            found = torch.autograd.grad(loss(run(*inputs), *targets), [*parameters.values()], allow_unused=True)
        return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

    with untouched(model), torch.enable_grad():
        exact = {name: gradient.double() for name, gradient in gradients(model).items()} if parameters else {}
        if not any(bool(gradient.any()) for gradient in exact.values()):
            raise UnsupportedModelError(type(model).__name__, "its gradient is zero on this batch", "another batch")
        compiled = torch.compile(model, backend="xconv", options=dict(options or {}))
        errors = {layer: _Errors() for layer in dict.fromkeys(map(_layer, exact))}
        total = _Errors()
        for number in range(draws):
            announce(f"draw {number + 1} of {draws}")
            drawn = gradients(compiled)
            for layer, seen in errors.items():
                names = [name for name in exact if _layer(name) == layer]
                seen.add([exact[name] for name in names], [drawn[name].double() for name in names])
            total.add([*exact.values()], [drawn[name].double() for name in exact])
    layers = tuple(seen.result(layer, draws) for layer, seen in errors.items())
    return GradientCheck(layers, total.result("all", draws), draws)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


class _Errors:
    """Draws of the gradients of some parameters beside the exact ones."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.squares, self.cosines, self.scale = 0.0, 0.0, 0.0

    def add(self, exact: list[Tensor], drawn: list[Tensor]) -> None:
        errors = [draw - true for true, draw in zip(exact, drawn, strict=True)]
        self.sums = [s + e for s, e in zip(self.sums, errors, strict=True)] if self.sums else errors
        self.squares += _energy(errors)
        self.scale, norm = _energy(exact), _energy(drawn)
        product = sum(float((true * draw).sum()) for true, draw in zip(exact, drawn, strict=True))
        self.cosines += product / max((self.scale * norm) ** 0.5, 1e-300)

    def result(self, layer: str, draws: int) -> LayerError:
        bias = _energy(self.sums) / draws**2
        variance = max(0.0, self.squares / draws - bias) * draws / (draws - 1)
        scale = max(self.scale, 1e-300)
        return LayerError(
            layer, self.scale**0.5, (bias / scale) ** 0.5, (variance / draws / scale) ** 0.5, variance / scale,
            self.cosines / draws,
        )  # fmt: skip


def _energy(tensors: list[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors)


def _cells(error: LayerError) -> list[Text]:
    numbers = (error.norm, error.bias, error.chance, error.variance)
    style = "bold red" if error.biased else ""
    return [Text(f"{number:.2g}", style=style) for number in numbers] + [Text(f"{error.cosine:.4f}")]
