"""Steps in slices without a compiler: the graph that Dynamo traced, rewritten for a slice and run eagerly.

`check(model, x)` proves that the model's samples are apart, and holds the sliced step, forward and backward, against
plain autograd: results, gradients, buffers and inputs, in float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from helpers.tracing import Traced, trace
from xconv_fx.hooks.capture import copied
from xconv_fx.passes.batch_separability import Separability, separability
from xconv_fx.passes.slice_graph import slice_graph
from xconv_fx.planner.microbatches import Batch, Microbatches
from xconv_fx.runtime.microbatch_step import MicrobatchedStep, Result, slice_inputs


@dataclass
class Step:
    """Dynamo's graph of a model, and what is proved of it."""

    traced: Traced
    batch: Batch
    proof: Separability

    def sliced(self, count: int, held: int) -> MicrobatchedStep:
        microbatches = Microbatches(self.batch, count, held, self.proof.draws, changed=self.proof.changed)
        gm, whole = copied(self.traced.dynamo), self.traced.example_inputs
        drawn = slice_graph(gm, whole, slice_inputs(whole, microbatches), self.batch.size, microbatches.samples)
        return MicrobatchedStep(gm, microbatches, Result.of(self.traced.dynamo), drawn)


def step_of(model: nn.Module, *inputs: Tensor) -> Step:
    """The step of a model as the backend sees it."""
    traced = trace(model, *inputs)
    batch = Batch.of(traced.dynamo, traced.example_inputs)
    assert batch is not None
    results = traced.arguments["num_fwd_outputs"]
    return Step(traced, batch, separability(traced.gm, batch.batched, batch.size, results))


def run(model: nn.Module, step: Step | None, count: int, held: int, *inputs: Tensor) -> dict[str, Any]:
    """What a training step leaves behind: results, gradients, buffers, inputs. By plain autograd without `step`."""
    model, inputs = copy.deepcopy(model), tuple(value.clone() for value in inputs)
    torch.manual_seed(7)
    if step is None:
        results = model(*inputs)
    else:
        sliced = step.sliced(count, held)

        def backend(gm: Any, example_inputs: Any) -> Any:
            return sliced

        torch._dynamo.reset()
        results = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((value.cos() * torch.linspace(0.5, 1, value.numel()).view(value.shape)).sum() for value in results
               if value.requires_grad)  # fmt: skip
    loss.backward()
    left: dict[str, Any] = {f"result {i}": value.detach() for i, value in enumerate(results)}
    left |= {f"{i} requires a gradient": torch.tensor(value.requires_grad) for i, value in enumerate(results)}
    left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    left |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    left |= {f"input {i}": value for i, value in enumerate(inputs)}
    return left


def check(model: nn.Module, *inputs: Tensor, counts: tuple[tuple[int, int], ...] = ((2, 1), (3, 0), (6, 6))) -> Step:
    """Assert that (`count`, `held`) slices leave behind what plain autograd does; the model must draw nothing."""
    model = model.double()
    inputs = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    step = step_of(copy.deepcopy(model), *(value.clone() for value in inputs))
    assert step.proof.mixing == "", step.proof.mixing
    wanted = run(model, None, 1, 1, *inputs)
    for count, held in counts:
        torch.testing.assert_close(run(model, step, count, held, *inputs), wanted)
    return step
