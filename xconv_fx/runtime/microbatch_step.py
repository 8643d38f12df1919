"""Run a training step in slices of the batch: the same gradients, with the activations of one slice at a time.

Where every sample is computed apart (`passes/batch_separability.py` proves it), forward and backward may be compiled
for a slice of the batch and run once for each. The results are written into one tensor, the gradients of the parameters
are summed. The last `held` slices of the forward keep their residuals; the others keep nothing, and run their forward
again when the backward comes to them. So the step takes, besides parameters, inputs, results and gradients, the
residuals of `held` slices and the working memory of one: from all that a batch needs (one slice) in steps of 1/count
down to what a single sample needs, for up to one more forward of time.

What a step does once, it does once: a draw that all samples share is made anew from the same state of the generator in
every slice; buffers and inputs that the forward changes in place are copied for each slice, and changed for the caller
by the first run of a slice alone.

Gradient accumulation over micro-batches and checkpointing (Chen et al., arXiv 1604.06174) are the two ends of this
scale; here the loss sees the whole batch, and the planner chooses the place in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge

from xconv_fx import hooks
from xconv_fx.errors import DoubleBackwardError
from xconv_fx.ops import layout
from xconv_fx.passes.batch_separability import BATCH, NOTHING, SAMPLES
from xconv_fx.passes.graph import arguments, output_node
from xconv_fx.passes.slice_graph import Drawn
from xconv_fx.planner.microbatches import Microbatches

from .unplanned import planned


def slice_inputs(example_inputs: Sequence[Any], microbatches: Microbatches) -> list[Any]:
    """What a slice's graph is compiled for: fake tensors of the slice's sizes."""
    mode = hooks.fake_mode_of(example_inputs)
    sliced: list[Any] = []
    with mode if mode is not None else contextlib.nullcontext():
        for index, (value, is_batched) in enumerate(zip(example_inputs, microbatches.batch.batched, strict=True)):
            if is_batched or index in microbatches.relaid:
                shape = [int(n) for n in value.shape]
                strides = [int(n) for n in value.stride()]
                if is_batched:
                    shape[0] = microbatches.samples
                part = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
                if index in microbatches.relaid:
                    part = part.contiguous(memory_format=torch.channels_last)
                value = part.requires_grad_(value.requires_grad)
            sliced.append(value)
    return sliced


@dataclass(frozen=True)
class Result:
    """A result as it was traced for the whole batch: whether it requires a gradient, and how it lies in memory."""

    differentiable: bool
    strides: tuple[int, ...] = ()

    @staticmethod
    def of(gm: fx.GraphModule) -> tuple[Result, ...]:
        """The results of Dynamo's graph."""
        values = [getattr(node, "meta", {}).get("example_value") for node in arguments(output_node(gm.graph))[0]]
        return tuple(
            Result(value.requires_grad, tuple(map(int, value.stride()))) if isinstance(value, Tensor) else Result(False)
            for value in values
        )


