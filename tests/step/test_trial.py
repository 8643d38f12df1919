"""A small network that is trained to see whether it works here: what is wrong with a step, and that none is here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from xconv_fx.step.trial import Trial, train_a_step

FINE = Trial(error=2e-4, saved_before=100, saved_after=80, audited=1000, measured=1010)


def test_a_step_of_this_machine_is_as_it_should_be():
    trial = train_a_step("cpu")
    assert trial.wrong() == "" and abs(trial.off) < 0.03


def test_a_wrong_gradient_is_noticed(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **given: compiled(lambda x: 1.01 * net(x), **given))
    assert train_a_step("cpu").wrong() == "its gradients are off by 0.02"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"error": 0.01}, "its gradients are off by 0.01"),
        ({"error": float("nan")}, "its gradients are off by nan"),
        ({"saved_after": 100}, "nothing is held in less memory"),
        ({"measured": 0}, "the step was not measured"),
        ({"measured": 1100}, "its peak is +10.0% off the audited one"),
    ],
)
def test_what_may_be_wrong_is_named(change, told):
    assert dataclasses.replace(FINE, **change).wrong() == told
