"""The physical peak of a training step and its time, as the device sees them.

What the project promises is bytes of *physical* peak, so this is the module that decides whether a promise was kept: it
asks the allocator, never the graph. On CPU the allocator's events come from `torch.profiler` with
`profile_memory=True`; the running sum of what they allocate and free has a maximum, and that is the peak. On CUDA the
allocator keeps the maximum itself.

Assumptions and known gaps, all of the CPU measurement:

* Blocks that were allocated before the step and are freed inside it are not credited. The profiler reports only some of
  these frees (those of blocks it saw being allocated during an earlier profile), so crediting them would make
  the result depend on history; ignoring all of them makes it an upper bound. `training_peak` drops the gradients of the
  previous step before it measures, which leaves nothing of that kind in an ordinary step.
* Only the calling thread is seen, which is where PyTorch allocates: the CPU backward runs in the thread that calls it,
  and OpenMP workers write into buffers that their caller allocated. A data-loading thread is not part of the step.
* Memory that does not come from PyTorch's allocator is invisible: oneDNN's scratchpads, NumPy arrays, code.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from xconv_fx.hooks.profiler import is_allocation
from xconv_fx.hooks.pytree import tree_leaves

DEVICES = ("cpu", "cuda")

# Kineto prints a "USDT" line at each start and stop of a profile at every log level below this one.
_KINETO_QUIET = "6"


@dataclass(frozen=True)
class Peak:
    """What one step needs at its worst moment, in bytes.

    `resident` is what was there before the step began and stayed (parameters, buffers, inputs), each storage counted
    once; `transient` the most that was allocated on top of it at any moment of the step.
    """

    resident: int
    transient: int

    @property
    def bytes(self) -> int:
        """The physical peak: resident and transient together."""
        return self.resident + self.transient


def physical_peak(
    step: Callable[[], object], *, resident: Iterable[Tensor] = (), device: torch.device | str | None = None
) -> Peak:
    """Runs `step` once and returns its physical peak on `device`.

    `resident` are the tensors that are alive before the step and after it; views of one storage count once, and tensors
    of other devices not at all. `device` is by default that of the first resident tensor, or the CPU. The step is
    measured as it is: compile and warm up before. Raises `ValueError` for a device that is neither CPU nor CUDA, and
    `RuntimeError` if another profiler is running.
    """
    tensors = list(resident)
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    device = torch.device(device)
    if device.type not in DEVICES:
        raise ValueError(f"device: no way to measure the peak of {device.type!r}; choose from {', '.join(DEVICES)}")
    # Cyclic garbage of earlier steps would otherwise be freed at a random moment of this one.
    gc.collect()
    transient = _cuda_transient(step, device) if device.type == "cuda" else _cpu_transient(step)
    return Peak(resident=storage_bytes(tensors, device), transient=transient)


def allocated_by(call: Callable[[], object]) -> tuple[int, list[Tensor]]:
    """The most bytes that `call` holds of what it allocates on the CPU, its result included, and the result's tensors.

    Without the collection of garbage that `physical_peak` begins with: for short calls that leave none.
    """
    kept: list[object] = []
    transient = _cpu_transient(lambda: kept.append(call()))
    return transient, [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]


def training_peak(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    loss: Callable[[Any], Tensor],
    *,
    resident: Iterable[Tensor] = (),
    warmup: int = 1,
) -> Peak:
    """The physical peak of one forward and backward of `model`, which may be compiled.

    Resident are parameters, buffers, `inputs` and the further tensors in `resident` (targets, optimiser state).
    The model's output is held during the backward, as the usual training loop holds it in a variable.
    `warmup` steps run before (a compiled model compiles in the first). Gradients are None when the measured step
    begins, so they are part of what it allocates, and None again afterwards.
    """
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)

    def step() -> None:
        output = model(*args)
        loss(output).backward()

    for _ in range(warmup):
        step()
        model.zero_grad(set_to_none=True)
    held = [*args, *model.parameters(), *model.buffers(), *resident]
    model.zero_grad(set_to_none=True)
    try:
        return physical_peak(step, resident=held, device=args[0].device)
    finally:
        model.zero_grad(set_to_none=True)


def storage_bytes(tensors: Iterable[Tensor], device: torch.device | str | None = None) -> int:
    """Bytes of the storages behind `tensors` on `device` (default: any), each counted once for all of its views."""
    only = None if device is None else torch.device(device)
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        same_type = only is None or tensor.device.type == only.type
        if same_type and (only is None or only.index is None or tensor.device.index == only.index):
            storage = tensor.untyped_storage()
            sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def interleaved_times(
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 9, warmup: int = 2
) -> dict[str, float]:
    """Median wall-clock seconds of each function, over `repeats` rounds that run every function once.

    Running them in turn lets a slow spell of the machine fall on all of them alike; each round starts with another
    function, so that none always runs in the wake of the same neighbour.
    """
    if repeats < 1:
        raise ValueError(f"repeats: {repeats} rounds measure nothing; give at least 1")
    for _ in range(warmup):
        for function in functions.values():
            function()
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(functions[name]))
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _seconds(function: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cuda_transient(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Event(NamedTuple):
    """What an allocator did: positive bytes allocate, negative ones free. `node` is the profiler's node of it."""

    address: int
    size: int
    node: Any = None


