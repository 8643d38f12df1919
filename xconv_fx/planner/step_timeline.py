"""When residuals are made and read in a training step: the forward, the loss, the backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import fx

from xconv_fx.passes.graph import is_elementwise, is_reduction
from xconv_fx.passes.liveness import Timeline
from xconv_fx.passes.residuals import Residual


@dataclass(frozen=True)
class StepTimeline:
    """The steps of a training step: the forward's, the loss, the backward's."""

    forward: Timeline
    backward: Timeline

    @property
    def turn(self) -> int:
        """The first step of the backward."""
        return len(self.forward.steps) + 1

    @property
    def end(self) -> int:
        """The last step."""
        return self.turn + len(self.backward.steps) - 1

    @functools.cached_property
    def _last_in_forward(self) -> dict[fx.Node, int]:
        return {buffer.node: buffer.last for buffer in self.forward.buffers}

    def produced(self, residual: Residual, kept: bool) -> int:
        """First step at which the payload exists; for a kept tensor, the first that the base does not count."""
        if kept and residual.forward in self._last_in_forward:
            return min(self._last_in_forward[residual.forward] + 1, self.end)
        return min(self.forward.step_of(residual.forward), self.end)

    def read(self, residual: Residual) -> list[int]:
        """Steps of the backward that read it."""
        return [self.turn + step for step in self.backward.read_at.get(residual.backward, [0])]

    def last(self, residual: Residual) -> int:
        """The last step that reads it."""
        return max(self.read(residual))

    def materialised(self, residual: Residual) -> list[int]:
        """Steps at which an extern kernel reads the residual, so that a decoded tensor must exist."""
        return [step for step in self.read(residual) if not _is_generated(self.backward, step - self.turn)]


def _is_generated(line: Timeline, step: int) -> bool:
    return is_elementwise(line.steps[step]) or is_reduction(line.steps[step])
