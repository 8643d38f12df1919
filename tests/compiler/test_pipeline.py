"""The runner: order, disabling by name, and jobs in which there is nothing to do."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.tracing import run_joint, run_pair, trace
from torch import nn

from xconv_fx.compiler import pipeline


@pytest.fixture(scope="module")
def traced():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
    return trace(nn.Sequential(*layers), torch.randn(2, 3, 16, 16))


NAMES = [step.__name__ for step in pipeline.BUDGETED]


def test_passes_run_in_order_and_are_timed(traced, caplog):
    with caplog.at_level(logging.DEBUG, logger="xconv_fx"):
        traced.job(mem_budget="1GB")
    ran = [record.message.split()[1].rstrip(":") for record in caplog.records if record.message.startswith("pass ")]
    assert ran == NAMES


def test_passes_are_disabled_by_name(traced, caplog):
    with caplog.at_level(logging.DEBUG, logger="xconv_fx"):
        job = traced.job(disabled=("gather_pooling", "rewrite"), mem_budget="1GB")
    text = caplog.text
    assert "pass partition" in text and "pass rewrite" not in text and "pass gather_pooling" not in text
    assert "max_pool_backward" not in job.pair.backward.code
    assert job.plan is not None


def test_without_a_budget_the_graph_is_torchs_own(traced):
    job = traced.job()
    assert {choice.codec for choice in job.plan.choices} == {"keep"}
    assert "max_pool_backward" not in job.pair.backward.code
    expected = run_joint(traced.gm, traced.primals, traced.tangents())
    results, gradients = run_pair(job.pair, traced.primals, traced.tangents())
    for one, other in zip([*results, *gradients], expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_model_without_convolutions():
    traced = trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 8))
    job = traced.job(mem_budget="100%")
    assert job.plan.choices == ()
    expected = run_joint(traced.gm, traced.primals, traced.tangents())
    results, gradients = run_pair(job.pair, traced.primals, traced.tangents())
    for one, other in zip([*results, *gradients], expected, strict=True):
        assert one is other is None or torch.equal(one, other)
