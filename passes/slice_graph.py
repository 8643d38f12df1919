"""Let the sizes that are written into a Dynamo graph, `x.view(8, -1)`, speak of a slice of the batch.

Which of them are the batch's is never told from the number: a layer may have as many channels as the batch has samples.
The graph is run on fake tensors twice, side by side, for the batch and for the slice. A dimension holds samples where
the two differ, and a size that an operation takes follows from that of its operand:

* a change of shape keeps the order of elements, so that the samples of the result are where those of its operand end;
* a size that makes something from nothing (zeros, a draw, a parameter repeated) may be the batch's or the model's own.
  It is left alone until an operation meets samples that do not fit it. Then it is taken for the batch's, if that mends
  the operation; `batch_separability.py` has proved that its values are the same for all samples, or drawn for each.

Every value of the slice must then have the shape of the batch's, but for one dimension that holds samples. A graph
where that cannot be had raises `NotSliceable`, as do sizes in the bodies of operators that take graphs, except for
checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx import hooks
from xconv_fx.hooks.pytree import tree_leaves

from .batch_rules import samples_after_view
from .early_draws import find_early_draws, name_of, take_early_draws
from .graph import arguments

# Position of a size: an index into an argument that is a list, or among the arguments themselves.
Place = tuple[fx.Node, int]

_VIEWS = {"view", "reshape", "unflatten"}
_EXPANDS = {"expand", "broadcast_to"}
_REPEATS = {"repeat", "tile"}
_GRIDS = {"affine_grid", "affine_grid_generator"}
_MAKES = {"zeros", "ones", "full", "empty", "rand", "randn", "randint", "normal", "arange",
          "new_zeros", "new_ones", "new_full", "new_empty"}  # fmt: skip
_SIZES = _VIEWS | _EXPANDS | _REPEATS | _GRIDS | _MAKES | {"narrow", "split", "as_strided", "repeat_interleave"}
# Operators that run a graph as it is; and calls that change a state of torch, and must be made once.
_WRAPPERS = {"tag_activation_checkpoint", "wrap"}
_STATES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"}


# How Dynamo writes a call of an `autograd.Function` of the user's.
_FUNCTION = torch.ops.higher_order.autograd_function_apply


class NotSliceable(Exception):
    """Why a graph that was traced for a batch cannot be had for a slice of it."""


class _Conflict(Exception):
    """A node whose operands do not fit each other for the slice."""

    def __init__(self, node: fx.Node, order: int, reason: str) -> None:
        super().__init__(f"{reason} ({node.name})")
        self.node, self.order = node, order


@dataclass(frozen=True)
class Drawn:
    """What a slice is handed besides the model's inputs: `parts` of what `draw()` gives for the whole batch.

    `batched` says of which of them a slice takes its samples' rows; of the others it takes all.
    """

    draw: Callable[[], tuple[Tensor, ...]] | None = None
    parts: tuple[Tensor, ...] = ()
    batched: tuple[bool, ...] = ()
    bytes: int = 0


def slice_graph(gm: fx.GraphModule, inputs: Sequence[Any], parts: Sequence[Any], batch: int, samples: int) -> Drawn:
    """Rewrite, in place, a Dynamo graph for `inputs` (fake tensors; `batch` samples) to one for `parts` (`samples`).

    The new graph takes, behind the inputs, what is drawn for all slices at once. Raises `NotSliceable`.
    """
    draws = find_early_draws(gm, batch)
    with hooks.trying_fake([*inputs, *parts]):
        run = _settle(gm, inputs, parts, _Sizes(batch, samples))
        pairs = [run.values[node] for node in draws.nodes] if draws is not None else []
    for node, (args, kwargs) in run.rewritten.items():
        node.args, node.kwargs = args, kwargs
    for module in {node.graph.owning_module for node in run.rewritten} | {gm}:
        if module is not None:
            module.recompile()
    differing = [_differing(whole, part) for whole, part in pairs]
    if draws is None or any(axes not in ((), (0,)) for axes in differing):
        return Drawn()
    small = tuple(part for _, part in pairs)
    take_early_draws(gm, draws, list(small))
    size = sum(whole.numel() * whole.element_size() for whole, _ in pairs)
    return Drawn(draws.graph, small, tuple(axes == (0,) for axes in differing), size)


def own_gradient(gm: fx.GraphModule) -> str:
    """Why a Dynamo graph is not to be sliced although its forward treats samples apart; "" where nothing says so.

    The gradient that autograd derives from such a forward is the sum over slices. What an `autograd.Function` says that
    its gradient is need not be derived from anything.
    """
    for part in gm.modules():
        nodes = part.graph.find_nodes(op="call_function", target=_FUNCTION) if isinstance(part, fx.GraphModule) else ()
        for node in nodes:
            return f"an autograd.Function computes a gradient of its own, which may mix samples ({node.name})"
    return ""


@dataclass(frozen=True)
class _Sizes:
    """Numbers of samples, and the written sizes that are taken for the batch's though nothing tells that they are."""

    batch: int
    samples: int
    taken: frozenset[Place] = frozenset()

    def part(self, size: int) -> int:
        return size // self.batch * self.samples


