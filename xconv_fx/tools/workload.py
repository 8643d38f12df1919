"""What is planned: a model, its inputs and its loss, as people name them on a command line or in a configuration file.

Builds them on torch's meta device, so that planning needs neither the model's memory nor a GPU, hands them to
`explain`, and turns whatever goes wrong in the user's code into a `UsageError` that says what to type next. Nothing
here imports torch before it is needed.

Known gap: a builder that reads real values, such as pretrained weights, cannot run on the meta device and needs
`allocate`.
"""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from xconv_fx.errors import UsageError, XConvError, join_clauses, nearest

from .target import Target, build, called, function, summary

if TYPE_CHECKING:
    import torch

    from xconv_fx.plan import Plan

T = TypeVar("T")

LOSSES = ("mean", "sum")
INPUT_HINT = (
    "write sizes joined by x and an optional dtype, such as 4x1x96x96x96 or 8:int64, or FILE.py:callable for a "
    "function that returns the inputs"
)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
    "long": "int64",
    "int": "int32",
}


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype name of one tensor."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @staticmethod
    def parse(text: str, option: str = "--input") -> InputSpec:
        """From "4x1x96x96x96" or "2x77:int64". Raises `UsageError`, naming the option that it was given as."""
        sizes, colon, dtype = text.partition(":")
        if not re.fullmatch(r"[1-9]\d*(?:[xX][1-9]\d*)*", sizes):
            raise UsageError(f"{option} {text!r} is not a shape of positive sizes", INPUT_HINT)
        dtype = DTYPE_ALIASES.get(dtype.lower(), dtype.lower()) if colon else "float32"
        if dtype not in DTYPES:
            hint = join_clauses(nearest(dtype, DTYPES), f"dtypes: {', '.join(DTYPES)}")
            raise UsageError(f"{option} {text!r}: no dtype {dtype!r}", hint)
        return InputSpec(tuple(map(int, re.split("[xX]", sizes))), dtype)

    def zeros(self, device: str | torch.device) -> torch.Tensor:
        """A tensor of zeros: integers are then labels, or indices into a table, of any number of classes."""
        import torch

        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype), device=device)

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}:{self.dtype}"


@dataclass(frozen=True)
class Workload:
    """A training step to plan: `target` names what builds the model, `inputs` its inputs, each as a shape or all of
    them as a callable; `loss` is one of `LOSSES` or names a callable, which gets the model's output and `labels`.

    `allocate` builds everything with real memory. `spelling` is how errors write the option of inputs and labels.
    """

    target: str
    inputs: tuple[str, ...]
    loss: str | None = None
    labels: tuple[str, ...] = ()
    allocate: bool = False
    spelling: tuple[str, str] = ("--input", "--label")

    def plans(self, **options: Any) -> Sequence[Plan]:
        """The plans of the model's graphs with these options of `xconv_fx.step.explain.explain`.

        Raises `BudgetInfeasibleError` and `UsageError`.
        """
        from xconv_fx.step.explain import explain

        return self.ask(explain, **options).plans

    def ask(self, planner: Callable[..., T], **options: Any) -> T:
        """What `planner(model, *inputs, loss=..., targets=..., **options)` answers: `explain`, `frontier`.

        Raises `XConvError`, whatever goes wrong in the user's code.
        """
        input_option, label_option = self.spelling
        inputs, labels = _sources(self.inputs, input_option), _sources(self.labels, label_option)
        if labels and self.loss in (None, *LOSSES):
            raise UsageError(f"{label_option} given, but no loss that takes it", "--loss FILE.py:callable")
        loss, model = self.training_loss(), self.model()
        # A builder may place its model itself, and a model built at import is where the file put it.
        weight = next(model.parameters(), None)
        place = self._device if weight is None else str(weight.device)
        given = _bound(model, _built(inputs, place), input_option)
        targets = _built(labels, place)
        if loss is not None:
            options["loss"] = loss
        if isinstance(targets, dict):
            raise UsageError(f"{label_option} {self.labels[0]} returned a dict", "return a tensor or a tuple from it")
        if targets:
            options["targets"] = targets
        return self._asked(planner, model, given, options)

    def model(self) -> torch.nn.Module:
        """The model, built anew. Raises `UsageError`."""
        return build(self.target, self._device)

    @property
    def _device(self) -> str:
        return "cpu" if self.allocate else "meta"

    def training_loss(self) -> str | Callable[..., Any] | None:
        """What `explain` takes as a loss; None for the default. Raises `UsageError`."""
        if self.loss is None or self.loss in LOSSES:
            return self.loss
        if ":" not in self.loss:
            choices = f"write {', '.join(LOSSES)}, or FILE.py:callable for a function of the output and the labels"
            raise UsageError(f"no loss {self.loss!r}", join_clauses(nearest(self.loss, LOSSES), choices))
        # A class, or a call such as `torch.nn:CrossEntropyLoss(label_smoothing=0.1)`, makes the loss.
        return function(Target.parse(self.loss), "cpu")

    def _asked(
        self, planner: Callable[..., T], model: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> T:
        try:
            with warnings.catch_warnings():
                # AOTAutograd's, ahead of an error that is reported below.
                warnings.filterwarnings("ignore", message="Error detected in")
                return planner(model, *inputs, **options)
        except XConvError:
            raise
        except Exception as error:
            raise self._failure(model, inputs, options, error) from error

    def _failure(
        self, model: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], error: Exception
    ) -> UsageError:
        """What to tell a user whose model or loss failed while it was traced.

        The compiler reports a wrong shape at length; the model itself, run on the same inputs, says it in a line.
        """
        option, label = self.spelling
        given = " ".join(f"{option} {text}" for text in map(_described, self.inputs))
        cause, output = _eager_failure(model, inputs)
        loss = options.get("loss")
        if cause is None and callable(loss):
            cause, _ = _eager_failure(_backward, (loss, output, *options.get("targets", ())))
            if cause is not None:
                labels = "".join(f" {label} {text}" for text in map(_described, self.labels))
                message = f"--loss {self.loss} failed on the output of {type(model).__name__}{labels}: {summary(cause)}"
                return UsageError(message, f"a loss of the output and of one {label} for each further argument")
        cause = cause or getattr(error, "inner_exception", None) or error
        where = _layer_of(model, cause)
        hint = f"another {option} if the shape or dtype is wrong; --debug shows the whole error"
        return UsageError(f"{type(model).__name__} failed on {given}{where}: {summary(cause)}", hint)


