"""XConv's estimators in a `torch.fx` graph that is never compiled: from `symbolic_trace`, or `torch.export`.

`substitute` puts one node, `torch.ops.xconv.convolution` or `torch.ops.xconv.linear`, in the place of each convolution
and linear operation that a plan names: calls of `torch.nn` layers, of functions of `torch.nn.functional`, and of ATen
operators. Padding by "same", or by anything but zeros, stays an operation before it. So that memory is saved, ReLUs
become `torch.ops.xconv.relu`, which holds bits: otherwise each would hold the tensor that the next layer does not.

A graph has no evaluation mode: weight gradients are estimated whenever gradients are enabled, and without gradients
everything is exact.

Known gaps: `addmm` and `mm`, into which decompositions turn linear layers, are left alone without a word.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

from xconv_fx.errors import OptionError
from xconv_fx.options import Probes
from xconv_fx.passes.provenance import origin_meta
from xconv_fx.plan import Plan

from . import RELU_HOLDS
from .assignment import Assignment, ByPattern, ByPlan
from .fx_sites import Site, rectifier, sketching
from .report import Conversion, Row
from .sketch import PLAIN_BITS, Sketch

if TYPE_CHECKING:
    from xconv_fx.step.explain import Explanation

PLAN_HINT = (
    "write the plan of `xconv_fx.step.explain.explain`, or probes: a number, or a mapping such as {'decoder.*': 16}"
)


def substitute(
    graph_module: fx.GraphModule,
    plan: Plan | Explanation | Iterable[Plan] | int | Mapping[str, int],
    *,
    bits: int = PLAIN_BITS,
    kind: str = "fold",
    means: bool | None = None,
    inplace: bool = False,
) -> tuple[fx.GraphModule, Conversion]:
    """The graph with XConv's operations in the place of convolutions and linear ones, and a report.

    `plan` is what `explain` returns for the model, or a number of probes, or a mapping of layer names or patterns to
    numbers; only with these `bits`, `kind` and `means` say more, as in `xconv_fx.nn`. Layers are named as in the model
    that the graph was made of. The result is another module that shares parameters and submodules with
    `graph_module`, or with `inplace` that module itself; its graph is linted and its code made anew. The report names
    every convolution and linear operation, those that were left as they were with the reason.

    Raises `OptionError` for settings that make no sense, and patterns that match no layer.
    """
    assignment = _assignment(plan, Sketch.parse(None, kind, bits, means))
    if not inplace:
        graph_module = _sharing_copy(graph_module)
    graph = graph_module.graph
    sites = [site for node in graph.nodes if (site := sketching(node, graph_module))]
    relus = [site for node in graph.nodes if (site := rectifier(node, graph_module))]
    assignment.check({site.layer for site in sites})
    rows = [_replace(site, graph, assignment.sketch([site.layer])) for site in sites]
    if any(row.holds for row in rows):
        rows += [_replace(site, graph, assignment.why_whole([site.layer]) or RELU_HOLDS) for site in relus]
    graph.lint()
    graph_module.recompile()
    return graph_module, Conversion(tuple(rows), assignment.notes, assignment.plans)


def _sharing_copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another module with a graph of its own, and the same parameters and submodules."""
    with warnings.catch_warnings():
        # torch.export's graphs say how their inputs are nested in a class that warns when it is copied.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        copied = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    copied.meta = dict(graph_module.meta)
    return copied


def _assignment(plan: Any, base: Sketch) -> Assignment:
    plans = (plan,) if isinstance(plan, Plan) else getattr(plan, "plans", plan)
    if isinstance(plans, (tuple, list)) and plans and all(isinstance(item, Plan) for item in plans):
        if base != Sketch.of():
            raise OptionError("bits, kind, means", str(base), "a plan says this itself; leave them out")
        return ByPlan(plans)
    if isinstance(plan, bool) or not isinstance(plan, (int, Mapping)):
        raise OptionError("plan", plan, PLAN_HINT)
    return ByPattern(Probes.parse(plan), base)


def _replace(site: Site, graph: fx.Graph, sketch: Sketch | str) -> Row:
    """Replace the node of a site, unless there is a reason not to: its row of the report."""
    reason = sketch if isinstance(sketch, str) else site.reason
    if isinstance(sketch, str) or reason:
        return Row(site.layer, site.type, reason=reason)
    with graph.inserting_before(site.node):
        first = site.node.prev
        result = site.write(sketch)
    while first.next is not site.node:
        first = first.next
        first.meta = origin_meta(site.node)
    site.node.replace_all_uses_with(result.node)
    graph.erase_node(site.node)
    return Row(site.layer, site.type, str(sketch))
