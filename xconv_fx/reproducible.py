"""Plans that are the same on every machine, for those that are compared with a file that another machine wrote.

A plan for training rests on what this machine does: rates that `xconv profile-machine` measured, workspaces of
convolutions that are measured by running them, a number of threads by which ATen chooses among convolutions, and a
solver that is stopped by the clock. Inside `portable()` rates are the generic ones, workspaces those that a rule gives,
threads as many as the generic machine has cores, and the solver is stopped by the size of its search tree.

Known gaps: HiGHS, and which of ATen's convolutions runs, are those of the installed scipy and torch; other versions,
and torch on another processor architecture, can plan otherwise. What only a measurement knows is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypedDict

# Nodes of the search tree that stand for a second of search. Small problems are solved in fewer, large ones in none.
NODES_A_SECOND = 20
# Of the generic CPU of `cost_model/device.py`.
THREADS = 4
# Stops nothing: solvers want a number.
FOREVER = 1e7

_portable: ContextVar[bool] = ContextVar("portable", default=False)


class Effort(TypedDict):
    """What bounds a search: seconds, and nodes of its tree (None: any number)."""

    time_limit: float
    nodes: int | None


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Plan for no machine in particular within this context."""
    import torch

    token, threads = _portable.set(True), torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _portable.reset(token)


def is_portable() -> bool:
    """Whether nothing of this machine may enter a plan now."""
    return _portable.get()


def effort(seconds: float) -> Effort:
    """What the solver may spend where a machine at hand is given `seconds`."""
    if is_portable():
        return Effort(time_limit=FOREVER, nodes=max(1, round(seconds * NODES_A_SECOND)))
    return Effort(time_limit=seconds, nodes=None)
