"""The pytest plugin: memory budgets of tests.

    @pytest.mark.xconv_budget("1.5GB")          # what the test's function allocates, and what its fixtures gave it
    def test_step(model): ...

    def test_part(memory_budget):
        with memory_budget("200MB", model, x):  # a block of a test; model and x count as well
            ...

A test over its budget fails with the largest allocations that were alive at its peak and the lines that led to them.
`xconv_fx.testing.assert_plan` asserts predicted peaks. pytest loads this module in every run, so it imports nothing but
pytest before a test asks for a budget.

Known gaps: a test of which something is measured cannot use another profiler, and a marked test not the fixture.
Knowing the lines makes Python several times slower: compile models in a fixture, or write `lines=False`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest

MARKER = "xconv_budget"
USAGE = f'@pytest.mark.{MARKER}("1.5GB"), or with device="cpu", device="cuda" or lines=False'


def pytest_configure(config: pytest.Config) -> None:
    what = "fail if the test's physical peak of memory is over size, such as '1.5GB'"
    config.addinivalue_line("markers", f"{MARKER}(size, device=None, lines=True): {what}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A worker of xdist dies of a usage error, so there each of its tests fails by itself.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for item in items:
            _budget(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        budget = _budget(item)
    except pytest.UsageError as error:
        pytest.fail(str(error), pytrace=False)
    if budget is None:
        return (yield)
    from xconv_fx.errors import OptionError
    from xconv_fx.measure.origins import recorded
    from xconv_fx.testing import checked_device, excess

    size, given = budget
    try:
        device = checked_device(given.get("device"))
    except OptionError as error:
        pytest.fail(f"{item.nodeid}: {error}", pytrace=False)
    resident = list(getattr(item, "funcargs", {}).values())
    with recorded(resident, device, lines=given.get("lines", True)) as recording:
        result = yield
    if message := excess(recording, size):
        pytest.fail(message, pytrace=False)
    return result


@pytest.fixture
def memory_budget(request: pytest.FixtureRequest) -> Callable[..., AbstractContextManager[Any]]:
    """`with memory_budget("1.5GB", *resident, device=None) as recording:` fails if the block's peak is over the size.

    It is `xconv_fx.testing.within_budget`: `recording.peak.bytes` and `recording.alive` have the numbers.
    """
    if request.node.get_closest_marker(MARKER) is not None:
        pytest.fail(f"a test has the marker {MARKER} or the fixture memory_budget, not both", pytrace=False)
    from xconv_fx.testing import within_budget

    return within_budget


def _budget(item: pytest.Item) -> tuple[int, Mapping[str, Any]] | None:
    """Bytes and keywords of an item's marker; None without one. Raises `pytest.UsageError`."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return None
    from xconv_fx.errors import OptionError
    from xconv_fx.options.budget import parse_size

    if len(marker.args) != 1 or not marker.kwargs.keys() <= {"device", "lines"}:
        raise pytest.UsageError(f"{item.nodeid}: {MARKER} takes one size; write {USAGE}")
    try:
        return parse_size(marker.args[0], option=MARKER), marker.kwargs
    except OptionError as error:
        raise pytest.UsageError(f"{item.nodeid}: {error}") from error
