"""The pipeline: every pass over a joint graph, in order.

    joint graph -> deduplicate -> separate -> split_backward -> gather_pooling -> shapes_only
                -> partition -> forward, backward -> hoist -> place -> late_layout -> analyse -> pose -> plan
                -> rewrite -> volume_kernels

A pass is a function of a `Job` that reads and fills its fields. The runner owns timing, logging and disabling by name
(`disabled`); passes contain none of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from xconv_fx import hooks
from xconv_fx.options import Options
from xconv_fx.passes.batch_separability import NOTHING, separability
from xconv_fx.passes.canonical_views import name_shapes
from xconv_fx.passes.conv3d_kernels import volume_kernels as choose_volume_kernels
from xconv_fx.passes.drop_shape_only import shapes_only as forget_values
from xconv_fx.passes.gather_pooling import gather_pooling as gather_pool_backward
from xconv_fx.passes.graph import nbytes
from xconv_fx.passes.insert_codecs import rewrite as rewrite_pair
from xconv_fx.passes.late_layout import late_layout as lay_out_late
from xconv_fx.passes.late_layout import relaid_operands
from xconv_fx.passes.move_device import place as place_halves
from xconv_fx.passes.partition import Pair
from xconv_fx.passes.partition import hoist as hoist_saved
from xconv_fx.passes.partition import partition as partition_joint
from xconv_fx.passes.residuals import Residual, find_residuals
from xconv_fx.passes.scatter_pooling import scatter_pooling as scatter_pool_backward
from xconv_fx.passes.split_conv_backward import split_backward as split_joint
from xconv_fx.plan import Plan
from xconv_fx.plan.log import log
from xconv_fx.planner import solve
from xconv_fx.planner.dependencies import link
from xconv_fx.planner.microbatch import slice_step
from xconv_fx.planner.peak_scenarios import ONCE, Calls
from xconv_fx.planner.problem import Posed
from xconv_fx.planner.problem import pose as pose_problem
from xconv_fx.planner.slicing import Batch, Slicing
from xconv_fx.planner.surroundings import ALONE, Surroundings


@dataclass
class Job:
    """One joint graph on its way through the pipeline.

    `arguments` are the partitioner's. `around` is what is alive during the step besides this graph's own tensors,
    `corrections` what audits found the prediction of a phase ("forward", "loss", "backward") to be short of; in bytes.
    `goes_on` says that its results are read by further code of the model, `calls` how often it runs in a step.
    `stream` names a fixed sequence of seeds; `batch` says which inputs hold samples (None: none do), and `slicing` how
    many of them this graph is for (None: all); `saved` is the share of the residuals that the partitioner may save,
    the others being recomputed from them, convolutions included. `device` is where the graphs are moved to after they
    were traced on another one (None: nowhere), `bounds` what is known of the plan beforehand. The fields below are
    filled by the passes: `mixing` is why the batch cannot be sliced, "" when it can, `draws` and `changed` what slices
    need to know (`Separability`); `phase_peaks` are the plan's.
    """

    joint: fx.GraphModule
    joint_inputs: Sequence[object]
    arguments: dict[str, Any]
    options: Options
    around: Surroundings = ALONE
    corrections: dict[str, int] = field(default_factory=dict)
    goes_on: bool = False
    calls: Calls = ONCE
    stream: int | None = None
    batch: Batch | None = None
    slicing: Slicing | None = None
    saved: float = 1.0
    device: str | None = None
    bounds: solve.Bounds = solve.ANY
    draws: str = NOTHING
    changed: tuple[int, ...] = ()
    mixing: str = "no input holds several samples"
    pair: Pair | None = None
    residuals: dict[str, Residual] = field(default_factory=dict)
    posed: Posed | None = None
    plan: Plan | None = None
    phase_peaks: dict[str, int] = field(default_factory=dict)

    @property
    def relaid(self) -> tuple[tuple[int, ...], int]:
        """Which inputs are convolution weights that Inductor copies to channels-last, and the copies' bytes."""
        assert self.pair is not None
        weights = relaid_operands(self.pair.forward, 1)
        names = [node.name for node in self.joint.graph.find_nodes(op="placeholder")]
        return tuple(names.index(node.name) for node in weights), sum(map(nbytes, weights))

    @property
    def samples(self) -> int:
        """Samples of the batch that the graph is for."""
        assert self.batch is not None
        return self.batch.size if self.slicing is None else self.slicing.samples


