"""With a warm Inductor cache another option must change the plan, and the same options must give the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """
import json, sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
x = torch.randn(4, 3, 16, 16)
options = json.loads(sys.argv[1])
eager = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
compiled = torch.compile(model, backend="xconv", options=options)
compiled(x).square().mean().backward()
counters = torch._dynamo.utils.counters["inductor"]
errors = [((p.grad - g).norm() / g.norm()).item() for p, g in zip(model.parameters(), eager)]
print(json.dumps({
    "gradients": [p.grad.flatten().tolist() for p in model.parameters()],
    "error": max(errors),
    "hits": counters["fxgraph_cache_hit"],
    "misses": counters["fxgraph_cache_miss"],
}))
"""


@dataclass(frozen=True)
class Run:
    """What a fresh process did: its plan file, gradients, their error, and Inductor's cache hits and misses."""

    plan: str
    gradients: list[list[float]]
    error: float
    hits: int
    misses: int


def run(folder: Path, **options: object) -> Run:
    report = folder / "plan.json"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps({"report": str(report), **options})],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Run(report.read_text(), **json.loads(done.stdout.splitlines()[-1]))


def test_warm_cache(tmp_path: Path) -> None:
    """One test, because a process takes long: cold, warm with the same options, warm with other codecs."""
    options = {"mem_budget": "88%", "codecs": "quantize,bitmask", "slices": 1, "seed": 1}
    cold, warm = run(tmp_path, **options), run(tmp_path, **options)
    assert cold.misses > 0
    assert warm.hits > 0 and warm.misses == 0, "nothing is generated again"
    assert warm.plan == cold.plan
    assert json.loads(warm.plan)[0]["audited_peak"] is not None, "code from the cache is audited too"
    assert warm.gradients == cold.gradients
    assert 0 < warm.error < 0.3

    probes = run(tmp_path, **{**options, "codecs": "probe,bitmask"})
    plan = json.loads(probes.plan)[0]
    assert "probe" in {choice["codec"] for choice in plan["choices"]}
    assert plan["audited_peak"] <= plan["budget"]
    assert probes.gradients != warm.gradients

    seeded = run(tmp_path, **{**options, "seed": 2})
    assert seeded.plan == warm.plan
    assert seeded.gradients != warm.gradients
