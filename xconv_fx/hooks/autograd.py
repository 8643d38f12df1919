"""Where autograd is: how many nodes a thread has made, when a backward ends, and who called the one that runs.

On CUDA a backward runs in a thread of autograd's own, one for each device, in which no context variable has the value
that the program gave it. PyTorch hands the context of whoever called the backward to these threads, under the name
"context", and runs compiled backwards in it.

Private parts of PyTorch, read in torch 2.13: `torch._C._current_graph_task_id`, `torch.autograd._get_sequence_nr`, a
counter of each thread's nodes, and `_sequence_nr` of a node, what that was when the node was made; `_input_metadata`
and `_raw_saved_...` of nodes; a tensor's `_version`; `_is_key_in_tls` and `_get_obj_in_tls` of `torch._C`
(`torch/autograd/graph.py`, `_engine_run_backward`); and `Variable._execution_engine.queue_callback`, by which
DistributedDataParallel waits for the end of a backward.
"""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

_CONTEXT = "context"


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


def as_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which within a backward sees the context variables of whoever called that.

    What this thread has set itself stays as it is.
    """

    @functools.wraps(function, updated=())
    def run(*arguments: Any, **keywords: Any) -> Any:
        context = _missing_context()
        if context is None:
            return function(*arguments, **keywords)
        return context.run(function, *arguments, **keywords)

    return run


def _missing_context() -> contextvars.Context | None:
    """This thread's context with what only the caller of the backward has; None where nothing is missing."""
    if not in_backward() or not torch._C._is_key_in_tls(_CONTEXT):
        return None
    called: contextvars.Context | None = torch._C._get_obj_in_tls(_CONTEXT)
    here = contextvars.copy_context()
    missing = {} if called is None else {variable: value for variable, value in called.items() if variable not in here}
    for variable, value in missing.items():
        here.run(variable.set, value)
    return here if missing else None


def nodes_of(results: Iterable[Any]) -> list[Any]:
    """The nodes by which a backward comes to these results, each once."""
    found = {value.grad_fn for value in results if isinstance(value, Tensor) and value.grad_fn is not None}
    return list(found)
