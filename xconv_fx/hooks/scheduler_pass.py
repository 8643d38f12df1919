"""The base class of passes of Inductor's scheduler, which torch 2.12 does not have.

There any callable will do, and Inductor pickles it into its cache keys; from 2.13 on it asks the pass for its `uuid`.
A pass that derives from this is known by its `uuid` on both.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass
else:
    try:
        from torch._inductor.custom_graph_pass import CustomSchedulerPass
    except ImportError:
        CustomSchedulerPass = abc.ABC


class SchedulerPass(CustomSchedulerPass):
    """Gets the scheduler's nodes in the order of their kernels, and gives them in another."""

    @abc.abstractmethod
    def __call__(self, nodes: list[Any]) -> list[Any]: ...

    @abc.abstractmethod
    def uuid(self) -> str:
        """What stands for the pass in cache keys."""

    def __reduce__(self) -> Any:
        return (str, (self.uuid(),))
