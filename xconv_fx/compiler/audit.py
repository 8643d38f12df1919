"""The physical peak of generated code, computed before it is compiled or run.

Inductor's wrapper code is the truth about memory: its allocations, reuses and `del`s, in order. The audit executes
that wrapper on fake tensors, with every generated kernel replaced by nothing, and follows each storage from its
first appearance to its release. Extern kernels (convolutions, matrix products) run their shape rules, so their
outputs count as well; what is allocated inside such a call is measured (`workspace`), but for operators of the user's.
Of code that decides by values, one way is taken: fakes have none.

On CUDA a storage counts as the block that the caching allocator gives it, and cuDNN's workspaces as they are assumed to
be: both by the rules that the planner has.

Checked against torch 2.13.0's Python wrapper. Not counted: memory that a library takes outside the tensor
allocator (oneDNN's scratchpads, cuDNN's algorithm search).
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from xconv_fx.cost_model.allocator import allocated_bytes
from xconv_fx.device.workspace import is_counted, workspace_bytes
from xconv_fx.hooks import dispatch
from xconv_fx.hooks.ahead import storage_of
from xconv_fx.hooks.dispatch import HigherOrderOperator, TorchDispatchMode
from xconv_fx.hooks.fake import FakeTensor, FakeTensorMode
from xconv_fx.hooks.pytree import tree_leaves, tree_map_only

# Names that the wrapper binds for allocation and layout, replaced by their documented meaning on fake tensors.
_ALLOCATORS = ("empty_strided_cpu", "empty_strided_cuda", "empty_strided_xpu", "empty_strided_cpu_pinned")
_NO_OPERATIONS = ("assert_size_stride", "assert_alignment", "run_intermediate_hooks")
# How the wrapper reads a value, and what is uncounted then: all ways through the code but one.
_ITEM = torch.ops.aten._local_scalar_dense.default
_DECIDED = "code that decides by values (torch.cond, while_loop)"


@dataclass(frozen=True)
class Peak:
    """The most bytes alive, at which operation, and the largest buffers there as (operation, bytes)."""

    bytes: int
    at: str
    alive: tuple[tuple[str, int], ...]


class Audit:
    """The replay of one training step: its forward, then its backward on what the forward saved.

    `resident_bytes` are alive throughout and not among the graphs' inputs. After the forward, `saved_bytes` are what it
    holds for the backward besides its inputs, and `held_bytes` that and its results. `uncounted` are operators that may
    allocate inside what nobody knows.
    """

    def __init__(self, resident_bytes: int = 0) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = _Tracker(resident_bytes)
        self.inputs: list[Any] = []
        self.results: list[Any] = []
        self.saved: list[Any] = []
        self.saved_bytes = self.held_bytes = 0

    @property
    def uncounted(self) -> tuple[str, ...]:
        return tuple(sorted(self.tracker.uncounted))

    def forward(self, source: str, inputs: Sequence[Any], results: int) -> Peak:
        """Replay the forward on fakes of `inputs`; its first `results` outputs go to the caller, who holds them."""
        with self.mode:
            self.inputs = [_fake(value) for value in inputs]
            outputs = list(self._call(source, list(self.inputs)))
        self.results, self.saved = outputs[:results], outputs[results:]
        self.saved_bytes = _storage_bytes(self.saved, besides=self.inputs)
        self.held_bytes = _storage_bytes(outputs, besides=self.inputs)
        return self.tracker.take()

    def hold(self, extra_bytes: int) -> None:
        """So many bytes are alive from here on: what a caller makes of the results."""
        self.tracker.resident += extra_bytes

    def loss(self, result_bytes: int) -> Peak:
        """Between forward and backward: what is alive then, and `result_bytes` that a loss outside the graph takes."""
        self.tracker.see((), "the loss", result_bytes)
        return self.tracker.take()

    def backward(self, source: str, inputs: Sequence[Any], tangents: Sequence[bool]) -> Peak:
        """Replay the backward on what the forward saved, in order, and fakes of the gradients (`tangents`).

        Gradients are taken to come contiguous from the loss; of one that the code wants otherwise, AOTAutograd makes
        the copy that is the argument.
        """
        with self.mode:
            saved = iter(self.saved)
            arguments = [
                _fake(value) if tangent else next(saved) for value, tangent in zip(inputs, tangents, strict=True)
            ]
            gradients = [_given(value) for value, tangent in zip(arguments, tangents, strict=True) if tangent]
            self.tracker.see(gradients, "gradient")
            self.saved = []
            del saved
            outputs = self._call(source, arguments)
            # The engine holds the incoming gradients until the backward returns.
            del gradients, outputs
        return self.tracker.take()

    def _call(self, source: str, arguments: list[Any]) -> Any:
        namespace = _load(source)
        with self.tracker:
            self.tracker.see(arguments, "input")
            outputs = namespace["call"](arguments)
            self.tracker.see(outputs, "output")
        return outputs


class _Tracker(TorchDispatchMode):
    """Sums the bytes of live storages after every operation."""

    def __init__(self, resident_bytes: int) -> None:
        super().__init__()
        self.resident = resident_bytes
        self.live: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.peak = Peak(0, "", ())
        self.uncounted: set[str] = set()
        self.answers = itertools.cycle((True, False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM:
            # Code that decides by values: of two branches the first, and a loop's body once.
            self.uncounted.add(_DECIDED)
            dtype = args[0].dtype
            return next(self.answers) if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            # A state of the generator is a tensor like any other.
            result = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, FakeTensor) else _fake(t), result)
            self.see(result, str(func))
            return result
        self.see(result, str(func), workspace_bytes(func, args, kwargs, result))
        if not is_counted(func):
            self.uncounted.add(str(func))
        return result

    def see(self, values: Any, label: str, extra: int = 0) -> None:
        """Count these values, and for once `extra` bytes."""
        for tensor in tree_leaves(values):
            # A sparse tensor owns nothing: its indices and values are tensors of their own, seen when they were made.
            if isinstance(tensor, FakeTensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                place = storage_of(tensor)
                assert place is not None
                row = self.live.get(place)
                if row is None or row[0].expired():
                    self.live[place] = (StorageWeakRef(storage), _bytes(tensor), label)
        self.live = {key: row for key, row in self.live.items() if not row[0].expired()}
        total = self.resident + sum(row[1] for row in self.live.values()) + extra
        if total > self.peak.bytes:
            largest = sorted(((row[2], row[1]) for row in self.live.values()), key=lambda pair: -pair[1])
            self.peak = Peak(total, label, tuple(largest[:12]))

    def take(self) -> Peak:
        """The peak since the last call."""
        peak, self.peak = self.peak, Peak(0, "", ())
        return peak


dispatch.show_checkpointed_draws(_Tracker)


def _bytes(tensor: torch.Tensor) -> int:
    """What the allocator of its device gives the storage of a tensor."""
    return allocated_bytes(tensor.untyped_storage().nbytes(), tensor.device.type)


def _storage_bytes(values: Sequence[Any], besides: Sequence[Any]) -> int:
    """Bytes of the storages behind the tensors among `values` that are behind none of `besides`."""
    sizes = {storage_of(v): _bytes(v) for v in values if isinstance(v, torch.Tensor)}
    for value in besides:
        if isinstance(value, torch.Tensor):
            sizes.pop(storage_of(value), None)
    return sum(sizes.values())


def _fake(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return value


def _given(gradient: Any) -> Any:
    """A gradient as the engine holds it."""
    if isinstance(gradient, torch.Tensor) and not gradient.is_contiguous():
        return torch.empty(gradient.size(), dtype=gradient.dtype, device=gradient.device)
    return gradient


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
    namespace["copy_if_misaligned"] = _same  # Asks for addresses, which fakes have none of.
    return namespace


class _Kernel:
    """Stands for a generated kernel: calling it, or `.run`ning it (Triton), does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    run = __call__


_kernel = _Kernel()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _allocate(name: str) -> Callable[..., torch.Tensor]:
    device = "cuda" if name.endswith("cuda") else "xpu" if name.endswith("xpu") else "cpu"

    def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return allocate


def _reinterpret(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)
