"""The runner: order, disabling by name, what it writes and checks, and graphs in which there is nothing to do."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.tracing import run_joint, run_pair, text, trace
from torch import nn
from torch._inductor.fx_passes.post_grad import view_to_reshape

from xconv_fx.compiler import pipeline
from xconv_fx.errors import OptionError


@pytest.fixture(scope="module")
def traced():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
    return trace(nn.Sequential(*layers), torch.randn(2, 3, 16, 16))


def same(job, traced, exactly=False):
    """Assert that the graphs compute what the joint graph does."""
    expected = run_joint(traced.gm, traced.primals, traced.tangents())
    for half in (job.pair.forward, job.pair.backward):
        view_to_reshape(half)  # As Inductor does: ATen's convolutions lie otherwise than their fakes.
    results, gradients = run_pair(job.pair, traced.primals, traced.tangents())
    for one, other in zip([*results, *gradients], expected, strict=True):
        if one is None or exactly:
            assert one is other is None or torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other)


ROWS = (*pipeline.NORMALISE, *pipeline.LOWER, *pipeline.PREPARE)
NAMES = [*(one.name for one in ROWS), "insert_codecs", *(one.name for one in pipeline.KERNELS)]


def test_passes_run_in_order_and_are_timed(traced, caplog):
    with caplog.at_level(logging.DEBUG, logger="xconv_fx"):
        traced.job(mem_budget="1GB")
    ran = [record.message.split()[1].rstrip(":") for record in caplog.records if record.message.startswith("pass ")]
    assert ran == NAMES


@pytest.mark.parametrize("name", pipeline.OPTIONAL)
def test_without_an_optional_pass_the_results_are_the_same(traced, caplog, name):
    with caplog.at_level(logging.DEBUG, logger="xconv_fx"), pipeline.without(name), pipeline.verified():
        job = traced.job(mem_budget="1GB", codecs="exact")
    assert "pass insert_codecs" in caplog.text and f"pass {name}" not in caplog.text
    assert ("max_pool_backward" in job.pair.backward.code) == (name != "gather_pooling")
    same(job, traced)


def test_passes_that_results_depend_on_are_not_disabled():
    with (
        pytest.raises(OptionError, match=r"pass='insert_codecs'.*they are canonical_views, "),
        pipeline.without("insert_codecs"),
    ):
        pass
    with pytest.raises(OptionError, match="did you mean 'gather_pooling'"), pipeline.without("gather_poolin"):
        pass


def test_the_trace_gets_what_each_pass_changed(traced, monkeypatch):
    dumped = {}
    monkeypatch.setattr(pipeline.trace, "listening", lambda: True)
    monkeypatch.setattr(pipeline.trace, "artifact", lambda name, payload, encoding: dumped.update({name: payload()}))
    traced.job(mem_budget="1GB")
    assert list(dumped) == [f"xconv_pass_{name}" for name in NAMES]
    assert any(
        line.startswith("+") and "max_pool_backward" in line for line in dumped["xconv_pass_gather_pooling"].split("\n")
    )
    assert dumped["xconv_pass_move_device"] == "nothing changed"


def test_graphs_that_do_not_fit_together_are_found(traced):
    pair = traced.analysed().pair
    pair.verify()
    saved, placeholder = next(iter(pair.saved().values()))
    placeholder.meta["val"] = placeholder.meta["val"].new_empty(1)
    with pytest.raises(AssertionError, match=saved.name):
        pair.verify()


def test_one_analysis_serves_many_plans(traced):
    """Writing a plan into the graphs leaves those of the analysis as they were."""
    found = traced.planning(mem_budget="1GB")
    before = text(found.analysed.pair.forward.graph), text(found.analysed.pair.backward.graph)
    kept = found.chosen(tuple(0 for _ in found.planning.residuals))
    last = found.chosen(tuple(len(row) - 1 for row in found.planning.candidates))
    assert {choice.codec for choice in last.plan.choices} != {"keep"}
    assert text(last.pair.forward.graph) != text(kept.pair.forward.graph)
    assert (text(found.analysed.pair.forward.graph), text(found.analysed.pair.backward.graph)) == before
    same(kept, traced)


def test_without_a_budget_the_graph_is_torchs_own(traced):
    job = traced.job()
    assert {choice.codec for choice in job.plan.choices} == {"keep"}
    assert "max_pool_backward" not in job.pair.backward.code
    same(job, traced, exactly=True)


def test_a_model_without_convolutions():
    traced = trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 8))
    job = traced.job(mem_budget="100%")
    assert job.plan.choices == ()
    same(job, traced, exactly=True)
