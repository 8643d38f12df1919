"""Steps whose graphs are interpreted instead of compiled: what they compute, at a small part of the cost.

Everything up to Inductor's code is as it is for a user: the trace, the passes, the plan, slices, codecs by their eager
references. Halves then run node by node, and predicted peaks stand for audited ones, so that budgets mean what the
planner thinks. Generated code, audits and measured peaks are for the cases that are compiled.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import compile_fx
from torch._inductor.fx_passes.post_grad import view_to_reshape

from xconv_fx.compiler import generate


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """What is compiled meanwhile is interpreted."""
    entering = generate._Auditing.entering

    def predicting(self: generate._Auditing, gm: fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> None:
        entering(self, gm, inputs, is_backward)
        self.peaks = dict(self.planned.phase_peaks)

    with (
        mock.patch.object(compile_fx, "compile_fx_inner", _interpret),
        mock.patch.object(generate._Auditing, "entering", predicting),
    ):
        yield


def _interpret(gm: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Callable[[list[Any]], Any]:
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    # As Inductor does: views of what lies in another layout than it was traced in.
    view_to_reshape(gm)

    def run(arguments: list[Any]) -> Any:
        given = list(arguments)
        arguments.clear()
        with torch.no_grad():
            return _AsTraced(gm).boxed_run(given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _AsTraced(fx.Interpreter):
    """Gives every operator its tensors in the strides that they were traced with, as Inductor gives them to ATen's.

    Operators of ATen may return another layout than their fakes do, and others read memory as if it were contiguous.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        traced = n.meta.get("val")
        if not isinstance(result, Tensor) or not isinstance(traced, Tensor) or n.op == "placeholder":
            return result
        if result.shape != traced.shape or result.stride() == traced.stride() or result._is_view():
            return result
        return torch.empty_strided(traced.shape, traced.stride(), dtype=result.dtype).copy_(result)
