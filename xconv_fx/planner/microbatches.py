"""A batch that runs in slices: which inputs hold samples, and what a step takes besides the slices themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from xconv_fx import hooks
from xconv_fx.ops.sample_gradients import samples_of_slice
from xconv_fx.passes.batch_separability import NOTHING

if TYPE_CHECKING:
    from .loss import Ends


# Bytes of a state of the CPU's generator.
STATE = 5056


@dataclass(frozen=True)
class Batch:
    """The inputs of a graph that hold samples: `batched[i]` says whether input i does, `size` how many samples.

    Bytes of the whole batch: `inputs` of those, `input_gradients` of the gradients that they need, `gradients` of the
    gradients of all other inputs, and `sizes` of every input.
    """

    size: int
    batched: tuple[bool, ...]
    inputs: int
    input_gradients: int
    gradients: int
    sizes: tuple[int, ...] = ()

    @staticmethod
    def of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Batch | None:
        """The batch that Dynamo's graph is traced for: what leads all its tensors but parameters and buffers."""
        leading = leading_sizes(gm, example_inputs)
        samples = next((size for size in leading if size is not None), 0)
        if samples < 2:
            return None
        batched = tuple(size == samples for size in leading)
        inputs = input_gradients = gradients = 0
        sizes = [int(v.numel()) * v.element_size() if isinstance(v, Tensor) else 0 for v in example_inputs]
        for value, size, is_batched in zip(example_inputs, sizes, batched, strict=True):
            if isinstance(value, Tensor):
                inputs += size * is_batched
                input_gradients += size * (is_batched and value.requires_grad)
                gradients += size * (not is_batched and value.requires_grad)
        return Batch(samples, batched, inputs, input_gradients, gradients, tuple(sizes))

    def beside(self, batched: Sequence[bool]) -> Batch:
        """The same with more inputs behind those it has, of which these hold samples."""
        return replace(self, batched=(*self.batched, *batched), sizes=(*self.sizes, *(0 for _ in batched)))

    def counts(self) -> list[int]:
        """Numbers of slices, ascending, that cut the batch into equal parts."""
        return [count for count in range(2, self.size + 1) if self.size % count == 0]


def leading_sizes(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[int | None]:
    """The first size of every input of Dynamo's graph that is data; None for numbers, parameters and buffers."""
    return [
        int(value.shape[0]) if is_data and value.dim() > 0 else None
        for value, is_data in zip(example_inputs, hooks.data_inputs(gm), strict=True)
    ]


@dataclass(frozen=True)
class Microbatches:
    """`count` slices of a batch, of which `held` keep their residuals from forward to backward.

    `draws` says what random numbers the graph draws (`Separability`), which a second forward must draw again. `relaid`
    are the indices of convolution weights that are laid out channels-last once, for all slices; `copies` is their size
    in bytes. `changed` are the indices of inputs that the forward changes in place.
    """

    batch: Batch
    count: int
    held: int
    draws: str = NOTHING
    relaid: tuple[int, ...] = ()
    copies: int = 0
    changed: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """Samples in a slice."""
        return self.batch.size // self.count

    def names(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the samples of slice `index` are those that run."""
        return samples_of_slice(index * self.samples, self.samples)

    @property
    def besides(self) -> int:
        """Bytes that slicing takes throughout: copies of weights and of what is changed, states of generators."""
        old = sum(self.batch.sizes[index] for index in self.changed)
        of_slices = sum(
            self.batch.sizes[index] // (self.count if self.batch.batched[index] else 1) for index in self.changed
        )
        states = 2 * STATE if self.draws != NOTHING else 0
        return self.copies + old + max(self.held, 1) * of_slices + states

    def episodes(self, ends: Ends) -> tuple[PeakScenario, ...]:
        """The moments of a sliced step at which memory may peak; `ends` are those of *one slice*."""
        others = self.count - 1
        inputs = self.batch.inputs - self.batch.inputs // self.count + self.besides
        outside = ends.results + ends.kept + ends.tangents
        waiting = inputs + others * outside + self.batch.input_gradients
        moments = [
            PeakScenario("forward", inputs + self.count * ends.results, max(self.held - 1, 0)),
            PeakScenario("loss", inputs + others * (ends.results + ends.between), self.held - 1),
            PeakScenario("backward", waiting + self.batch.gradients, max(self.held - 2, 0)),
        ]
        if self.held:
            moments.append(PeakScenario("backward", waiting, self.held - 1))
        if self.held < self.count:
            again = inputs + self.count * outside + self.batch.input_gradients + self.batch.gradients
            moments.append(PeakScenario("forward", again, 0, again=True))
        return tuple(moments)


@dataclass(frozen=True)
class PeakScenario:
    """One run of a graph's `phase` ("forward", "loss" or "backward") while more is alive than that run needs.

    `extra` bytes, and what the graph's residuals take `others` times more (-1: not even this run's). `again` says that
    a forward runs a second time, in the backward.
    """

    phase: str
    extra: int
    others: int
    again: bool = False

    def beside(self, extra: int, others: int) -> PeakScenario:
        """The same beside so much more."""
        return replace(self, extra=self.extra + extra, others=self.others + others)
