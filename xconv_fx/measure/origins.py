"""What is allocated at the peak of a piece of code, and by which of the user's lines.

The same events that `measure.py` adds up, with their origins. On the CPU these are the profiler's nodes above an
allocation: operators, and calls of Python (`with_stack`). What the backward allocates carries the line of the forward
operation that it differentiates, which autograd's sequence numbers link it to. On CUDA it is the allocator's own
history (`torch.cuda.memory._record_memory_history`), whose frames end at the line that called `backward`.

Known gaps: `a * b` and other operators of Python leave no call behind, so their line is that of the function they are
in; recording calls makes Python several times slower. The CUDA half is tested on recorded histories, not on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.hooks import profiler
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.units import format_size

from . import Event, Peak, cpu_events, replay, storage_bytes

SHOWN = 8
ENGINE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Frame:
    """A line of code. `exact` is False where only the function's first line is known."""

    file: str
    line: int
    function: str
    exact: bool = True

    def __str__(self) -> str:
        path = Path(self.file)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"{shown}:{self.line} ({'' if self.exact else 'in '}{self.function})"


@dataclass(frozen=True)
class Allocation:
    """Bytes that were alive at the peak, the operation that allocated them and the line that led to it."""

    bytes: int
    operation: str
    frame: Frame | None = None


class Recording:
    """What `recorded` found, once its block has ended: the peak, and what was alive at it, largest first."""

    def __init__(self) -> None:
        self.peak = Peak(0, 0)
        self._find: Callable[[], tuple[Allocation, ...]] = tuple

    @functools.cached_property
    def alive(self) -> tuple[Allocation, ...]:
        # Found out when somebody asks: walking up from every event takes longer than adding them up.
        return self._find()

    def table(self, limit: int = SHOWN) -> str:
        """The largest allocations, one a line; those of one operation and line are added up."""
        rows = [f"{format_size(self.peak.resident):>9}  there before"] if self.peak.resident else []
        totals: dict[tuple[str, Frame | None], list[int]] = {}
        for item in self.alive:
            totals.setdefault((item.operation, item.frame), []).append(item.bytes)
        ranked = sorted(totals.items(), key=lambda entry: -sum(entry[1]))
        for (operation, frame), sizes in ranked[:limit]:
            times = f" ({len(sizes)} times)" if len(sizes) > 1 else ""
            rows.append(f"{format_size(sum(sizes)):>9}  {operation}{times}{f'  {frame}' if frame else ''}")
        if rest := ranked[limit:]:
            rows.append(f"{format_size(sum(sum(sizes) for _, sizes in rest)):>9}  {len(rest)} more")
        return "\n".join(rows)


@contextlib.contextmanager
def recorded(resident: Iterable[Any] = (), device: str | None = None, lines: bool = True) -> Iterator[Recording]:
    """Records what the block allocates on `device`, "cpu" or "cuda". Without `lines` no line of code is known, and
    Python runs at its usual speed.

    `resident` are the tensors and modules that are there before, or tuples, lists and dicts of them: their storages
    count once each. Of several GPUs the one that they are on is recorded, else the current one. Without a `device` it
    is the kind that they are on, CUDA if on both; without any of them, CUDA if the block allocates there. Raises
    `RuntimeError` if another profiler is running.
    """
    tensors = tensors_of(resident)
    found = {kind: Recording() for kind in _kinds(tensors, device)}
    recording = Recording()
    # Cyclic garbage of earlier code would otherwise be freed at a random moment of this one.
    gc.collect()
    with contextlib.ExitStack() as stack:
        if "cuda" in found:
            index = next((tensor.device.index for tensor in tensors if tensor.is_cuda), None)
            stack.enter_context(_cuda(found["cuda"], torch.cuda.current_device() if index is None else index))
        if "cpu" in found:
            stack.enter_context(_cpu(found["cpu"], lines))
        yield recording
    kind = next((kind for kind in found if found[kind].peak.transient), next(reversed(found)))
    recording.peak = Peak(storage_bytes(tensors, kind), found[kind].peak.transient)
    recording._find = found[kind]._find


