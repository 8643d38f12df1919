"""The physical peak of generated code, computed before it is compiled or run.

Inductor's wrapper code is the truth about memory: its allocations, reuses and `del`s, in order. The audit executes
that wrapper on fake tensors, with every generated kernel replaced by nothing, and follows each storage from its
first appearance to its release. Extern kernels (convolutions, matrix products) run their shape rules, so their
outputs count as well; what a library allocates inside such a call is counted where it is known (`workspace`).

Checked against torch 2.13.0's Python wrapper. Not counted: memory that a library takes outside the tensor
allocator (oneDNN's scratchpads, cuDNN's algorithm search), and rounding of the CUDA caching allocator.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .workspace import workspace_bytes

# Names that the wrapper binds for allocation and layout, replaced by their documented meaning on fake tensors.
_ALLOCATORS = ("empty_strided_cpu", "empty_strided_cuda", "empty_strided_xpu", "empty_strided_cpu_pinned")
_NO_OPERATIONS = ("assert_size_stride", "assert_alignment", "run_intermediate_hooks")


@dataclass(frozen=True)
class Replay:
    """What a replay saw: the peak in bytes above the inputs that stay, where it was, and what was alive there."""

    peak: int
    at: str
    alive: tuple[tuple[str, int], ...]
    output_bytes: int


class _Tracker(TorchDispatchMode):
    """Sums the bytes of live storages after every operation."""

    def __init__(self, resident: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.resident = {tensor.untyped_storage()._cdata for tensor in resident}
        self.live: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.peak, self.at, self.alive = 0, "", ()  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(result, str(func), workspace_bytes(func, args))
        return result

    def see(self, values: Any, label: str, extra: int = 0) -> None:
        for tensor in torch.utils._pytree.tree_leaves(values):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.resident and key not in self.live:
                    self.live[key] = (StorageWeakRef(storage), storage.nbytes(), label)
        self.live = {key: row for key, row in self.live.items() if not row[0].expired()}
        total = sum(row[1] for row in self.live.values()) + extra
        if total > self.peak:
            largest = sorted(((row[2], row[1]) for row in self.live.values()), key=lambda pair: -pair[1])
            self.peak, self.at, self.alive = total, label, tuple(largest[:8])


def replay(source: str, inputs: Sequence[Any], static: Sequence[bool], keep_inputs: Sequence[bool]) -> Replay:
    """Run the wrapper `source` on fake tensors shaped like `inputs` and return the peak it reaches.

    `static[i]`: input i is resident for the whole step (parameters, buffers, the user's inputs) and is not counted
    here. `keep_inputs[i]`: the caller holds input i during the call, so that it counts until the end.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        arguments = [_fake(value) for value in inputs]
        namespace = _load(source)
        resident = [a for a, fixed in zip(arguments, static, strict=True) if fixed and isinstance(a, torch.Tensor)]
        held = [a for a, kept in zip(arguments, keep_inputs, strict=True) if kept]
        tracker = _Tracker(resident)
        with tracker:
            tracker.see(arguments, "input")
            outputs = namespace["call"](arguments)
            tracker.see(outputs, "output")
        output_bytes = sum(
            row[1] for row in tracker.live.values() if not row[0].expired() and row[2] not in ("input", "held")
        )
        del held
    return Replay(tracker.peak, tracker.at, tracker.alive, output_bytes)


def _fake(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return value


def _load(source: str) -> dict[str, Any]:
    """Execute the wrapper's module with kernels and allocators replaced; nothing is compiled."""
    tree = ast.parse(source)
    kernels: list[str] = []
    body: list[ast.stmt] = []
    for node in tree.body:
        text = ast.dump(node)
        if "async_compile" in text or "AsyncCompile" in text:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                kernels += [target.id for target in node.targets if isinstance(target, ast.Name)]
            continue
        body.append(node)
    tree.body = body
    namespace: dict[str, Any] = {"__name__": "xconv_fx_replay"}
    for name in kernels:
        namespace[name] = _kernel
    exec(compile(tree, "<inductor wrapper>", "exec"), namespace)
    namespace.update(dict.fromkeys(_NO_OPERATIONS, _nothing))
    namespace.update({name: _allocate(name) for name in _ALLOCATORS})
    namespace["reinterpret_tensor"] = _reinterpret
    return namespace


class _Kernel:
    """Stands for a generated kernel: calling it, or `.run`ning it (Triton), does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    run = __call__


_kernel = _Kernel()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _allocate(name: str) -> Callable[..., torch.Tensor]:
    device = "cuda" if name.endswith("cuda") else "xpu" if name.endswith("xpu") else "cpu"

    def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return allocate


def _reinterpret(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)
