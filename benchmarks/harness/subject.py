"""A network in training, to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from nets import Net
from torch import Tensor, nn

import xconv_fx
from xconv_fx.measure import Peak, training_peak
from xconv_fx.plan import Plan


def compiled(model: nn.Module, options: dict[str, Any] | None = None) -> nn.Module:
    """The model under xconv with these options, or under plain Inductor if there are none."""
    backend: dict[str, Any] = {} if options is None else {"backend": "xconv", "options": options}
    return cast(nn.Module, torch.compile(model, **backend))


class Subject:
    """A freshly built network with its batch. `run` is how it is called: as it is, until it is compiled.

    Every network is built from the same random state, so all subjects of one network start from the same parameters,
    which keep their names whatever is wrapped around their modules later.
    """

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = net
        self.model = net.build().to(dtype)
        self.inputs, self.target = net.batch(dtype=dtype)
        self.parameters = dict(self.model.named_parameters())
        self.run: Callable[..., Any] = self.model

    def compile(self, options: dict[str, Any] | None = None) -> None:
        """For xconv with these options, or for plain Inductor; the next step compiles."""
        self.run = compiled(self.model, options)

    def loss(self, output: Tensor) -> Tensor:
        return self.net.loss(output, self.target)

    def step(self) -> float:
        """Seconds of one forward and backward from empty gradients."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        self.loss(self.run(self.inputs)).backward()
        return time.perf_counter() - start

    def peak(self) -> Peak:
        """Measured, of a step."""
        return training_peak(cast(nn.Module, self.run), self.inputs, self.loss)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Those of xconv's graphs, once a step has run."""
        return xconv_fx.plans(self.run)

    def gradients(self) -> dict[str, Tensor]:
        """Of a step, by parameter, in float64."""
        self.step()
        return {name: p.grad.double() for name, p in self.parameters.items() if p.grad is not None}