def _settle(gm: fx.GraphModule, inputs: Sequence[Any], parts: Sequence[Any], sizes: _Sizes) -> _SideBySide:
    """The first run in which all operands fit; each that fails takes one more written size for the batch's."""
    while True:
        run = _SideBySide(sizes)
        try:
            run.all(gm, list(zip(inputs, parts, strict=True)))
            return run
        except _Conflict as conflict:
            sizes = _mended(gm, inputs, parts, sizes, run, conflict)


def _mended(
    gm: fx.GraphModule, inputs: Sequence[Any], parts: Sequence[Any], sizes: _Sizes, run: _SideBySide, found: _Conflict
) -> _Sizes:
    """The sizes with one more taken for the batch's, by which the node where operands did not fit is got over."""
    for place in run.candidates(found.node):
        more = _Sizes(sizes.batch, sizes.samples, sizes.taken | {place})
        try:
            _SideBySide(more).all(gm, list(zip(inputs, parts, strict=True)))
        except _Conflict as conflict:
            if conflict.order <= found.order:
                continue
        return more
    raise NotSliceable(str(found))


@dataclass
class _SideBySide:
    """One run of the graph for the batch and for the slice."""

    sizes: _Sizes
    rewritten: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    open: dict[fx.Node, list[int]] = field(default_factory=dict)
    parents: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    follows: set[fx.Node] = field(default_factory=set)
    values: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    order: int = 0

    def all(self, gm: fx.GraphModule, inputs: Sequence[tuple[Any, Any]]) -> None:
        with torch.no_grad(), _closed() as entered:
            self.graph(gm, inputs, [], entered)

    def candidates(self, node: fx.Node) -> list[Place]:
        """Written sizes that the node's operands depend on, and that may or may not be the batch's."""
        seen, stack, found = {node}, [node], []
        while stack:
            current = stack.pop()
            found += [(current, place) for place in self.open.get(current, [])]
            for parent in self.parents.get(current, []):
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return [place for place in found if place not in self.sizes.taken]

    def graph(
        self, gm: fx.GraphModule, inputs: Sequence[tuple[Any, Any]], sources: Sequence[fx.Node], entered: list[Any]
    ) -> Any:
        """The pair of results of a graph on pairs of values; `sources` are the outer nodes that they come from."""
        values: dict[fx.Node, tuple[Any, Any]] = {}
        outer: list[fx.Node | None] = [*sources] or [None] * len(inputs)
        given = iter(zip(inputs, outer, strict=True))
        for node in gm.graph.nodes:
            self.order += 1
            self.parents[node] = list(node.all_input_nodes)
            if node.op == "placeholder":
                pair, source = next(given)
                values[node] = tuple(_own(value) for value in pair) if source is None else pair  # type: ignore[assignment]
                if source is not None:
                    self.parents[node] = [source]
                    self.follows |= {node} if source in self.follows else set()
                elif _shape(pair[0]) != _shape(pair[1]):
                    self.follows.add(node)
            elif node.op == "get_attr":
                value = _attribute(gm, str(node.target))
                values[node] = value, value
            elif node.op == "output":
                return tuple(_picked(node.args[0], {}, values, side)[0] for side in (0, 1))
            else:
                values[node] = self.values[node] = self.call(gm, node, values, entered)
        return None

    def call(
        self, gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, tuple[Any, Any]], entered: list[Any]
    ) -> tuple[Any, Any]:
        name = name_of(node)
        whole_args, whole_kwargs = _picked(node.args, node.kwargs, values, 0)
        if name in _STATES:
            value = _run(gm, node, whole_args, whole_kwargs)
            if name.startswith("_enter"):
                entered.append(value)
            elif name.startswith("_exit"):
                entered.remove(whole_args[0])
            return value, value
        if name in _WRAPPERS and isinstance(whole_args[0], fx.GraphModule):
            return self.wrapped(node, whole_args[0], values, entered)
        _check_bodies(name, whole_args, self.sizes.batch)
        whole = _run(gm, node, whole_args, whole_kwargs)
        args, kwargs = self.sized(node, name, values, whole)
        try:
            part = _run(gm, node, *_picked(args, kwargs, values, 1))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise _Conflict(node, self.order, f"for {self.sizes.samples} samples: {reason}") from None
        if not _makes(node, name) and any(arg in self.follows for arg in node.all_input_nodes):
            self.follows.add(node)
        self.compare(node, whole, part)
        if args is not node.args or kwargs is not node.kwargs:
            if self.rewritten.get(node, (args, kwargs)) != (args, kwargs):
                raise NotSliceable(f"a graph that is run for two sizes ({node.name})")
            self.rewritten[node] = args, kwargs
        return whole, part

    def wrapped(
        self, node: fx.Node, body: fx.GraphModule, values: dict[fx.Node, tuple[Any, Any]], entered: list[Any]
    ) -> tuple[Any, Any]:
        """A checkpoint: its body is run as part of the graph."""
        operands = [arg for arg in node.args[1:] if isinstance(arg, fx.Node)]
        if len(operands) != len(body.graph.find_nodes(op="placeholder")):
            raise NotSliceable(f"a checkpoint of other values than tensors ({node.name})")
        result: tuple[Any, Any] = self.graph(body, [values[arg] for arg in operands], operands, entered)
        returned = next(inner for inner in reversed(body.graph.nodes) if inner.op == "output").all_input_nodes
        self.parents[node] = [*operands, *returned]
        if any(inner in self.follows for inner in returned):
            self.follows.add(node)
        return result

    def compare(self, node: fx.Node, whole: Any, part: Any) -> None:
        """Raise `_Conflict` unless the slice's value has the batch's shape but for one dimension that holds samples."""
        ours, theirs = tree_leaves(part), tree_leaves(whole)
        if len(ours) != len(theirs):
            raise _Conflict(node, self.order, "another number of results for a slice")
        for small, large in zip(ours, theirs, strict=True):
            if not isinstance(large, Tensor):
                continue
            differing = _differing(large, small)
            if differing is None or any(
                large.shape[axis] * self.sizes.samples != small.shape[axis] * self.sizes.batch for axis in differing
            ):
                shapes = f"{_text(small)} of {self.sizes.samples} samples, {_text(large)} of {self.sizes.batch}"
                raise _Conflict(node, self.order, f"a shape that does not follow the batch: {shapes}")
            if bool(differing) != (node in self.follows) and large.numel():
                raise _Conflict(node, self.order, "a value of samples whose shape does not depend on their number")

    def sized(self, node: fx.Node, name: str, values: dict[fx.Node, tuple[Any, Any]], whole: Any) -> tuple[Any, Any]:
        """The node's arguments for the slice: those it has, where no size in them is the batch's."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        pair = values[source] if source is not None else (None, None)
        differing = _differing(*pair) if isinstance(pair[0], Tensor) else ()
        if not isinstance(whole, Tensor):
            return node.args, node.kwargs
        if source is not None and differing and len(differing) == 1 and not _makes(node, name):
            return self.following(node, name, pair, differing[0], whole)
        if _makes(node, name) or (name in _EXPANDS | _REPEATS and source is not None):
            return self.made(node, name, pair[0], whole)
        return node.args, node.kwargs

    def following(self, node: fx.Node, name: str, pair: tuple[Any, Any], axis: int, whole: Tensor) -> tuple[Any, Any]:
        """Arguments of an operation on samples, which are along `axis` of its operand."""
        old = _shape(pair[0])
        if name == "squeeze" and len(node.args) == 1 and not node.kwargs:
            # The batch dimension of a single sample is not removed.
            return (node.args[0], tuple(place for place, size in enumerate(old) if size == 1)), {}
        if name in _VIEWS:
            found = samples_after_view(old, axis, _shape(whole), self.sizes.batch)
            if found is None:
                if self.views_dtype(node):
                    return node.args, node.kwargs
                raise NotSliceable(f"a change of shape that splits samples ({node.name})")
            shift = int(arguments(node)[1]) % len(old) if name == "unflatten" else 0
            return _with_sizes(node, name, {found - shift: self.sizes.part(whole.shape[found])})
        if name in _GRIDS and axis == 0:
            return _with_sizes(node, name, {0: int(pair[1].shape[0])})
        if name in _EXPANDS:
            found = axis + whole.dim() - len(old)
            return _with_sizes(node, name, {found: int(pair[1].shape[axis])})
        return node.args, node.kwargs

    @staticmethod
    def views_dtype(node: fx.Node) -> bool:
        return any(isinstance(arg, torch.dtype) for arg in (*node.args[1:], *node.kwargs.values()))

    def made(self, node: fx.Node, name: str, source: Any, whole: Tensor) -> tuple[Any, Any]:
        """Arguments of what makes a value from no samples; notes which of its sizes may be the batch's."""
        shape = _shape(whole)
        once = [True] * whole.dim()
        if name in _EXPANDS | _REPEATS:
            missing = whole.dim() - source.dim()
            once = [axis < missing or source.shape[axis - missing] == 1 for axis in range(whole.dim())]
        self.open[node] = [
            axis for axis, size in enumerate(shape) if size and size % self.sizes.batch == 0 and once[axis]
        ]
        taken = {axis: self.sizes.part(shape[axis]) for axis in self.open[node] if (node, axis) in self.sizes.taken}
        if not taken:
            return node.args, node.kwargs
        self.follows.add(node)
        return _with_sizes(node, name, taken)


