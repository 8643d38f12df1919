"""A torch that was not tested is looked at and tried once, then used with a warning or refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch import nn

from xconv_fx import hooks
from xconv_fx.errors import UnsupportedTorchError, UntestedTorchWarning
from xconv_fx.hooks import private_parts
from xconv_fx.hooks.private_parts import Fault, Private
from xconv_fx.hooks.version import SUPPORTED, TESTED
from xconv_fx.step import torch_version
from xconv_fx.step.explain import explain
from xconv_fx.step.torch_version import require_usable_torch


@pytest.fixture
def untested(monkeypatch, tmp_path):
    """A version of the next year; the list says what each trial of it found wrong."""
    monkeypatch.setattr(torch, "__version__", "2.99.1+cu150")
    monkeypatch.delenv(torch_version.TRIAL, raising=False)
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(hooks, "probe", lambda: ())
    torch_version._verdict.cache_clear()
    yield
    torch_version._verdict.cache_clear()


@pytest.mark.parametrize("patch", ["2.13.0", "2.13.7", "2.13.1+cu126", "2.14.1"])
def test_patches_of_a_tested_version_pass_silently(monkeypatch, patch):
    monkeypatch.setattr(torch, "__version__", patch)
    monkeypatch.setattr(torch_version, "found_wrong", lambda: pytest.fail("a tested version is tried"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_usable_torch()


def test_the_installer_lets_in_what_was_looked_at():
    """Every minor whose private parts are recorded, tested ones among them."""
    assert f'"torch{SUPPORTED}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    allowed = SpecifierSet(SUPPORTED)
    found = {f"2.{minor}" for minor in range(30) if allowed.contains(f"2.{minor}.1")}
    assert set(TESTED) <= found == {file.stem for file in private_parts._SIGNATURES.iterdir()}


def test_a_version_that_passes_its_trial_is_used_with_one_warning(untested, monkeypatch):
    trials = []
    monkeypatch.setattr(torch_version, "found_wrong", lambda: trials.append(1) or "")
    with pytest.warns(
        UntestedTorchWarning, match=r"torch 2\.99\.1\+cu150 was not tested \(tested: 2\.12, 2\.13, 2\.14\)"
    ):
        require_usable_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_usable_torch()
    # Another process of the same installation.
    torch_version._verdict.cache_clear()
    with pytest.warns(UntestedTorchWarning):
        require_usable_torch()
    assert len(trials) == 1
    # Other sources of this package, the same torch.
    torch_version._verdict.cache_clear()
    monkeypatch.setattr(torch_version, "source_hash", lambda: "f" * 64)
    with pytest.warns(UntestedTorchWarning):
        require_usable_torch()
    assert len(trials) == 2
    # The same of both on another Python, whose frames Dynamo and this package look into.
    torch_version._verdict.cache_clear()
    monkeypatch.setattr(torch_version.sys, "version_info", SimpleNamespace(major=3, minor=99))
    with pytest.warns(UntestedTorchWarning):
        require_usable_torch()
    assert len(trials) == 3


def test_what_is_missing_is_named(untested, monkeypatch):
    gone = Fault(Private("torch._inductor.choices", "InductorChoices", "hooks/scheduler.py"), "is not there")
    monkeypatch.setattr(hooks, "probe", lambda: (gone,))
    monkeypatch.setattr(torch_version.subprocess, "run", lambda *_, **__: pytest.fail("a net is compiled"))
    with pytest.raises(UnsupportedTorchError, match=r"hooks/scheduler.py: torch._inductor.choices.InductorChoices is"):
        require_usable_torch()
    with pytest.raises(UnsupportedTorchError):
        explain(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 4, 4), mem_budget="1GB")


def test_a_failing_trial_refuses(untested, monkeypatch):
    """In a process of its own, whose last words are the reason."""
    monkeypatch.setattr(torch_version.sys, "executable", "/bin/false")
    with pytest.raises(UnsupportedTorchError, match="is not trained rightly: exit code 1"):
        require_usable_torch()


def test_the_trial_passes_on_the_installed_torch():
    assert torch_version.found_wrong() == ""
