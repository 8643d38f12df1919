"""Where autograd is: how many nodes a thread has made, and when a backward ends.

Private parts of PyTorch, read in torch 2.13: `torch._C._current_graph_task_id`, `torch.autograd._get_sequence_nr`, a
counter of each thread's nodes, and `_sequence_nr` of a node, what that was when the node was made; `_input_metadata`
and `_raw_saved_...` of nodes; a tensor's `_version`; and `Variable._execution_engine.queue_callback`, by which
DistributedDataParallel waits for the end of a backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


def nodes_made() -> int:
    """How many nodes of autograd graphs this thread has made so far."""
    return torch.autograd._get_sequence_nr()


def number_of(node: Any) -> int:
    """How many nodes the thread had made when it made this one."""
    return int(node._sequence_nr())


def bytes_of(node: Any) -> int:
    """Bytes of what the operation of a node returned."""
    described = node._input_metadata
    return sum(math.prod(int(n) for n in one.shape) * one.dtype.itemsize for one in described if one is not None)


def holds_tensors(node: Any) -> bool:
    """Whether a node holds tensors for its backward. They are not asked for: unpacking them may cost a lot."""
    try:
        return any(name.startswith("_raw_saved") and getattr(node, name) != () for name in dir(node))
    except RuntimeError:  # Its backward has run.
        return True


def version_of(tensor: Tensor) -> int:
    """How often the tensor's memory was changed in place since it was made."""
    return tensor._version


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
