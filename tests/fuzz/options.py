"""Options at random: budgets from the lowest to none, codecs, slices, and what else changes a plan."""

from __future__ import annotations

import random
from typing import Any

CODECS = [
    "exact", "exact", "exact", "exact", "all", "all", "exact,quantize", "quantize:2", "keep", "bitmask,recompute",
    "all,fixed", "exact,fixed:4", "probe", "exact,probe:gaussian", "exact,quantize:8",
]  # fmt: skip
PRESETS = ["actnn:L1", "actnn:L2", "actnn:L3", "xconv", "xconv:orthogonal"]


def draw_options(rng: random.Random, batch: int) -> dict[str, Any]:
    """What `torch.compile(options=...)` gets; some of them cannot be met."""
    options: dict[str, Any] = {}
    if rng.random() < 0.92:
        share = rng.choice([100, 95, 90, 85, 80, 75, 70, 65, 60, 55, 45, 20])
        options["mem_budget"] = f"{share}%"
    if rng.random() < 0.12:
        options["codecs"] = rng.choice(PRESETS)
        if rng.random() < 0.7:
            options.pop("mem_budget", None)
    elif rng.random() < 0.85:
        options["codecs"] = rng.choice(CODECS)
    if rng.random() < 0.25 and options.get("codecs") not in PRESETS:
        options["slices"] = rng.choice([n for n in range(1, batch + 1) if batch % n == 0])
    if rng.random() < 0.2:
        options["prefer"] = rng.choice(["exact", "speed", "balanced"])
    if rng.random() < 0.1 and "mem_budget" in options:
        options["max_noise"] = rng.choice([1e-4, 0.01, 0.5])
    if rng.random() < 0.1:
        options["reserve"] = rng.choice([1000, 20_000])
    if rng.random() < 0.2:
        options["seed"] = rng.randint(0, 99)
    # Later additions come last, so that cases keep their numbers.
    if rng.random() < 0.08 and "mem_budget" in options:
        options["max_slowdown"] = rng.choice([0.05, 0.5, 2.0])
    if rng.random() < 0.08 and "mem_budget" in options:
        options["max_layer_noise"] = rng.choice([0.01, 0.3, None])
    if rng.random() < 0.08:
        options["verify"] = rng.choice(["warn", "off"])
    if rng.random() < 0.1 and "mem_budget" in options:
        options["mem_budget"] = rng.choice([50_000, 200_000, 600_000, 2_000_000, 20_000_000])
    if rng.random() < 0.05 and options.get("codecs", "all") in ("all", "probe"):
        options["probes"] = rng.choice([2, 8, 64])
    if rng.random() < 0.05 and options.get("codecs", "all") == "all":
        options["sample_bits"] = True
    return options


def noisy(options: dict[str, Any]) -> bool:
    """Whether these options allow codecs that add noise."""
    codecs = options.get("codecs", "all")
    return any(name in codecs for name in ("all", "quantize", "probe", "fixed", "actnn", "xconv"))


def biased(options: dict[str, Any]) -> bool:
    """Whether they allow codecs whose gradients are close, not unbiased."""
    return "fixed" in options.get("codecs", "all")