@contextlib.contextmanager
def _closed() -> Iterator[list[Any]]:
    """Contexts that a graph enters; those that it has not left when it fails are left."""
    entered: list[Any] = []
    try:
        yield entered
    finally:
        for context in reversed(entered):
            context.__exit__(None, None, None)


def _makes(node: fx.Node, name: str) -> bool:
    """Whether the operation makes a value of a written size, whatever it reads."""
    if name == "arange":
        return len(node.args) == 1
    return name in _MAKES and (name.startswith("new_") or not node.all_input_nodes)


def _run(gm: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Any] = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


def _picked(args: Any, kwargs: Any, values: dict[fx.Node, tuple[Any, Any]], side: int) -> tuple[Any, Any]:
    return (
        fx.map_arg(args, lambda node: values[node][side]),
        fx.map_arg(kwargs, lambda node: values[node][side]),
    )


def _own(value: Any) -> Any:
    """A value of the same shape, which the graph may change in place."""
    if isinstance(value, torch.SymInt):
        return int(value)
    if not isinstance(value, Tensor):
        return value
    shape, strides = [int(n) for n in value.shape], [int(n) for n in value.stride()]
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return _own(value)


def _check_bodies(name: str, args: Any, batch: int) -> None:
    """Raise where the body of an operator that takes graphs has sizes that may be the batch's."""
    for body in args:
        if not isinstance(body, fx.GraphModule):
            continue
        for node in body.graph.nodes:
            written = [arg for arg in tree_leaves((node.args[1:], node.kwargs)) if type(arg) is int]
            if name_of(node) in _SIZES and any(size and size % batch == 0 for size in written):
                raise NotSliceable(f"sizes inside {name} may be the batch's")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _text(value: Any) -> str:
    return "x".join(map(str, _shape(value)))


