"""How one method trains a network of the zoo, in a process of its own: what is measured there, and by which methods."""

from __future__ import annotations

from typing import Any

import torch
from harness.gradients import GradientError, gradient_error
from harness.subject import Subject
from peers_methods import METHODS, Method
from peers_subject import Peer
from zoo_nets import ZooNet, checkpoint_nested

NESTED = Method("nested checkpoint", "checkpoint", compiled=False)
EXACT = "xconv-exact"
# In the order in which they run.
ZOO_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        METHODS["inductor"],
        METHODS[EXACT],
        METHODS["eager"],
        METHODS["checkpoint"],
        NESTED,
        METHODS["checkpoint+inductor"],
        *(method for method in METHODS.values() if method.family == "torch budget"),
    )
}
ALL_CODECS = METHODS["xconv-lowest"]
# Of each of xconv's plans: see `xconv_fx.plan.Plan`.
PREDICTED = (
    "baseline_peak", "predicted_peak", "foreseen", "audited_peak", "peak_at", "attempts", "slices", "held_slices",
    "saved_share", "relayout", "inductor",
)  # fmt: skip


class Animal(Peer):
    """A network of the zoo under a method; compiled by its first step. `budget` in bytes is xconv's."""

    def __init__(self, net: ZooNet, method: Method, budget: int | None = None) -> None:
        super().__init__(net, method, budget)
        self.method = method
        if method.name == NESTED.name:
            checkpoint_nested(self.model, net.nested)

    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    def graphs(self) -> list[dict[str, Any]]:
        """What xconv's plans say, one a graph."""
        return [{name: getattr(plan, name) for name in PREDICTED} for plan in self.plans]

    def error(self) -> GradientError:
        """Of the gradients of a step, against those of the same network and batch in eager; of eager's, in float64."""
        dtype = torch.float64 if self.method.family == "eager" else torch.float32
        return gradient_error(self.gradients(), Subject(self.net, dtype).gradients())
