"""How large the gradients of each training sample are, so that codes can have more bits where more depends on them.

ActNN (Chen et al., ICML 2021, section 4.2) shares bits out among the samples of a batch by what rounding adds to the
gradient, to which a sample contributes by the square of its own gradient. That is not known when its activations are
coded, but it was when the sample was last seen, mostly an epoch ago: samples that the network has learnt have small
gradients, and stay so. `SampleGradients` keeps one number a sample for that, of the gradients of the network's results.

Without it, or for samples that were never seen, bits are shared out by the values' ranges alone. The mean of the
gradients is right in any case; only their variance depends on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class SampleGradients(nn.Module):
    """The squared size of the gradient of every sample of a training set, as last seen; NaN where it never was.

    For models compiled with `codecs="actnn:L3"` or the option `sample_bits`:

        seen = xconv_fx.SampleGradients(len(dataset))
        for indices, images, labels in loader:
            with seen.batch(indices):
                loss_function(model(images), labels).backward()

    `squares` (float32, one a sample) is a buffer, so that `state_dict` and `to` work as for any module.
    """

    squares: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count={count}: must be the number of samples in the training set, 1 or more")
        self.register_buffer("squares", torch.full((count,), float("nan")))

    @contextlib.contextmanager
    def batch(self, indices: Tensor | Sequence[int]) -> Iterator[None]:
        """The samples of the steps inside, by their numbers in the training set, in the order of the batch.

        Raises `ValueError` for numbers that are not in the set.
        """
        numbers = torch.as_tensor(indices, device=self.squares.device)
        if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise ValueError(f"indices of shape {tuple(numbers.shape)} and {numbers.dtype}: must be a list of ints")
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.squares):
            outside = f"{int(numbers.min())} to {int(numbers.max())}"
            raise ValueError(f"indices={outside}: must be in 0 .. {len(self.squares) - 1}, the samples of the set")
        token = _batch.set(_Batch(self, numbers.long()))
        try:
            yield
        finally:
            _batch.reset(token)


class _Batch:
    """The samples of the step that runs now, and the results whose gradients are waited for."""

    def __init__(self, known: SampleGradients, numbers: Tensor) -> None:
        self.known, self.numbers = known, numbers
        self.results: object = None

    def weights(self) -> Tensor:
        """The samples' squared gradients; the mean of those that are known for the others, or 1 where none is."""
        found = self.known.squares[self.numbers]
        return found.where(~found.isnan(), found.nanmean()).nan_to_num(1.0)

    def watch(self, results: Sequence[Any]) -> None:
        """Note the gradients that arrive at these results.

        A model in several graphs has results in each. The last ones count: gradients arrive there first.
        """
        self.results = arrivals = _Arrivals(self)
        for result in results:
            if isinstance(result, Tensor) and result.requires_grad and result.shape[:1] == self.numbers.shape:
                result.register_hook(arrivals)


class _Arrivals:
    """The hook of a graph's results: a sample's gradient is that of all of them together."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch
        self.total: Tensor | None = None

    def __call__(self, gradient: Tensor) -> None:
        if self.batch.results is not self:
            return
        squares = gradient.detach().flatten(1).float().square().sum(1)
        self.total = squares if self.total is None else self.total + squares
        known = self.batch.known.squares
        known[self.batch.numbers] = self.total.to(known.device)


_batch: ContextVar[_Batch | None] = ContextVar("batch", default=None)
# First sample and number of samples of the slice of the batch that runs now.
_slice: ContextVar[tuple[int, int] | None] = ContextVar("slice", default=None)


def weights(samples: int, device: torch.device) -> Tensor | None:
    """By how much the gradients of the batch's (or slice's) samples count: float32 (samples,).

    None outside of a batch, or where what is asked for has another number of samples.
    """
    batch, part = _batch.get(), _slice.get()
    if batch is None:
        return None
    first, count = part or (0, len(batch.numbers))
    found = batch.weights()[first : first + count]
    return found.to(device) if len(found) == samples else None


@torch.library.custom_op(
    "xconv::noted_gradients",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def noted_gradients(samples: int, device: torch.device) -> Tensor:
    """`weights` for a graph: NaN where there are none. Another batch's are others: no CUDA graph may capture it."""
    found = weights(samples, device)
    return torch.full((samples,), float("nan"), device=device) if found is None else found.clone()


@noted_gradients.register_fake
def _(samples: int, device: torch.device) -> Tensor:
    return torch.empty((samples,), device=device)


@contextlib.contextmanager
def samples_of_slice(first: int, count: int) -> Iterator[None]:
    """Weights asked for inside are those of `count` samples from `first` on."""
    token = _slice.set((first, count))
    try:
        yield
    finally:
        _slice.reset(token)


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph whose results are watched while a batch has names."""

    @functools.wraps(function)
    def run(*inputs: Any) -> Any:
        results = function(*inputs)
        batch = _batch.get()
        if batch is not None and torch.is_grad_enabled():
            batch.watch(results)
        return results

    return run