def _kinds(tensors: Iterable[Tensor], device: str | None) -> tuple[str, ...]:
    """Kinds of devices to watch, the first that the code allocates on being the one that counts."""
    if device is not None:
        return (device,)
    there = {tensor.device.type for tensor in tensors}
    if "cuda" in there:
        return ("cuda",)
    return ("cpu",) if there or not torch.cuda.is_available() else ("cuda", "cpu")


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in modules, and in tuples, lists and dicts of them; gradients included."""
    found: list[Tensor] = []
    for leaf in tree_leaves(values):
        tensors = [leaf] if isinstance(leaf, Tensor) else []
        if isinstance(leaf, nn.Module):
            tensors = [*leaf.parameters(), *leaf.buffers()]
        found += tensors
        found += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return [tensor for tensor in found if not tensor.is_meta]


@contextlib.contextmanager
def _cpu(recording: Recording, lines: bool) -> Iterator[None]:
    with cpu_events(stacks=lines) as events:
        yield
    highest, alive = _at_maximum([(event.address, event.size) for event in events])
    recording.peak = Peak(0, highest)
    recording._find = lambda: _origins([events[number] for number in alive])


@contextlib.contextmanager
def _cuda(recording: Recording, device: int) -> Iterator[None]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with profiler.cuda_history(device) as history:
        yield
        torch.cuda.synchronize(device)
    recording.peak = Peak(0, torch.cuda.max_memory_allocated(device) - before)
    recording._find = lambda: alive_in_history(history)


def alive_in_history(history: Sequence[Mapping[str, Any]]) -> tuple[Allocation, ...]:
    """What is alive at the peak of a CUDA allocator's history, largest first."""
    kinds = {"alloc": 1, "free_completed": -1}
    entries = [entry for entry in history if entry["action"] in kinds]
    _, alive = _at_maximum([(entry["addr"], kinds[entry["action"]] * entry["size"]) for entry in entries])
    return tuple(
        Allocation(entry["size"], "allocation", _users_frame(_history_frames(entry)))
        for entry in map(entries.__getitem__, alive)
    )


def _at_maximum(events: Sequence[tuple[int, int]]) -> tuple[int, list[int]]:
    """The most bytes alive at once, and the numbers of the events that allocated them, largest first."""
    highest, when = max(((current, -number) for number, (current, _) in enumerate(replay(events))), default=(0, 0))
    if highest == 0:
        return 0, []
    for number, (_, alive) in enumerate(replay(events)):
        if number == -when:
            return highest, [made for _, made in sorted(alive.values(), key=lambda item: (-item[0], item[1]))]
    raise AssertionError("the maximum is one of the events")


def _origins(events: Sequence[Event]) -> tuple[Allocation, ...]:
    roots = {id(root): root for root in (_root(event.node) for event in events)}
    forward = _forward_operations(list(roots.values()))
    return tuple(_allocation(event.node, event.size, forward) for event in events)


def _forward_operations(stack: list[Any]) -> dict[int, Any]:
    """The outermost forward operations below these nodes, by their autograd sequence numbers."""
    found: dict[int, Any] = {}
    while stack:
        node = stack.pop()
        if _is_engine(node):
            continue
        stack.extend(node.children)
        if (number := _sequence(node)) >= 0:
            found.setdefault(number, node)
    return found


def _allocation(node: Any, size: int, forward: Mapping[int, Any]) -> Allocation:
    above = list(_parents(node))
    operations = [parent for parent in above if profiler.is_operator(parent)]
    operation = operations[-1].name if operations else "allocation"
    engine = next((index for index, parent in enumerate(operations) if _is_engine(parent)), None)
    if engine is None:
        return Allocation(size, operation, _users_frame(_python_frames(above)))
    inner = operations[:engine]
    operation = inner[-1].name if inner else operation
    number = next((number for parent in inner if (number := _sequence(parent)) >= 0), -1)
    made = forward.get(number)
    frames = _python_frames(above if made is None else list(_parents(made)))
    return Allocation(size, f"{operation}{'' if made is None else f' of {made.name}'}", _users_frame(frames))


def _parents(node: Any) -> Iterator[Any]:
    while (node := node.parent) is not None:
        yield node


def _root(node: Any) -> Any:
    for parent in _parents(node):
        node = parent
    return node


def _is_engine(node: Any) -> bool:
    """Whether this is autograd's engine running a node of the backward."""
    return profiler.is_operator(node) and node.name.startswith(ENGINE)


def _sequence(node: Any) -> int:
    """The number that autograd gave to an operation, or -1."""
    return node.extra_fields.sequence_number if profiler.is_operator(node) else -1


def _python_frames(above: Iterable[Any]) -> Iterator[Frame]:
    """Frames of Python, innermost first. A call knows the line that it was made from, and only that."""
    inner = True
    for node in above:
        callee, caller = profiler.python_call(node)
        if inner and callee is not None:
            yield Frame(*callee, exact=False)
        if caller is not None:
            yield Frame(*caller)
        inner = inner and callee is None and caller is None


def _history_frames(entry: Mapping[str, Any]) -> Iterator[Frame]:
    for frame in entry.get("frames", ()):
        yield Frame(frame["filename"], frame["line"], frame["name"])


def _users_frame(frames: Iterable[Frame]) -> Frame | None:
    """The innermost frame that is in no library."""
    for frame in frames:
        path = _path(frame.file)
        if path is not None and not any(path.is_relative_to(folder) for folder in _libraries()):
            return Frame(str(path), frame.line, frame.function, frame.exact)
    return None


@functools.cache
def _path(file: str) -> Path | None:
    """A file as the profiler writes it, which is relative to an entry of `sys.path`; None if there is none such."""
    candidates = [Path(folder or ".") / file for folder in ("", *sys.path)]
    return next((path.resolve() for path in candidates if path.is_file()), None)


@functools.cache
def _libraries() -> tuple[Path, ...]:
    """Where code lies that is not the user's: Python's own, installed packages, and this one."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(path).resolve() for path in (*paths, torch.__path__[0], str(Path(__file__).parent)))
