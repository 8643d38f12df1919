"""Joint graphs of tiny models, as the backend's partitioner receives them, and how to run them on real tensors.

Nothing here generates code: tracing stops where Inductor would begin to lower. All of the operators have eager
references, so graphs run in `torch.fx.Interpreter` before and after a pass.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

# Importing Inductor raises a warning of torch 2.13's own.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._inductor.compile_fx

from xconv_fx import hooks
from xconv_fx.compiler import pipeline
from xconv_fx.options import Options
from xconv_fx.passes.graph import is_tangent, output_node
from xconv_fx.passes.instance_norm import reshape_free_instance_norm
from xconv_fx.passes.interpolation import gather_interpolation
from xconv_fx.passes.partition import Pair
from xconv_fx.passes.unpooling import scatter_unpooling
from xconv_fx.plan import Plan
from xconv_fx.planner.microbatches import Batch
from xconv_fx.planner.problem import PlanningProblem
from xconv_fx.planner.solve import describe


class _Captured(Exception):
    """Ends the compilation once the joint graph is known."""


@dataclass(frozen=True)
class Job:
    """A graph at the stage where its planning problem is known; once it is `done`, planned and with that written in."""

    options: Options
    analysed: pipeline.Analysed
    planning: PlanningProblem
    done: pipeline.Planned | None = None
    written: Pair | None = None

    def planned(self, planned: pipeline.Planned, stream: int | None = None) -> Job:
        """With this plan."""
        return replace(self, done=planned, written=pipeline.finish(planned, stream, self.options.plain))

    def chosen(self, choice: tuple[int, ...]) -> Job:
        """With these candidates chosen, whatever their peak."""
        plan = describe(self.planning, choice, None, 0, 0.0)
        return self.planned(
            pipeline.Planned(self.analysed, self.planning, None, plan, self.planning.phase_peaks(choice))
        )

    @property
    def plan(self) -> Plan:
        assert self.done is not None
        return self.done.plan

    @property
    def pair(self) -> Pair:
        assert self.written is not None
        return self.written


@dataclass
class Traced:
    """A joint graph, what the partitioner is called with, real tensors for its primals, Dynamo's graph and inputs."""

    gm: fx.GraphModule
    joint_inputs: Sequence[object]
    arguments: dict[str, Any]
    primals: list[Any]
    dynamo: fx.GraphModule
    example_inputs: list[Any]

    def joint(self) -> fx.GraphModule:
        """A copy to rewrite."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.gm.graph, copies)).meta = dict(output_node(self.gm.graph).meta)
        return fx.GraphModule(self.gm, graph)

    def analysed(self, batch: Batch | None = None, device: str | None = None, plain: bool = False) -> pipeline.Analysed:
        """The graph up to its residuals; `batch` says which inputs hold samples."""
        samples = 0 if batch is None else batch.size
        joint = pipeline.Joint(self.joint(), self.joint_inputs, self.arguments, batch, samples, 1.0, device, plain)
        return pipeline.analyse(joint)

    def planning(self, batch: Batch | None = None, **options: Any) -> Job:
        """The graph up to its planning problem."""
        chosen = Options.parse(options)
        analysed = self.analysed(batch, plain=chosen.plain)
        return Job(chosen, analysed, analysed.problem(chosen))

    def job(self, batch: Batch | None = None, **options: Any) -> Job:
        """The graph after all passes, with its plan written into it."""
        job = self.planning(batch, **options)
        return job.planned(pipeline.plan(job.analysed, job.planning, job.options))

    def pair(self) -> Pair:
        """The pair before any plan."""
        return self.analysed().pair

    def tangents(self, seed: int = 0) -> list[Tensor]:
        """Standard normal numbers in the place of the incoming gradients."""
        generator = torch.Generator().manual_seed(seed)
        values = [node.meta["val"] for node in self.gm.graph.find_nodes(op="placeholder") if is_tangent(node)]
        with unset_fake_temporarily():
            return [
                torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) for value in values
            ]


def trace(model: nn.Module | Callable[..., Any], *inputs: Tensor) -> Traced:
    """The joint graph of one call of `model`, which must compile as one graph."""
    found: dict[str, Any] = {}

    def capture(gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        found.update(gm=gm, joint_inputs=joint_inputs, arguments=arguments)
        raise _Captured

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        hooks.specialise(example_inputs)
        found.update(dynamo=gm, example_inputs=example_inputs)
        reshape_free_instance_norm(gm)
        scatter_unpooling(gm)
        gather_interpolation(gm)
        config = {"custom_partitioner_fn": hooks.Partitioner(capture, "capture"), "fx_graph_cache": False}
        try:
            with hooks.ahead_of_time_backward():
                hooks.compile_graph(copy.deepcopy(gm), example_inputs, config, lambda *_: None)
        except Exception:
            if "gm" not in found:
                raise

        def eager(*arguments: Any) -> Any:
            found["primals"] = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
            return gm(*arguments)

        return eager

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return Traced(**found)


def run_joint(gm: fx.GraphModule, primals: Sequence[Any], tangents: Sequence[Tensor]) -> list[Any]:
    """The joint graph's outputs: results, then gradients of the primals."""
    with torch.no_grad():
        return list(torch.utils._pytree.tree_leaves(fx.Interpreter(gm).run(*primals, *tangents)))


def run_pair(pair: Pair, primals: Sequence[Any], tangents: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    """Results of the forward, and gradients from the backward on what that forward saved."""
    with torch.no_grad():
        outputs = list(fx.Interpreter(pair.forward).run(*primals))
        saved, incoming = iter(outputs[pair.results :]), iter(tangents)
        placeholders = pair.backward.graph.find_nodes(op="placeholder")
        values = [next(incoming) if is_tangent(node) else next(saved) for node in placeholders]
        assert not list(saved) and not list(incoming)
        return outputs[: pair.results], list(fx.Interpreter(pair.backward).run(*values))


def targets(graph: fx.Graph) -> list[str]:
    """Names of the graph's operations, in order."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def returned(graph: fx.Graph) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(output_node(graph).args[0]))


def text(graph: fx.Graph) -> str:
    """The graph as short lines: operations without their namespaces, values by name, sizes and flags left out."""
    lines = []
    for node in graph.nodes:
        inputs = ", ".join(arg.name for arg in node.all_input_nodes)
        if node.op == "placeholder":
            lines.append(f"input {node.name}")
        elif node.op == "output":
            lines.append(f"return {', '.join(str(value) for value in returned(graph))}")
        elif getattr(node.target, "__name__", "") == "getitem":
            lines.append(f"{node.name} = {inputs}[{node.args[1]}]")
        else:
            lines.append(f"{node.name} = {str(node.target).rsplit('.', 1)[0]}({inputs})")
    return "\n".join(lines) + "\n"


def changes(before: fx.Graph, after: fx.Graph) -> str:
    """What another graph has instead of this one, as the lines of a diff with one line around each place."""
    lines = difflib.unified_diff(text(before).splitlines(), text(after).splitlines(), lineterm="", n=1)
    return "\n".join("..." if line.startswith("@@") else line for line in list(lines)[2:]) + "\n"
