"""The first-step check: what a training step really takes, losses and optimiser included, and what follows from it.

A step begins with the first call, with gradients enabled, of the compiled model, or of a graph of the session where it
is called otherwise, and goes on over further calls, the loss and the backward, until an optimiser has made its step or
the next call comes after a backward: code of the model around its graphs, and graphs without a backward, belong to it.
What it took is told at the end of every backward and of the optimiser's step; what a program does between these two,
or after them, is no part of it. A step that is over its budget is settled there and then. Calls without a backward
(evaluation with gradients enabled) begin anew as soon as their results are dropped. A call within a backward is part
of its step: checkpointing runs forwards again there.

The first step that runs whole after compiling is measured (`measure/step_memory.py`), of those that begin with
arguments of the same sizes; on CUDA the next, for in the first Inductor and cuDNN time kernels, which takes memory; one
in which a graph behind a graph break, or a backward, is compiled holds more than those that follow. Later ones are
where something is new: another loss, by the number of autograd nodes that are made between forward and backward, or
where that runs in another thread, as on CUDA, until the next step. All other steps count calls whose backward is
outstanding, and cost nothing else.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from xconv_fx import hooks
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.hooks.weak import weak_method
from xconv_fx.measure.step_memory import StepMemory, prepare
from xconv_fx.plan.log import log

from . import unplanned

if TYPE_CHECKING:
    from .session import GraphRecord

# Steps that are measured because of a loss that was not seen before, in all.
LOSSES = 4
# Steps in a row that are measured to meet that loss again.
LOOKS = 4

# The shapes of the tensors that a call was given, and whether they require a gradient.
Sizes = tuple[tuple[torch.Size, bool], ...]

# Hooks of optimisers that are to be removed with the next call: some optimiser may be going through them now.
_LEFT: list[RemovableHandle] = []


class Judge(Protocol):
    """Who is told what steps took."""

    @property
    def module(self) -> nn.Module | None:
        """The model that runs, whose parameters and buffers are there throughout."""

    def measured(self, graphs: Sequence[CheckedGraph], peak: int) -> bool:
        """A step of these graphs took `peak` bytes so far; returns whether that settles it."""

    def called(self, graphs: Sequence[CheckedGraph]) -> None:
        """In a step that is not measured, these graphs ran more often before the backward than planned."""


class CheckedGraph:
    """A compiled graph, which tells its session's check what it does.

    `record` is what its session knows of it, `planned` how many calls without a backward it may have, and `most` how
    many there were at once in this step.
    """

    def __init__(self, function: Callable[..., Any], check: StepCheck, record: GraphRecord) -> None:
        self.function, self.check, self.record, self.planned = function, check, record, record.plan.calls
        self.outstanding = self.most = 0
        self.ran = False

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled() or hooks.compile_id() is not None:
            return self.function(*inputs)  # The second: DDPOptimizer runs its graphs on fake tensors.
        self.check.begin_call(self, inputs)
        self.ran = True
        results = self.function(*inputs)
        nodes = hooks.nodes_of(results)
        if nodes:
            call = _Call(self)
            for node in nodes:
                node.register_prehook(call)
        self.check.end_call()
        return results


class _Call:
    """A call whose backward is outstanding, until its node runs or is dropped: the node's hook, which dies with it."""

    def __init__(self, graph: CheckedGraph) -> None:
        self.graph, self.open = graph, True
        graph.outstanding += 1
        graph.most = max(graph.most, graph.outstanding)

    @torch.compiler.disable  # A backward may run inside of a compiled function.
    def __call__(self, gradients: Any) -> None:
        self.close()
        self.graph.check.begin_backward()

    def close(self) -> None:
        if self.open:
            self.open = False
            self.graph.outstanding -= 1

    __del__ = close


