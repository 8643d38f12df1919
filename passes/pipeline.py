"""The pipeline: every pass over a joint graph, in order.

    joint graph -> deduplicate -> split_backward -> gather_pooling
                -> partition -> forward, backward -> hoist -> analyse -> plan -> rewrite

A pass is a function of a `Job` that reads and fills its fields. The runner owns timing, logging and disabling by name
(`disabled`); passes contain none of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xconv_fx import hooks
from xconv_fx.log import log
from xconv_fx.options import Options
from xconv_fx.plan import Plan

from . import planning
from .gather_pooling import gather_pooling as gather_pool_backward
from .partition import Pair
from .partition import hoist as hoist_saved
from .partition import partition as partition_joint
from .problem import Posed, link, pose
from .residuals import Residual, find_residuals
from .rewrite import rewrite as rewrite_pair
from .split_backward import split_backward as split_joint


@dataclass
class Job:
    """One joint graph on its way through the pipeline.

    `arguments` are the partitioner's. `outside` is what is alive during the step besides this graph's own tensors,
    `corrections` what audits found the prediction of a phase ("forward", "loss", "backward") to be short of; in bytes.
    `stream` names a fixed sequence of seeds. The fields below are filled by the passes; `phase_peaks` are the plan's.
    """

    joint: fx.GraphModule
    joint_inputs: Sequence[object]
    arguments: dict[str, Any]
    options: Options
    outside: int = 0
    corrections: dict[str, int] = field(default_factory=dict)
    stream: int | None = None
    pair: Pair | None = None
    residuals: dict[str, Residual] = field(default_factory=dict)
    posed: Posed | None = None
    plan: Plan | None = None
    phase_peaks: dict[str, int] = field(default_factory=dict)


def deduplicate(job: Job) -> None:
    hooks.deduplicate(job.joint)


def split_backward(job: Job) -> None:
    split_joint(job.joint)


def gather_pooling(job: Job) -> None:
    gather_pool_backward(job.joint)


def partition(job: Job) -> None:
    job.pair = partition_joint(job.joint, job.joint_inputs, **job.arguments)


def hoist(job: Job) -> None:
    assert job.pair is not None
    hoist_saved(job.pair.forward.graph)


def analyse(job: Job) -> None:
    assert job.pair is not None
    job.residuals = find_residuals(job.pair)


def plan(job: Job) -> None:
    assert job.pair is not None
    job.posed = link(pose(job.pair, job.residuals, job.options, job.outside, job.corrections))
    job.plan, job.phase_peaks = planning.plan(job.posed, job.options)


def rewrite(job: Job) -> None:
    assert job.pair is not None and job.posed is not None and job.plan is not None
    rewrite_pair(job.pair, job.residuals, job.posed.chains, job.plan.choices, job.stream)


Pass = Callable[[Job], None]

BUDGETED: tuple[Pass, ...] = (
    deduplicate,
    split_backward,
    gather_pooling,
    partition,
    hoist,
    analyse,
    plan,
    rewrite,
)
# Without a budget or probes: Inductor's own forward and backward, and the report on what they hold.
PLAIN: tuple[Pass, ...] = (deduplicate, partition, analyse, plan)


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
