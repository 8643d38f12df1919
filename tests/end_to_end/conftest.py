"""Fixtures that compile a model with the backend and tell what it planned.

Dynamo counts compilations per line of code, across models and tests, and stops compiling at its limit; so every test
starts from an empty Dynamo. Compiled code that several tests look at is kept as its results, by module fixtures.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers.compiled import Compile, Compiled
from torch import nn

from xconv_fx.errors import BudgetInfeasibleError


@pytest.fixture(scope="session")
def compile_model(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`compile_model(model, **options)`: `torch.compile` with this backend and a report."""
    folder, numbers = tmp_path_factory.mktemp("plans"), itertools.count()

    def compiled(model: nn.Module, **options: Any) -> Compiled:
        report = folder / f"{next(numbers)}.json"
        return Compiled(torch.compile(model, backend="xconv", options={"report": report, **options}), report)

    return compiled


@pytest.fixture(scope="session")
def compile_tightly(compile_model: Compile) -> Compile:
    """`compile_tightly(model, *inputs, **options)`: compiled on the least budget for these inputs.

    The percentage of a network's peak that can be saved depends on what the machine's convolutions allocate inside,
    the least budget does not: on it, something is always compressed that could be. The batch is not sliced unless
    `slices` says so, which would leave less to compress.
    """

    def compiled(model: nn.Module, *inputs: Any, **options: Any) -> Compiled:
        options.setdefault("slices", 1)
        with pytest.raises(BudgetInfeasibleError) as caught:
            torch.compile(copy.deepcopy(model), backend="xconv", options={**options, "mem_budget": "1kB"})(*inputs)
        return compile_model(model, mem_budget=caught.value.smallest, **options)

    return compiled


@pytest.fixture(autouse=True)
def _fresh_dynamo(fresh_dynamo: None) -> None:
    """For every test here."""