class StepCheck:
    """Measures steps of the graphs of one session.

    `wanted` is how many more steps are looked at, `unmeasured` the sizes with which steps begin that are to be measured
    besides, and `losses` which were measured, by how many nodes they make. A step whose first call began before its
    session was known is measured from its first graph on, and the next as a whole.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.wanted, self.possible = 1, True
        self.memory: StepMemory | None = None
        self.graphs: dict[CheckedGraph, None] = {}
        self.losses: set[int] = set()
        self.unmeasured: set[Sizes] = set()
        self.backward_seen = self.queued = False
        self._nodes = self._thread = self._inside = 0
        self._loss: int | None = None
        self._measured = False
        self._device: str | None = None
        self._begun = self._partial = False
        self._sizes: Sizes = ()
        self._handles: list[RemovableHandle] = []

    def again(self) -> None:
        """Measure the next step that begins as this one: what runs in it is new."""
        self.unmeasured.add(self._sizes)

    def enter(self, arguments: Any) -> None:
        """The model is about to be called, all graphs of which this check knows."""
        self._inside += 1
        if self._inside == 1 and self._device is not None:
            tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
            self._begin(self._device, tuple((value.shape, value.requires_grad) for value in tensors))
            if self.memory is not None:
                self.memory.resident(tensors)

    def leave(self) -> None:
        """The model's call has ended."""
        self._inside -= 1

    def begin_call(self, graph: CheckedGraph, inputs: Sequence[Any]) -> None:
        """A graph is about to run."""
        self._device = graph.record.plan.device
        if not self._inside:
            self._begin(self._device, partial=unplanned.watched())
        self.graphs[graph] = None
        if self.memory is not None:
            self.memory.resident(inputs)
            if not graph.ran:
                self.memory.runs_anew()

    def _begin(self, device: str, sizes: Sizes = (), partial: bool = False) -> None:
        """A call begins, and with it a step if none goes on."""
        self.queued = False
        while _LEFT:
            _LEFT.pop().remove()
        if hooks.in_backward():
            return
        if self.backward_seen:
            self._look_back()
            self.stop()
            self._new_step()
        elif not any(g.outstanding for g in self.graphs):
            self.stop()  # What ran so far was dropped without a backward.
            self._begun = False
        if self._begun:
            return
        self._begun, self._sizes, self._partial = True, sizes, partial
        if self.possible and (self.wanted or sizes in self.unmeasured):
            self._start(device)

    def end_call(self) -> None:
        """A graph has run."""
        self._nodes, self._thread = hooks.nodes_made(), threading.get_ident()

    def begin_backward(self) -> None:
        """A backward comes to a graph; the first one of a step tells how often its graphs ran, and with which loss."""
        if not self.backward_seen:
            self.backward_seen, self._measured = True, self.memory is not None
            self._loss = self._nodes_since()
            self._look_at_calls()
        if self.memory is not None and not self.queued:
            self.queued = True
            hooks.at_end_of_backward(torch.compiler.disable(self._end_backward))

    def _nodes_since(self) -> int | None:
        """Nodes that were made since the last call ended; None in another thread, for the counter is a thread's own."""
        return hooks.nodes_made() - self._nodes if threading.get_ident() == self._thread else None

    def _look_at_calls(self) -> None:
        if self._measured:
            self.unmeasured.discard(self._sizes)
        elif more := [graph for graph in self.graphs if graph.most > graph.planned]:
            self.judge.called(more)

    def _look_back(self) -> None:
        """A step is over: whether another with its loss is to be measured."""
        loss = (self._nodes_since() if self._loss is None else self._loss) or 0
        new = loss not in self.losses and len(self.losses) < LOSSES
        if self._measured:
            self.wanted = int(self._partial) if new else max(self.wanted - 1, 0)
            self.losses.add(loss)
        elif new:
            self.wanted = LOOKS

    def _end_backward(self) -> None:
        self.queued = False
        if self.memory is not None:
            self.memory.keep()
            self._tell()

    def _tell(self) -> None:
        if self.memory is None:
            return
        if self.memory.unusual:
            self.again()
        elif self.judge.measured(list(self.graphs), self.memory.peak):
            self.stop()

    def stop(self) -> None:
        """The measured step is over."""
        if self.memory is not None:
            self.memory.end()
            self.memory = None
            _LEFT.extend(self._handles)
            self._handles.clear()

    def __del__(self) -> None:
        _LEFT.extend(self._handles)

    def _new_step(self) -> None:
        self.backward_seen = self._begun = False
        self.graphs = dict.fromkeys(graph for graph in self.graphs if graph.outstanding)
        for graph in self.graphs:
            graph.most = graph.outstanding

    def _start(self, device: str) -> None:
        try:
            prepare(device)
            # Tracebacks of what was tried while building or compiling keep frames, and with them this step's tensors.
            gc.collect()
            self.memory = StepMemory(device)
        except Exception as error:
            self.possible = False
            log.warning("the memory of training steps is not checked: %s", str(error).partition("\n")[0])
            return
        module = self.judge.module
        if module is not None:
            self.memory.resident([*module.parameters(), *module.buffers()])
        before, after = weak_method(self._optimiser_begins), weak_method(self._optimiser_ends)
        self._handles[:] = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def _optimiser_begins(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        if self.memory is not None and not torch.compiler.is_compiling():
            if not self.backward_seen:
                self.memory.keep()  # Another model's optimiser, while this one's step goes on.
            self.memory.mark(_state(optimiser))

    def _optimiser_ends(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        if self.memory is None or torch.compiler.is_compiling():
            return
        self.memory.disown(_state(optimiser))
        if self.backward_seen:
            self._tell()
            self.stop()


def _state(optimiser: torch.optim.Optimizer) -> Iterator[Any]:
    for of_parameter in optimiser.state.values():
        yield from of_parameter.values() if isinstance(of_parameter, dict) else ()