def _differing(whole: Any, part: Any) -> tuple[int, ...] | None:
    """The dimensions in which the shapes differ; None where their ranks do."""
    old, new = _shape(whole), _shape(part)
    if len(old) != len(new):
        return None
    return tuple(axis for axis, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1])


def _with_sizes(node: fx.Node, name: str, sizes: dict[int, int]) -> tuple[Any, Any]:
    """The node's arguments with these of its result's sizes written anew; those that are left open stay so."""
    args: list[Any] = list(node.args)
    kwargs: dict[str, Any] = dict(node.kwargs)
    first = {"unflatten": 2}.get(name, 1 if node.args and isinstance(node.args[0], fx.Node) else 0)
    for place in range(first, len(args)):
        if _is_sizes(args[place]):
            args[place] = tuple(_size(size, sizes.get(axis)) for axis, size in enumerate(args[place]))
            return tuple(args), kwargs
    for key, given in kwargs.items():
        if _is_sizes(given):
            kwargs[key] = tuple(_size(size, sizes.get(axis)) for axis, size in enumerate(given))
            return tuple(args), kwargs
    for axis, size in sizes.items():
        args[first + axis] = _size(args[first + axis], size)
    return tuple(args), kwargs


def _is_sizes(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and all(isinstance(size, int) for size in given)


def _size(old: Any, new: int | None) -> Any:
    return old if new is None or old == -1 else new
