"""What a compiled model runs without a plan: parts that Dynamo gave up run eagerly, and so without a budget.

Dynamo skips a frame that it cannot trace (a loop with a break in it, a layer with a full backward hook), stops
compiling at its recompile limit, and lets users switch it off, and says so in a log at most. Here it is seen by its
effect, so that no way to it needs to be known: autograd numbers the operations of a thread, and what a call of the
compiled function recorded outside of our graphs ran eagerly. As long as that many are as in a call that was looked
at, two numbers are compared, and nothing else happens. Otherwise the graph of the results is searched for operations
that hold tensors for the backward. Why Dynamo gave a frame up is quoted from itself.

Known gaps: methods of a compiled model other than its `forward` are not compiled by `torch.compile`, and not watched.
Results are searched in what `torch.utils._pytree` and attributes of objects lead to.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from xconv_fx import hooks
from xconv_fx.errors import BudgetLostError, BudgetLostWarning, UnsupportedModelError, find_ours, warn_user
from xconv_fx.hooks.autograd import bytes_of, holds_tensors, number_of
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.options import Options
from xconv_fx.options.budget import MemoryLimit
from xconv_fx.units import format_size

from .step_inputs import called_with

# Bytes that eager operations may hold where the budget is not known in bytes: scalars of a loss or a gate.
SMALL = 4096
SHOWN = 4


class _Local(threading.local):
    """What goes on in this thread: the call that is watched, and numbers of operations that ran inside of graphs."""

    watch: Watch | None = None
    spans: list[tuple[int, int]]

    def __init__(self) -> None:
        self.spans = []


_local = _Local()


@contextlib.contextmanager
def planned() -> Iterator[None]:
    """Operations that are recorded inside belong to a plan."""
    start = hooks.nodes_made()
    try:
        yield
    finally:
        if _local.watch is not None:
            _local.spans.append((start, hooks.nodes_made()))


def watched() -> bool:
    """Whether a call is watched in this thread."""
    return _local.watch is not None


def graph(compiled: Callable[..., Any], session: Any = None, key: object = None) -> Callable[..., Any]:
    """A compiled graph, which the call that runs it hears of; `key` is a session's for one that has a plan.

    Checkpointing runs it again in a backward, with what was around the call of that.
    """
    compiled = hooks.as_called(compiled)

    def run(*inputs: Any) -> Any:
        if _local.watch is None:
            return compiled(*inputs)
        _local.watch.ran.append((session, key))
        with planned():
            return compiled(*inputs)

    return run


class Watch:
    """Watches the calls of one function that `torch.compile` made.

    `strict` raises `BudgetLostError` where a warning is given otherwise; `called` says that there was a call. `ran` are
    the sessions and keys of the graphs that ran in the last call with gradients, `sessions` all that ever did: equal
    models share compiled code.
    """

    def __init__(self, call: Any, compiled: Callable[..., Any]) -> None:
        self.call, self.compiled = call, compiled
        self.strict = self.called = False
        self.ran: list[tuple[Any, object]] = []
        self.sessions: dict[int, Any] = {}
        self.reasons: dict[str, None] = {}
        self.converted = False
        self.fine = {0}
        self.warned: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a compiled function is watched by itself."""
        return type(None), ()

    @staticmethod
    def over(call: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched; the watch is the attribute `xconv_watch` of the call."""
        watch = call.xconv_watch = Watch(call, compiled)
        hooks.skip(Watch.run)
        return lambda *arguments, **keywords: watch.run(arguments, keywords)

    def run(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call the function, and see to it that what it differentiates was planned."""
        self.called = True
        if not torch.is_grad_enabled():
            return self._named(arguments, keywords)
        outer, spans = _local.watch, _local.spans
        _local.watch, _local.spans, self.ran, self.converted = self, [], [], False
        start = hooks.nodes_made()
        checks = [session.verifier.check for session in self.sessions.values()]
        try:
            for check in checks:
                check.enter((arguments, keywords))
            with called_with((arguments, keywords)):
                result = self._named(arguments, keywords)
            outside = hooks.nodes_made() - start - sum(stop - first for first, stop in _local.spans)
            if outside not in self.fine:
                self._look(result, start, outside)
            if self.converted or not self.sessions:
                self.sessions.update((id(session), session) for session, _ in self.ran if session is not None)
            return result
        finally:
            for check in checks:
                check.leave()
            if outer is not None:
                spans.append((start, hooks.nodes_made()))
            _local.watch, _local.spans = outer, spans

    def note(self, reason: str | None) -> None:
        """Dynamo has looked at a frame; the reason why it is not compiled, or None."""
        self.converted = True
        if reason is not None:
            self.reasons[reason] = None

    def _named(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call the function; where it is strict, breaks and limits of Dynamo have a name of ours."""
        if not self.strict:
            return self.compiled(*arguments, **keywords)
        try:
            return self.compiled(*arguments, **keywords)
        except Exception as error:
            if find_ours(error) is None and (reason := hooks.gave_up(error)):
                hint = "change that code, or write fullgraph=False, which plans what Dynamo can trace graph by graph"
                raise UnsupportedModelError("the model cannot be compiled as one graph", reason, hint) from error
            raise

    def _look(self, result: Any, start: int, outside: int) -> None:
        """Find out what ran eagerly, and say so if that holds memory."""
        options = Options.parse(self.call.kwargs.get("options"), self.call.kwargs.get("mode"))
        nodes = list(_unplanned(_tensors(result), start, _local.spans))
        held = sum(map(bytes_of, filter(holds_tensors, nodes)))
        budget = options.mem_budget.bytes if options.mem_budget is not None else None
        inside = not nodes and not self.converted  # Differentiated, if at all, before the call returned.
        if options.plain or (held <= (SMALL if budget is None else MemoryLimit(budget).unseen) and not inside):
            if not self.converted:
                self.fine.add(outside)
            return
        message = self._message(options, nodes, outside, held)
        key = tuple(sorted({node.name() for node in nodes})), tuple(self.reasons)
        self._forget_plans()
        if self.strict:
            raise BudgetLostError(message)
        if not self.converted:
            self.fine.add(outside)
        if key not in self.warned:
            self.warned.add(key)
            warn_user(message, BudgetLostWarning)

    def _message(self, options: Options, nodes: list[Node], outside: int, held: int) -> str:
        asked = f"codecs={options.codecs.preset!r}" if options.mem_budget is None else "mem_budget"
        module = self._module()
        name = type(module).__name__ if module is not None else getattr(self.compiled, "__name__", "the function")
        what = [f"xconv: {asked} is not kept: part of {name} ran eagerly, without a plan:"]
        if nodes:
            layers = sorted(_layers(nodes, module))
            kinds = list(dict.fromkeys(node.name().partition("Backward")[0] for node in filter(holds_tensors, nodes)))
            what.append(f"{_some(kinds)}{f' in {_some(layers)}' if layers else ''}, {format_size(held)} of results.")
        else:
            what.append(f"{outside} operations that were differentiated inside of the call.")
        if off := hooks.compiling_is_off():
            what.append(f"Dynamo is switched off by {off}.")
        elif self.reasons:
            what.append(f"Dynamo gave up {'; '.join(list(self.reasons)[-2:])}.")
        limited = any("recompile limit" in reason for reason in self.reasons)
        limit = "torch._dynamo.config.recompile_limit above the number of sizes that batches have"
        what.append(f"What would work: {limit if limited else 'code that Dynamo can trace'}.")
        return " ".join(what)

    def _module(self) -> nn.Module | None:
        owner = hooks.owner_of(self.compiled)
        return owner if isinstance(owner, nn.Module) else hooks.compiled_module()

    def _forget_plans(self) -> None:
        """Mark the plans of graphs that should have run and did not."""
        session = getattr(self.call, "xconv_session", None)
        if session is not None:
            session.lose({key for owner, key in self.ran if owner is session})


def _unplanned(results: Iterable[Tensor], start: int, spans: list[tuple[int, int]]) -> Iterator[Node]:
    """Operations since number `start` that results depend on and that are in none of the spans."""
    stack, seen = [tensor.grad_fn for tensor in results], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        number = number_of(node)
        if number < start:
            continue
        if not any(first <= number < stop for first, stop in spans):
            yield node
        stack.extend(following for following, _ in node.next_functions)


def _tensors(result: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(result):
        inner = [] if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
        yield from (value for value in (leaf, *inner) if isinstance(value, Tensor) and value.requires_grad)


def _layers(nodes: Iterable[Node], module: nn.Module | None) -> set[str]:
    """Names of the layers whose parameters these operations read."""
    names = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    read = (getattr(following, "variable", None) for node in nodes for following, _ in node.next_functions)
    return {names[id(p)].rpartition(".")[0] or names[id(p)] for p in read if id(p) in names}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def note(reason: str | None) -> None:
    """Dynamo has looked at a frame, for whatever call is watched."""
    if _local.watch is not None:
        _local.watch.note(reason)
