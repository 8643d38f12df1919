"""What the weight gradients of a network's layers are computed from, caught in a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A layer, its input and its output gradient."""

    name: str
    module: nn.Conv2d | nn.Linear
    x: Tensor
    grad_out: Tensor

    def gradient(self, x: Tensor) -> Tensor:
        """PyTorch's weight gradient with `x` in the place of the input."""
        module = self.module
        if isinstance(module, nn.Linear):
            return self.grad_out.t() @ x
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        return torch.nn.grad.conv2d_weight(x, module.weight.shape, self.grad_out, *geometry)  # type: ignore[arg-type]

    @cached_property
    def exact(self) -> Tensor:
        return self.gradient(self.x)


def caught(net: nn.Module, images: Tensor, classes: Tensor) -> Iterator[Layer]:
    """Every layer with weights, in the order in which they run, in a training step on this batch."""
    layers = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    found: list[tuple[str, nn.Conv2d | nn.Linear, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, given, out, name=name: found.append((name, module, *given, out)))
        for name, module in layers.items()
    ]
    loss = F.cross_entropy(net(images), classes)
    for hook in hooks:
        hook.remove()
    grads = torch.autograd.grad(loss, [out for *_, out in found])
    for (name, module, x, _), grad_out in zip(found, grads, strict=True):
        yield Layer(name, module, x.detach(), grad_out)