def _described(text: str) -> str:
    """An input as errors write it, with its dtype."""
    return text if names_callable(text) else str(InputSpec.parse(text))


def names_callable(text: str) -> bool:
    """Whether an input is given as a callable, not as a shape."""
    where, colon, name = text.partition(":")
    return bool(colon) and not re.match(r"\d", where) and bool(re.match(r"[^\W\d]", name))


def _sources(texts: Sequence[str], option: str) -> tuple[InputSpec, ...] | Target:
    """What the texts of an option say: a shape each, or all of them one callable."""
    calls = [text for text in texts if names_callable(text)]
    if not calls:
        return tuple(InputSpec.parse(text, option) for text in texts)
    if len(texts) > 1:
        hint = f"one {option} with a callable that returns all of them as a tuple or dict"
        raise UsageError(f"{option} {calls[0]!r} and {len(texts) - 1} more given", hint)
    return Target.parse(calls[0])


def _built(sources: tuple[InputSpec, ...] | Target, device: str) -> tuple[Any, ...] | dict[str, Any]:
    """The values on `device`: a tuple, or a dict by argument's name."""
    if not isinstance(sources, Target):
        return tuple(spec.zeros(device) for spec in sources)
    values = called(sources, device)
    if isinstance(values, dict):
        return values
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def _bound(model: torch.nn.Module, given: tuple[Any, ...] | dict[str, Any], option: str) -> tuple[Any, ...]:
    """The arguments of the model's forward by position. Raises `UsageError` when they are not what it takes."""
    signature = inspect.signature(model.forward)
    by_name = isinstance(given, dict)
    try:
        bound = signature.bind(**given) if isinstance(given, dict) else signature.bind(*given)
    except TypeError as error:
        hint = f"one {option} for each argument of forward{signature}"
        named = f": {', '.join(map(str, given))}" if by_name else ""
        raise UsageError(f"{len(given)} {option} given{named}, but {error}", hint) from error
    if by_name:
        bound.apply_defaults()
    if any(bound.kwargs.values()):
        names = ", ".join(bound.kwargs)
        hint = "a module whose forward takes them by position and calls this one"
        raise UsageError(f"forward{signature} takes {names} by keyword only, which cannot be planned", hint)
    return bound.args


def _eager_failure(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Exception | None, Any]:
    """What running `function` raises, or its result."""
    import torch

    try:
        with torch.no_grad():
            return None, function(*arguments)
    except Exception as error:
        return error, None


def _backward(loss: Callable[..., Any], output: Any, *targets: Any) -> None:
    """Forward and backward of the loss: on the meta device some shapes are checked only by the latter."""
    import torch

    from xconv_fx.hooks.pytree import tree_map_only

    with torch.enable_grad():
        leaves = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(), output)
        loss(leaves, *targets).backward()


def _layer_of(model: torch.nn.Module, error: BaseException) -> str:
    """Where in `model` the error was raised: the innermost layer whose code was running."""
    import torch

    names = {id(layer): name for name, layer in model.named_modules()}
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, torch.nn.Module) and names.get(id(layer)):
            where = f", in {names[id(layer)]} ({type(layer).__name__}({layer.extra_repr()}))"
    return where
