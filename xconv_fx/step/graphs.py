"""All graphs of a training step, seen before the first of them is planned, and the order in which they run.

A model whose trace breaks is compiled as several graphs, one after another, each run before the next is seen. So that
they can be planned together, the model is run once ahead of time on fake tensors (`hooks/ahead.py`), which tells the
graphs, how often each runs, and which values go from one to another.

Known gaps: a model that cannot be run on fake tensors (a value decides what is done), and a compiled function, whose
tensors cannot be told from its code, are planned graph after graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from xconv_fx import hooks
from xconv_fx.device.fake import fake_module, fake_tensor
from xconv_fx.hooks.fake import fake_mode
from xconv_fx.hooks.pytree import tree_leaves, tree_map_only
from xconv_fx.planner.loss import LOSS_ITEMSIZE
from xconv_fx.runtime.signature import Signature


@dataclass(frozen=True)
class Value:
    """A tensor that is alive between graphs: bytes, bytes as a loss has it, and whether a gradient of it comes."""

    bytes: int
    in_loss: int
    differentiated: bool

    @staticmethod
    def of(tensor: Tensor) -> Value:
        size = tensor.untyped_storage().nbytes()
        widened = tensor.is_floating_point() and tensor.dtype.itemsize < LOSS_ITEMSIZE
        return Value(size, LOSS_ITEMSIZE * tensor.numel() if widened else size, tensor.requires_grad)


Values = dict[int, Value]


@dataclass(frozen=True)
class GraphRun:
    """One run of a graph with a backward: its number, and by storage what it read and returned.

    `inputs` are neither parameters nor buffers; `parameters` are those that get a gradient.
    """

    graph: int
    parameters: Values
    inputs: Values
    results: Values


@dataclass(frozen=True)
class StepGraphs:
    """The graphs of a step as they were handed over, their runs in order, and what the model was given and returned."""

    graphs: tuple[Any, ...]
    signatures: tuple[Signature, ...]
    runs: tuple[GraphRun, ...]
    arguments: Values
    outputs: Values


@dataclass
class Collector:
    """A backend that lets graphs compute what they compute, and keeps them and their runs.

    `take` makes of a graph what is kept of it, within its compilation.
    """

    take: Callable[[fx.GraphModule, list[Any]], Any]
    graphs: list[Any] = field(default_factory=list)
    signatures: list[Signature] = field(default_factory=list)
    runs: list[GraphRun] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        hooks.specialise(example_inputs)
        if not hooks.needs_backward(example_inputs):
            return gm.forward
        number, is_data = len(self.graphs), hooks.data_inputs(gm)
        self.signatures.append(Signature.of(gm, example_inputs))
        self.graphs.append(self.take(gm, example_inputs))

        def run(*arguments: Any) -> Any:
            results = gm.forward(*arguments)
            self._ran(number, is_data, arguments, results)
            return results

        return run

    def _ran(self, number: int, is_data: Sequence[bool], arguments: Sequence[Any], results: Any) -> None:
        inputs = [value for value, data in zip(arguments, is_data, strict=True) if data]
        others = [
            value
            for value, data in zip(arguments, is_data, strict=True)
            if not data and isinstance(value, Tensor) and value.requires_grad
        ]
        parameters, read = values(others), values(inputs)
        returned = {
            key: value
            for key, value in values(tree_leaves(results)).items()
            if key not in read and key not in parameters
        }
        # A storage has its number for itself only while it is alive.
        self.alive.append((arguments, results))
        self.runs.append(GraphRun(number, parameters, read, returned))

    def found(self, arguments: Any, outputs: Any) -> StepGraphs:
        """What was seen in a step that was called with `arguments` and returned `outputs`."""
        given, returned = values(tree_leaves(arguments)), values(tree_leaves(outputs))
        return StepGraphs(tuple(self.graphs), tuple(self.signatures), tuple(self.runs), given, returned)


def values(tensors: Sequence[Any]) -> Values:
    """The tensors among these by their storages; of several on one, the one that takes most in a loss."""
    found: Values = {}
    for tensor in tensors:
        key = hooks.storage_of(tensor)
        if key is None:
            continue
        value = Value.of(tensor)
        known = found.get(key, value)
        found[key] = Value(value.bytes, max(value.in_loss, known.in_loss), value.differentiated or known.differentiated)
    return found


def look_ahead(take: Callable[[fx.GraphModule, list[Any]], Any]) -> StepGraphs | str:
    """All graphs of the step whose first graph is being compiled, or why they cannot be known ("": it has one)."""
    parts, call = hooks.parts_of_graph(), hooks.current_call()
    try:
        if parts is not None:
            collector = Collector(take)
            return collector.found((), hooks.run_parts(*parts, collector))
        if call is None:
            return "the tensors of a compiled function are not known from its code" if hooks.goes_on() else ""
        if not hooks.more_follows(call.module):
            return ""
        if hooks.calls_functions(call.module):
            return "hooks of the model call functions, which running it ahead of time would call as well"
        return _look_ahead(call.module, call.args, call.kwargs, take)
    except Exception as error:  # Whatever the model's own code does on fake tensors.
        return f"the model cannot be run ahead of time ({str(error).partition(chr(10))[0]})"


def _look_ahead(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any], take: Callable[[fx.GraphModule, list[Any]], Any]
) -> StepGraphs:
    mode = fake_mode()
    faked = fake_module(module, mode, None)
    args, kwargs = tree_map_only(Tensor, lambda value: fake_tensor(value, mode, None), (args, dict(kwargs)))
    collector = Collector(take)
    with mode:
        return collector.found((args, kwargs), hooks.run_ahead(faked, args, kwargs, collector))
