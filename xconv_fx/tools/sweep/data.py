"""A frontier as plain values, which `json` writes, and which the page is drawn from."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from xconv_fx.plan import Choice, Plan
from xconv_fx.plan.report import codec_name

from .frontier import Frontier, Point
from .memory import Memory

FORMAT = 1


def to_json(frontier: Frontier) -> str:
    """JSON text of the points, each with its plans; keys sorted, so equal frontiers give equal text."""
    points = [
        {**_numbers(point), "plans": [json.loads(plan.to_json()) for plan in point.plans]} for point in frontier.points
    ]
    data = {"format": FORMAT, "points": points, "left_out": list(frontier.left_out)}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def page_data(frontier: Frontier) -> dict[str, Any]:
    """What the page shows: the points' numbers, and of every graph its residuals and the memory over the step."""
    points = [
        {**_numbers(point), "graphs": [_graph(*pair) for pair in zip(point.plans, point.memory, strict=True)]}
        for point in frontier.points
    ]
    return {"points": points, "left_out": list(frontier.left_out)}


def _numbers(point: Point) -> dict[str, Any]:
    return {
        "budget": point.budget,
        "peak": point.peak,
        "time": point.time,
        "step_time": point.seconds,
        "slowdown": point.slowdown,
        "noise": point.noise,
        "slices": point.slices,
        "codecs": point.codecs(),
    }


def _graph(plan: Plan, memory: Memory) -> dict[str, Any]:
    return {
        "slices": plan.slices,
        "held_slices": plan.held_slices,
        "peak_at": plan.peak_at,
        "notes": list(plan.notes),
        "memory": asdict(memory),
        "rows": [_row(choice) for choice in plan.choices],
    }


def _row(choice: Choice) -> dict[str, Any]:
    return {
        "layer": choice.layer or choice.residual,
        "residual": choice.residual,
        "shape": "x".join(map(str, choice.shape)) or "scalar",
        "codec": codec_name(choice),
        "probes": choice.probes,
        "bits": choice.bits,
        "before": choice.bytes_before,
        "after": choice.bytes_after,
        "noise": choice.noise,
    }
