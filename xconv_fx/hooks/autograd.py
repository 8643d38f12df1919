"""Where autograd is: how many nodes a thread has made, and when a backward ends.

Private parts of PyTorch, read in torch 2.13: `torch._C._current_graph_task_id`, `torch.autograd._get_sequence_nr`, a
counter of each thread's nodes, and
`Variable._execution_engine.queue_callback`, by which DistributedDataParallel waits for the end of a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


def nodes_made() -> int:
    """How many nodes of autograd graphs this thread has made so far."""
    return torch.autograd._get_sequence_nr()


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call when the backward that is running has ended. To be called from one of its hooks."""
    Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Whether this thread is running a backward."""
    return torch._C._current_graph_task_id() != -1


def nodes_of(results: Iterable[Any]) -> list[Any]:
    """The nodes by which a backward comes to these results, each once."""
    found = {value.grad_fn for value in results if isinstance(value, Tensor) and value.grad_fn is not None}
    return list(found)
