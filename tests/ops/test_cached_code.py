"""Code that torch keeps on disk is found again by the sources and the torch that it was made with, and by no others."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import xconv_fx.nn
from xconv_fx.fingerprint import source_hash
from xconv_fx.ops import cached_code

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture
def own_cache(tmp_path):
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=str(tmp_path)):
        yield


def found_again(sources: str, monkeypatch: Any, backend: str, **options: Any) -> dict[str, bool]:
    """Whether a step of an eager layer's code, and its forward and backward as traced, were found in torch's caches."""
    with monkeypatch.context() as patch, torch.compiler.config.patch(cache_key_tag=""):
        patch.setattr(cached_code, "source_hash", lambda: sources)
        patch.setattr("xconv_fx.compiler.capture.source_hash", lambda: sources)
        cached_code.tag_cached_code()
        torch._dynamo.reset()
        counters.clear()
        net = nn.Sequential(nn.Conv2d(1, 2, 3), xconv_fx.nn.BitReLU())
        step = torch.compile(net, backend=backend, **options)
        step(torch.ones(1, 1, 6, 6)).sum().backward()
    stats = {**counters["inductor"], **counters["aot_autograd"]}
    return {
        "kernels": stats.get("fxgraph_cache_miss", 0) == 0 and stats.get("fxgraph_cache_hit", 0) > 0,
        "traced": stats.get("autograd_cache_hit", 0) > 0,
    }


def test_inductor_finds_code_by_our_sources(own_cache, monkeypatch):
    nothing = {"kernels": False, "traced": False}
    assert found_again("one", monkeypatch, "inductor") == nothing
    assert any(found_again("one", monkeypatch, "inductor").values())
    assert found_again("another", monkeypatch, "inductor") == nothing


def test_importing_the_operators_is_enough():
    """The user's own tag stays."""
    code = "import torch, xconv_fx.nn; print(torch.compiler.config.cache_key_tag)"
    tag = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env={**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": "mine"},
    )  # fmt: skip
    assert tag.stdout.strip() == f"mine xconv-fx {source_hash()}"
    before = torch.compiler.config.cache_key_tag
    cached_code.tag_cached_code()
    assert torch.compiler.config.cache_key_tag == before
