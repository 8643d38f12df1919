"""Where allocations come from: nodes of the profiler's event tree, and the CUDA allocator's history.

Private parts of PyTorch, read in torch 2.13: `torch._C._profiler` (the types of a node's `extra_fields`) and
`torch.cuda.memory._record_memory_history` with `_snapshot`, the format that https://docs.pytorch.org/memory_viz reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._C import _profiler

# File, line and function.
Place = tuple[str, int, str]


def is_operator(node: Any) -> bool:
    """Whether a node of the event tree is an operator, or something else that PyTorch records as one."""
    return node.tag == _profiler._EventType.TorchOp


def is_allocation(node: Any) -> bool:
    """Whether a node of the event tree is an allocation or a release."""
    return node.tag == _profiler._EventType.Allocation


def python_call(node: Any) -> tuple[Place | None, Place | None]:
    """Of a call of Python: the function that is called (its first line), and the line that calls it; else Nones."""
    if node.tag == _profiler._EventType.PyCCall:
        return None, _place(node.extra_fields.caller)
    if node.tag == _profiler._EventType.PyCall:
        return _place(node.extra_fields.callsite), _place(node.extra_fields.caller)
    return None, None


def _place(frame: Any) -> Place:
    return frame.file_name, frame.line_number, frame.function_name


@contextlib.contextmanager
def cuda_history(device: int) -> Iterator[list[Mapping[str, Any]]]:
    """A CUDA device's allocations and frees within the block, in order; filled when it ends."""
    history: list[Mapping[str, Any]] = []
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        yield history
        history.extend(torch.cuda.memory._snapshot()["device_traces"][device])
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
