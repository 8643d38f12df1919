"""Errors: what they say, that they cross process borders, and that Dynamo does not hide them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from xconv_fx.errors import (
    BudgetInfeasibleError,
    OptionError,
    UnsupportedModelError,
    UnsupportedTorchError,
    UsageError,
    XConvError,
)
from xconv_fx.hooks.surfacing import surfaced_by_dynamo

CONSUMERS = [(f"layer{i}", (i + 1) * 10**6) for i in range(7)]
ERRORS = [
    XConvError("plain"),
    OptionError("codecs", ["quantise"], "write 'quantize'"),
    BudgetInfeasibleError(10**9, 2 * 10**9, CONSUMERS),
    UnsupportedTorchError("2.9.0", ">=2.12,<2.16", "no custom_partitioner_fn"),
    UnsupportedModelError("decoder.up", "a view of a saved output", "return a copy"),
    UsageError("no such file: nets.py", "did you mean 'net.py'?"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_errors_survive_pickling_and_copying(error, duplicate):
    again = duplicate(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert {name: getattr(again, name) for name in error._fields} == {n: getattr(error, n) for n in error._fields}
    assert isinstance(again, ValueError)


def test_option_error_names_option_value_and_remedy():
    error = OptionError("codecs", ["quantise"], "write 'quantize'")
    assert str(error) == "codecs=['quantise']: write 'quantize'"
    assert (error.option, error.value) == ("codecs", "['quantise']")


def test_option_error_shortens_a_huge_value_and_pickles_an_unpicklable_one():
    assert len(str(OptionError("inductor", {"x": "y" * 1000}, "short"))) < 120
    unpicklable = OptionError("probes", lambda: None, "write an int")
    assert "lambda" in pickle.loads(pickle.dumps(unpicklable)).value


def test_infeasible_budget_lists_the_five_largest_consumers_and_a_budget_that_would_do():
    error = BudgetInfeasibleError(10**9, 1_234_567_890, CONSUMERS)
    assert [label for label, _ in error.consumers] == ["layer6", "layer5", "layer4", "layer3", "layer2"]
    for text in ("1.00 GB", "1.24 GB", "7.00 MB  layer6", "mem_budget='1.24GB'"):
        assert text in str(error)
    assert "layer1" not in str(error)


def test_infeasible_budget_that_misses_by_a_little_shows_the_difference():
    message = str(BudgetInfeasibleError(2_000_000_000, 2_000_000_001))
    assert "2,000,000,000 B" in message and "2,000,000,001 B" in message


def _raise_from_backend(error: Exception) -> None:
    @surfaced_by_dynamo
    def backend(graph, inputs):
        raise error

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_dynamo_surfaces_our_errors_as_their_own_type(error):
    with pytest.raises(type(error)) as caught:
        _raise_from_backend(error)
    assert str(caught.value) == str(error)
    assert type(pickle.loads(pickle.dumps(caught.value))) is type(error)


def test_surfaced_traceback_leads_from_the_call_to_the_backend_without_dynamo_between():
    with pytest.raises(OptionError) as caught:
        _raise_from_backend(OptionError("seed", -1, "write a positive int"))
    functions = [entry.name for entry in caught.traceback]
    assert functions[-1] == "backend"
    assert not {"call_user_compiler", "_compile"} & set(functions)


def test_an_error_that_inductor_wrapped_is_unwrapped():
    from torch._inductor.exc import InductorError

    with pytest.raises(OptionError, match="x=1: y"):
        _raise_from_backend(InductorError(OptionError("x", 1, "y"), None))


def test_other_errors_stay_backend_failures():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="not ours"):
        _raise_from_backend(TypeError("not ours"))


def test_outside_dynamo_the_decorated_backend_raises_the_same_type():
    @surfaced_by_dynamo
    def backend(value: int) -> int:
        if value < 0:
            raise OptionError("value", value, "write a positive int")
        return value + 1

    assert backend(1) == 2
    with pytest.raises(OptionError, match="value=-1"):
        backend(-1)