class Events(list[Event]):
    """Events in order. `tree` are the roots above their nodes, which know their parents only as long as those live."""

    tree: Sequence[Any] = ()


def _cpu_transient(step: Callable[[], object]) -> int:
    with cpu_events() as events:
        step()
    return running_maximum((event.address, event.size) for event in events)


@contextlib.contextmanager
def cpu_events(stacks: bool = False) -> Iterator[Events]:
    """Watches the CPU allocator; the list is filled at the end, in the order of the events.

    With `stacks` Python's calls are among the parents of an event's node, which takes time at every call. Raises
    `RuntimeError` if another profiler is running.
    """
    events = Events()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_kineto())
        with warnings.catch_warnings():
            # torch 2.12 says that events of former cycles are lost; there is one cycle. To ask for them, as it advises,
            # has the names of all events read, which with stacks are not always text.
            warnings.filterwarnings("ignore", message=".*Profiler clears events")
            profiled = stack.enter_context(
                profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_stack=stacks)
            )
        # A byte allocated and freed on either side of the step proves that the profiler saw all there was to see.
        torch.empty(1, dtype=torch.uint8)
        yield events
        torch.empty(1, dtype=torch.uint8)
    kineto = profiled.profiler
    if kineto is None or kineto.kineto_results is None:
        raise RuntimeError("the profiler returned no results")
    events.tree = kineto.kineto_results.experimental_event_tree()
    found = _allocations(events.tree)
    marker = [1, -1]
    if [e.size for e in found[:2]] != marker or [e.size for e in found[-2:]] != marker or len(found) < 4:
        raise RuntimeError("the profiler lost allocator events; the peak of this step is unknown")
    events.extend(found[2:-2])


def running_maximum(events: Iterable[tuple[int, int]]) -> int:
    """The most bytes alive at once, given (address, bytes) in order: positive bytes allocate, negative ones free."""
    return max((current for current, _ in replay(events)), default=0)


def replay(events: Iterable[tuple[int, int]]) -> Iterator[tuple[int, Mapping[int, tuple[int, int]]]]:
    """After each (address, bytes): the bytes alive, and what is alive as {address: (bytes, number of the event)}.

    Frees of addresses that were not allocated among the events are ignored, and an address that is allocated again
    without a free in between is taken to have been freed (in a thread that nobody watched).
    """
    alive: dict[int, tuple[int, int]] = {}
    current = 0
    for number, (address, size) in enumerate(events):
        current -= alive.pop(address, (0, 0))[0]
        if size > 0:
            alive[address] = size, number
            current += size
        yield current, alive


def _allocations(roots: Sequence[Any]) -> list[Event]:
    """Every CPU allocator event in a profiler's event tree, in the order in which they happened.

    The tree lists children under the operator in which they fell, by time, so pre-order is the order of a thread; the
    stable sort keeps it among events of the same nanosecond.
    """
    found = []
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        stack.extend(reversed(node.children))
        # Not by their names: those of Python's calls, of which there may be millions, need not be text.
        if is_allocation(node) and node.extra_fields.device.type == "cpu":
            found.append(Event(node.extra_fields.ptr, node.extra_fields.alloc_size, node))
    return sorted(found, key=lambda event: event.node.start_time_ns)


@contextlib.contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keeps Kineto from writing two lines to stderr at every measurement, unless the user has set its log level.

    Kineto reads the variable when a process profiles for the first time. What it would have said about a profile gone
    wrong is found out by `_cpu_transient` itself. The allocator's warning about a "memory block of unknown size" is
    left alone: it is true, and says that the step frees what was allocated before it.
    """
    name = "KINETO_LOG_LEVEL"
    chosen = os.environ.get(name)
    os.environ.setdefault(name, _KINETO_QUIET)
    try:
        yield
    finally:
        if chosen is None:
            os.environ.pop(name, None)