class MicrobatchedStep:
    """Runs a function that was compiled for one slice on a whole batch, differentiably."""

    def __init__(
        self,
        function: Callable[..., Any],
        microbatches: Microbatches,
        results: Sequence[Result] | None = None,
        drawn: Drawn | None = None,
    ) -> None:
        """`results` are those of the whole batch; None: all require a gradient that can, and lie as those of slices do.

        `drawn` is what the function takes besides its inputs.
        """
        self.function, self.results, self.drawn = function, results, drawn or Drawn()
        self.microbatches = replace(microbatches, batch=microbatches.batch.beside(self.drawn.batched))

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        more = () if self.drawn.draw is None else self.drawn.draw()
        return _MicrobatchedFunction.apply(self, *inputs, *more)

    def arguments(self, leaves: Sequence[Any], index: int) -> list[Any]:
        """What the function takes for slice `index`: batched leaves narrowed to it, copies of what it changes."""
        start, length = index * self.microbatches.samples, self.microbatches.samples
        chosen = [
            leaf.detach().narrow(0, start, length).requires_grad_(leaf.requires_grad) if is_batched else leaf
            for leaf, is_batched in zip(leaves, self.microbatches.batch.batched, strict=True)
        ]
        for place in self.microbatches.changed:
            chosen[place] = chosen[place].clone()
        return chosen

    def leaves(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs cut off from the caller's autograd graph; weights relaid, and what is changed as it was."""
        cut = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
        for index in self.microbatches.relaid:
            cut[index] = cut[index].contiguous(memory_format=torch.channels_last)
        for index in self.microbatches.changed:
            cut[index] = cut[index].clone()
        return [
            value.requires_grad_(given.requires_grad) if isinstance(given, Tensor) else value
            for value, given in zip(cut, inputs, strict=True)
        ]

    def change(self, inputs: Sequence[Any], arguments: Sequence[Any], index: int) -> None:
        """Change the caller's tensors as slice `index` changed its own: samples once each, the shared at the end."""
        start, length = index * self.microbatches.samples, self.microbatches.samples
        for place in self.microbatches.changed:
            if self.microbatches.batch.batched[place]:
                inputs[place].narrow(0, start, length).copy_(arguments[place])
            elif index == self.microbatches.count - 1:
                inputs[place].copy_(arguments[place])

    def detached(self, results: Sequence[Any]) -> list[Tensor]:
        """The results that require no gradient."""
        return [
            value
            for value, traced in self._traced(results)
            if isinstance(value, Tensor)
            and not (traced.differentiable and value.dtype.is_floating_point | value.dtype.is_complex)
        ]

    def whole(self, parts: Sequence[Any]) -> list[Any]:
        """Memory for the results of all slices, of which these are one's; what is no tensor as it is."""
        return [_whole(part, self.microbatches.count, traced.strides) for part, traced in self._traced(parts)]

    def _traced(self, values: Sequence[Any]) -> Iterator[tuple[Any, Result]]:
        """Results of the function, each with what was traced for it."""
        return zip(values, self.results or [Result(True)] * len(values), strict=True)


class _MicrobatchedFunction(torch.autograd.Function):
    """The whole batch's step, to autograd one operation."""

    @staticmethod
    def forward(ctx: Any, step: MicrobatchedStep, *inputs: Any) -> tuple[Any, ...]:
        microbatches = step.microbatches
        ctx.set_materialize_grads(False)
        ctx.step, ctx.held, ctx.draws = step, {}, _Draws(microbatches, inputs)
        # Autograd's own check that nobody writes to what the backward reads; of what is changed it reads copies.
        kept = [value for place, value in enumerate(inputs) if place not in microbatches.changed]
        ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))
        ctx.leaves = step.leaves(inputs)
        results: list[Any] = []
        for index in range(microbatches.count):
            held = index >= microbatches.count - microbatches.held and any(ctx.needs_input_grad)
            arguments = step.arguments(ctx.leaves, index)
            if not held:
                arguments = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
            with torch.enable_grad(), microbatches.names(index), ctx.draws.first_run(index):
                part = step.function(*arguments)
            results = results or step.whole(part)
            _write(results, part, index * microbatches.samples)
            step.change(inputs, arguments, index)
            if held:
                ctx.held[index] = arguments, _edges(part)
            del part, arguments
        ctx.mark_non_differentiable(*step.detached(results))
        return tuple(results)

    @staticmethod
    @torch.compiler.disable  # A backward may run inside of a compiled function.
    @hooks.as_called
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        with torch.no_grad(), planned():
            found = _MicrobatchedFunction.gradients(ctx, gradients)
        if torch.is_grad_enabled():  # create_graph=True
            found = tuple(None if value is None else _Constant.apply(value, *inputs) for value in found)
        return (None, *found)

    @staticmethod
    def gradients(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs, slice by slice from the last to the first."""
        step, microbatches, leaves = ctx.step, ctx.step.microbatches, ctx.leaves
        whole: dict[int, Tensor] = {}
        for index in reversed(range(microbatches.count)):
            start, length = index * microbatches.samples, microbatches.samples
            arguments, edges = ctx.held.pop(index, None) or _forward_again(ctx, step, index)
            pairs = [
                (edge, gradient.narrow(0, start, length))
                for edge, gradient in zip(edges, gradients, strict=True)
                if edge is not None and gradient is not None
            ]
            if pairs:
                torch.autograd.backward([edge for edge, _ in pairs], [gradient for _, gradient in pairs])
            for place, is_batched in enumerate(microbatches.batch.batched):
                if is_batched and arguments[place].grad is not None:
                    if place not in whole:
                        whole[place] = torch.zeros_like(leaves[place])
                    whole[place].narrow(0, start, length).copy_(arguments[place].grad)
            del arguments, edges, pairs
        return tuple(whole.get(place, _taken(leaf)) for place, leaf in enumerate(leaves))


def _write(results: Sequence[Any], part: Sequence[Any], start: int) -> None:
    """Copy a slice's results to where they belong; a loop's variable in the caller would outlive `part`."""
    for whole, value in zip(results, part, strict=True):
        if isinstance(value, Tensor):
            whole.narrow(0, start, value.shape[0]).copy_(value.detach())


class _Constant(torch.autograd.Function):
    """A gradient, which cannot be differentiated again: doing so is an error rather than zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise DoubleBackwardError


def _taken(leaf: Any) -> Tensor | None:
    """The gradient summed in a leaf, which is left without."""
    if not isinstance(leaf, Tensor):
        return None
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _forward_again(ctx: Any, step: MicrobatchedStep, index: int) -> tuple[list[Any], list[Any]]:
    """Slice `index` once more, from the random state that its first forward had; its arguments and gradient edges."""
    arguments = step.arguments(ctx.leaves, index)
    with ctx.draws.again(index), torch.enable_grad(), step.microbatches.names(index):
        part = step.function(*arguments)
    return arguments, _edges(part)


def _edges(values: Sequence[Any]) -> list[Any]:
    """Where gradients of the values enter: keeps their graph alive, and not their memory."""
    return [get_gradient_edge(v) if isinstance(v, Tensor) and v.requires_grad else None for v in values]


def _whole(part: Any, count: int, strides: Sequence[int]) -> Any:
    """Memory for `count` parts in one tensor: by these strides where they leave no gaps, else with samples outermost
    and each laid out as in the part. Numbers as they are."""
    if not isinstance(part, Tensor):
        return part
    shape = [count * part.shape[0], *part.shape[1:]]
    if len(strides) == len(shape) and layout.dense_order(shape, strides) is not None:
        return torch.empty_strided(shape, strides, dtype=part.dtype, device=part.device)
    shape, strides = list(part.shape), list(part.stride())
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
    shape[0] *= count
    if extent * part.shape[0] == part.numel():
        return torch.empty_strided(shape, [extent, *strides[1:]], dtype=part.dtype, device=part.device)
    return torch.empty(shape, dtype=part.dtype, device=part.device)


class _Draws:
    """The random numbers of one step: those that slice `index` drew first, it draws again.

    What each sample draws for itself comes from a seed of the slice's own, drawn from the generator; what all samples
    share from the state in which the step finds the generator, which goes on as after one run.
    """

    def __init__(self, microbatches: Microbatches, inputs: Sequence[Any]) -> None:
        self.kind = microbatches.draws
        # Those of the tensors: a backward runs in a thread whose current device may be another than the forward's.
        self.devices = sorted({v.device.index for v in inputs if isinstance(v, Tensor) and v.device.type == "cuda"})
        if self.kind == SAMPLES:
            self.seeds: list[int] = torch.randint(2**63 - 1, (microbatches.count,)).tolist()
        elif self.kind == BATCH:
            self.state = torch.get_rng_state()
            self.states = {device: torch.cuda.get_rng_state(device) for device in self.devices}

    @contextlib.contextmanager
    def first_run(self, index: int) -> Iterator[None]:
        if self.kind == BATCH:
            self._rewind()
            yield
        else:
            with self.again(index):
                yield

    @contextlib.contextmanager
    def again(self, index: int) -> Iterator[None]:
        """Inside, the draws of a slice; the generator is left as it was."""
        if self.kind == NOTHING:
            yield
            return
        with torch.random.fork_rng(self.devices):
            if self.kind == BATCH:
                self._rewind()
            else:
                torch.default_generator.manual_seed(self.seeds[index])
                for device in self.devices:
                    torch.cuda.default_generators[device].manual_seed(self.seeds[index])
            yield

    def _rewind(self) -> None:
        torch.set_rng_state(self.state)
        for device, state in self.states.items():
            torch.cuda.set_rng_state(state, device)
