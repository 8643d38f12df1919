"""The backend on fake CUDA tensors: its plan, its audit and Inductor's code of a case. Nothing is compiled or run.

For the process that has a fake device (`device.install` is called here). The backend is left as it is, but for what is
to be seen of it: each half's graph and code (`_Auditing`), and the step that is taken (`Generated.load`), whose kernels
are not compiled.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xconv_fx import hooks
from xconv_fx.compiler import generate as generating
from xconv_fx.compiler.candidates import FULL_BATCH, Variant
from xconv_fx.compiler.capture import CaptureRequest
from xconv_fx.compiler.comparison import Comparison
from xconv_fx.compiler.generate import Generated as Step
from xconv_fx.compiler.generate import _Auditing
from xconv_fx.ops import lowering
from xconv_fx.ops.codec import SavedAs
from xconv_fx.options import Options
from xconv_fx.passes.graph import output_node
from xconv_fx.plan import Choice
from xconv_fx.planner import probe_ladder, solve
from xconv_fx.planner.families import probes
from xconv_fx.runtime.session import Session
from xconv_fx.step.backend import xconv

from .device import install
from .nets import NETS
from .records import Case, Generated, Half, Value

# Elements of a tensor for which a forced probe codec holds the bytes of one float32.
SHARE = 16


def generate(case: Case, capability: int = 90) -> Generated:
    """The code of a case for a GPU of this compute capability. Raises what the backend raises."""
    _installed(capability)
    torch.compiler.reset()
    torch.manual_seed(0)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    net = NETS[case.net]
    model = _on_fake_device(net.make(), mode)
    start, watch = time.perf_counter(), _Watch()
    with warnings.catch_warnings(record=True) as warned, watch.watching(), contextlib.ExitStack() as around:
        warnings.simplefilter("always")
        around.enter_context(mode)
        if case.amp:
            around.enter_context(torch.autocast("cuda", getattr(torch, case.amp)))
        x = torch.empty(net.shape, device="cuda:0")
        if case.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        torch.compile(model, backend=functools.partial(_compile, case), dynamic=False)(x)
    return watch.generated(case, time.perf_counter() - start, tuple(str(one.message) for one in warned))


@functools.cache
def _installed(capability: int) -> None:
    install(capability)


def _on_fake_device(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fakes on the device."""
    fakes: dict[int, Any] = {}
    with mode, torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
            is_parameter = isinstance(value, nn.Parameter)
            fakes[id(value)] = nn.Parameter(fake, value.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, fakes)


def _compile(case: Case, gm: fx.GraphModule, inputs: list[Any]) -> Any:
    """Dynamo's backend: what is compiled is thrown away, and the graph runs on fakes as it is."""
    if case.force is None and case.slices == 1:
        xconv(gm, inputs, options=dict(case.options))
    else:
        _forced(case, gm, inputs)
    return gm.forward


def _forced(case: Case, gm: fx.GraphModule, inputs: list[Any]) -> None:
    """Code for the choices that the case forces, whatever they cost."""
    options = Options.parse({"mem_budget": "1GB", **dict(case.options)})
    lowering.install()
    hooks.specialise(inputs)
    request, variant = CaptureRequest(gm, inputs, options, Session.of(options)), FULL_BATCH
    if case.slices > 1:
        sliced = Comparison(replace(request, options=replace(options, slices=case.slices))).asked_slices()
        assert sliced is not None
        variant = Variant(replace(sliced, held=case.held))
    with _choices(case):
        planned = generating.plan(request, variant)
        generating.generate(request, variant, planned, enforced=False).load()


@contextlib.contextmanager
def _choices(case: Case) -> Iterator[None]:
    """While active, plans hold as the case forces what can be held so; of several such candidates the middle one."""

    def plan(planning: Any, options: Options, microbatches: Any = None, bounds: Any = None) -> Any:
        rows = [[n for n, one in enumerate(row) if _is(one.choice, case)] for row in planning.candidates]
        choice = tuple(fits[len(fits) // 2] if fits else 0 for fits in rows)
        return solve.plan_of(planning, options, choice, None, microbatches)

    def offered(blank: SavedAs, *_: Any) -> list[SavedAs]:
        assert case.force is not None
        return _folded(blank, case.force.bits, bool(case.force.means))

    folds = case.force is not None and case.force.kind == "fold"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(solve, "plan", plan))
        if folds:
            stack.enter_context(mock.patch.object(probes, "probe_candidates", offered))
        yield


def _is(choice: Choice, case: Case) -> bool:
    wanted = case.force
    if wanted is None:
        return choice.codec == "keep"
    given = [name for name in ("codec", "kind", "bits") if name != "bits" or wanted.bits or wanted.kind == "fold"]
    return all(getattr(choice.spec, name) == getattr(wanted, name) for name in given)


def _folded(blank: SavedAs, bits: int | None, means: bool) -> list[SavedAs]:
    if blank.order[0] != 0 or len(blank.size) < 3:
        return []
    fold = blank.varied(kind="fold", bits=bits, means=means)
    if bits is None:
        count = probe_ladder.fitting_probes(blank.size, blank.order, prod(blank.size[1:]) // SHARE)
        return [fold.varied(probes=count)]
    held = probe_ladder._folds(fold, 4 * prod(blank.size) // SHARE)
    return [] if held is None else [held]


class _Watch:
    """What is seen of the backend: the halves of every plan that code was generated for, and the step that is taken."""

    def __init__(self) -> None:
        self.halves: dict[int, list[Half]] = {}
        self.results: dict[int, int] = {}
        self.taken: Step | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        entering, code_of, watch = _Auditing.entering, _Auditing.generated, self
        graphs: dict[int, tuple[fx.GraphModule, bool]] = {}

        def enter(audit: _Auditing, gm: fx.GraphModule, inputs: Any, is_backward: bool) -> None:
            graphs[id(audit)] = fx.GraphModule(gm, copy.deepcopy(gm.graph)), is_backward
            entering(audit, gm, inputs, is_backward)

        def generated(audit: _Auditing, code: str) -> None:
            watch.halves.setdefault(id(audit.planned), []).append(_half(*graphs[id(audit)], code))
            watch.results[id(audit.planned)] = audit.results
            code_of(audit, code)

        def load(step: Step) -> None:
            watch.taken = step

        with (
            mock.patch.object(_Auditing, "entering", enter),
            mock.patch.object(_Auditing, "generated", generated),
            mock.patch.object(Step, "load", load),
        ):
            yield

    def generated(self, case: Case, seconds: float, warned: tuple[str, ...]) -> Generated:
        step = self.taken
        assert step is not None and step.planned is not None, "no step was taken"
        halves = tuple(self.halves[id(step.planned)])
        peaks = dict(step.planned.phase_peaks)
        results = self.results[id(step.planned)]
        return Generated(case, halves, step.planned.plan, dict(step.audited.peaks), peaks, seconds, results, warned)


def _half(gm: fx.GraphModule, is_backward: bool, code: str) -> Half:
    outputs: Any = output_node(gm.graph).args[0]
    gives = tuple(one.name if isinstance(one, fx.Node) else "" for one in outputs)
    return Half(is_backward, gm.code, tuple(map(_value, gm.graph.find_nodes(op="placeholder"))), gives, code)


def _value(node: fx.Node) -> Value:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return Value(node.name, number=value)
    size, stride = (tuple(int(n) for n in row) for row in (value.shape, value.stride()))
    return Value(node.name, size, stride, str(value.dtype).removeprefix("torch."), str(value.device))
