"""The gradients of a step, and how far they are from the exact ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GradientError:
    """Relative L2 distance from the exact gradient: of all parameters as one vector, and of the worst tensor."""

    whole: float
    worst: float
    worst_name: str


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What the backward of `loss()` leaves, from no gradients, by parameter."""
    model.zero_grad(set_to_none=True)
    loss().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradient_error(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> GradientError:
    """Of one gradient. A tensor's own norm counts as at least a millionth of the whole gradient's.

    The floor is there because some true gradients are zero: a bias before a normalisation has no effect.
    """
    norm = torch.stack([grad.norm() for grad in true.values()]).norm()
    off = {name: (found[name] - grad).norm() for name, grad in true.items()}
    relative = {name: float(off[name] / torch.maximum(grad.norm(), 1e-6 * norm)) for name, grad in true.items()}
    worst = max(relative, key=relative.__getitem__)
    return GradientError(float(torch.stack(list(off.values())).norm() / norm), relative[worst], worst)