def deduplicate(job: Job) -> None:
    hooks.deduplicate(job.joint)


def plain_views(job: Job) -> None:
    name_shapes(job.joint)


def separate(job: Job) -> None:
    if job.batch is not None:
        found = separability(job.joint, job.batch.batched, job.samples, job.arguments["num_fwd_outputs"])
        job.mixing, job.draws, job.changed = found.mixing, found.draws, found.changed


def split_backward(job: Job) -> None:
    split_joint(job.joint, hooks.channels_last_convolutions(job.joint, job.device))


def scatter_pooling(job: Job) -> None:
    scatter_pool_backward(job.joint)


def gather_pooling(job: Job) -> None:
    gather_pool_backward(job.joint)


def shapes_only(job: Job) -> None:
    forget_values(job.joint, hooks.channels_last_convolutions(job.joint, job.device))


def partition(job: Job) -> None:
    job.pair = partition_joint(job.joint, job.joint_inputs, job.saved, **job.arguments)


def hoist(job: Job) -> None:
    assert job.pair is not None
    hoist_saved(job.pair.forward.graph)


def place(job: Job) -> None:
    if job.device is not None:
        assert job.pair is not None
        place_halves((job.pair.forward, job.pair.backward), job.device)


def late_layout(job: Job) -> None:
    assert job.pair is not None
    lay_out_late(job.pair)


def analyse(job: Job) -> None:
    assert job.pair is not None
    job.residuals = find_residuals(job.pair)


def pose(job: Job) -> None:
    assert job.pair is not None
    apart = not job.mixing
    posed = link(pose_problem(job.pair, job.residuals, job.options, job.around, job.corrections, apart, job.goes_on))
    posed = replace(posed, calls=job.calls)
    # Of a slice it is the problem for any number of slices that are held.
    job.posed = posed if job.slicing is not None else slice_step(posed, None)


def plan(job: Job) -> None:
    assert job.posed is not None
    job.plan, job.phase_peaks = solve.plan(job.posed, job.options, job.slicing, job.bounds)


def rewrite(job: Job) -> None:
    assert job.pair is not None and job.posed is not None and job.plan is not None
    rewrite_pair(job.pair, job.residuals, job.posed.chains, job.plan.choices, job.stream, job.posed.norms)


def volume_kernels(job: Job) -> None:
    assert job.pair is not None
    for half in (job.pair.forward, job.pair.backward):
        choose_volume_kernels(half.graph)
        half.recompile()


Pass = Callable[[Job], None]

BUDGETED: tuple[Pass, ...] = (
    deduplicate,
    plain_views,
    separate,
    split_backward,
    scatter_pooling,
    gather_pooling,
    shapes_only,
    partition,
    hoist,
    place,
    late_layout,
    analyse,
    pose,
    plan,
    rewrite,
    volume_kernels,
)
# Without a budget or probes: Inductor's own forward and backward, made right, and the report on what they hold.
PLAIN: tuple[Pass, ...] = (deduplicate, scatter_pooling, partition, place, analyse, pose, plan)


def run(job: Job, disabled: Sequence[str] = ()) -> Job:
    """Run every pass that is not disabled by name, in order."""
    passes = PLAIN if job.options.plain else BUDGETED
    for step in passes:
        if step.__name__ in disabled:
            continue
        start = time.perf_counter()
        step(job)
        log.debug("pass %s: %.3f s", step.__name__, time.perf_counter() - start)
    return job
