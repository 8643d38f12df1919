"""What can go wrong for a user, each as its own exception type.

Every error names what was given and what would work instead. All derive from `XConvError`, a `ValueError`, and all
survive pickling, because compile workers and data-parallel launchers send exceptions between processes.

Dynamo wraps whatever a backend raises, which would hide these types from an `except`: `hooks/surfacing.py`.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from .units import format_size, rounded_up, sufficient_size

LARGEST_SHOWN = 5


class XConvError(ValueError):
    """Base of every error this package raises on purpose.

    Subclasses list in `_fields` the attributes that, besides `message`, survive pickling and copying.
    """

    _fields: tuple[str, ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        # Not `args`, to which Dynamo appends advice on reporting a bug in PyTorch.
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        state = {field: getattr(self, field) for field in ("message", *self._fields)}
        return _rebuild, (public_type(type(self)), state)


class OptionError(XConvError):
    """An option has a value that cannot work.

    `option` is the option's name as the user writes it, `value` what was given (its `repr` unless it is a plain
    string, number or None), `hint` says what would work.
    """

    _fields = ("option", "value", "hint")

    def __init__(self, option: str, value: object, hint: str) -> None:
        shown = repr(value)
        super().__init__(f"{option}={shown if len(shown) <= 80 else shown[:77] + '...'}: {hint}")
        self.option = option
        self.value = value if value is None or isinstance(value, (str, bool, int, float)) else shown
        self.hint = hint


class BudgetInfeasibleError(XConvError):
    """No plan fits the memory budget.

    `budget` and `smallest`, the smallest budget that some plan fits, are bytes of physical peak. `consumers` are the
    largest holders of memory at that plan's peak as `(label, bytes)`; the five largest are kept, largest first. `notes`
    say what was impossible, such as running the batch in slices.
    """

    _fields = ("budget", "smallest", "consumers", "notes")

    def __init__(
        self, budget: int, smallest: int, consumers: Iterable[tuple[str, int]] = (), notes: Iterable[str] = ()
    ) -> None:
        holding = ((str(label), int(size)) for label, size in consumers if size > 0)
        ranked = sorted(holding, key=lambda item: -item[1])
        self.budget = int(budget)
        self.smallest = int(smallest)
        self.consumers: tuple[tuple[str, int], ...] = tuple(ranked[:LARGEST_SHOWN])
        self.notes = tuple(notes)
        super().__init__(self._describe())

    def _describe(self) -> str:
        budget, smallest = format_size(self.budget), format_size(self.smallest)
        if budget == smallest:
            budget, smallest = f"{self.budget:,} B", f"{self.smallest:,} B"
        else:  # Never less than is needed: people type what they read.
            smallest = format_size(rounded_up(self.smallest))
        lines = [f"mem_budget={budget} cannot be met: the smallest feasible budget is {smallest}."]
        if self.consumers:
            lines.append("Largest at the peak of that plan:")
            lines += [f"  {format_size(size):>8}  {label}" for label, size in self.consumers]
        lines += [f"Note: {note}" for note in self.notes]
        lines.append(
            f"What would work: mem_budget={sufficient_size(self.smallest)!r}, a smaller batch or input, "
            "or more codecs if `codecs` or `probes` limits them."
        )
        return "\n".join(lines)


class BudgetLostError(XConvError):
    """Part of a model that was compiled under a budget ran eagerly, and so without a plan."""


class BudgetLostWarning(UserWarning):
    """What `BudgetLostError` is where `torch.compile` itself was called, which falls back to eager code by design."""


class UntestedTorchWarning(UserWarning):
    """The installed torch is of a version that was not tested, and passed a trial."""


class UnsupportedTorchError(XConvError):
    """The installed torch is not one that this package works on.

    `found` is the installed version, `supported` a requirement such as `">=2.12,<2.16"`, `reason` what is missing.
    """

    _fields = ("found", "supported", "reason")

    def __init__(self, found: str, supported: str, reason: str = "") -> None:
        detail = f" ({reason})" if reason else ""
        super().__init__(
            f"xconv-fx needs torch{supported}, found torch {found}{detail}. "
            f"What would work: pip install 'torch{supported}'"
        )
        self.found = found
        self.supported = supported
        self.reason = reason


class UnsupportedModelError(XConvError):
    """The model does something that cannot be planned.

    `what` names the layer or operation, `reason` why it cannot be planned, `hint` what to change.
    """

    _fields = ("what", "reason", "hint")

    def __init__(self, what: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{what}: {reason}" + (f". What would work: {hint}" if hint else ""))
        self.what = what
        self.reason = reason
        self.hint = hint


class DoubleBackwardError(XConvError, RuntimeError):
    """A gradient that compiled code computed was differentiated, as by a gradient penalty or for a Hessian.

    Also a `RuntimeError`, which is what `torch.compile` raises.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "double backward: a model compiled with torch.compile cannot be differentiated twice. What would work: "
            "the model as it was before torch.compile (model._orig_mod) for the loss that needs them, such "
            "as a gradient penalty"
        )


class UsageError(XConvError):
    """A command line, or the user's file it names, does not work; `hint` says what to type next."""

    _fields = ("hint",)

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BudgetExceededWarning(UserWarning):
    """A training step was measured, and took more than its budget, or the model runs more often in it than planned."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn of a line of the user's own code, the innermost on the stack that is neither ours nor torch's."""
    level, frame = 2, sys._getframe(1)
    inner = ("xconv_fx", "torch")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def join_clauses(*clauses: str) -> str:
    """The clauses that say something, as one sentence."""
    return " ".join(filter(None, clauses))


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A "did you mean" clause for `name`, or the empty string when nothing in `known` is close."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def _rebuild(kind: type[XConvError], state: dict[str, Any]) -> XConvError:
    error = kind.__new__(kind, state["message"])
    error.__dict__.update(state)
    return error


def find_ours(error: BaseException | None) -> XConvError | None:
    """The error itself, or the one that Dynamo or Inductor has wrapped in it, if it is this package's."""
    while error is not None and not isinstance(error, XConvError):
        error = getattr(error, "inner_exception", None)
    return error


def public_type(kind: type[XConvError]) -> type[XConvError]:
    return getattr(kind, "_public", kind)
