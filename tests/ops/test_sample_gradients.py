from __future__ import annotations

import pytest
import torch
from torch import nn

from xconv_fx import SampleGradients
from xconv_fx.ops import sample_gradients


def step(function, x, scale):
    """A step whose gradient at the results is `scale` for each sample."""
    result = function(x)
    (result * scale[:, None]).sum().backward()


@pytest.fixture
def layer():
    return nn.Linear(3, 2)


def test_gradients_are_noted_by_sample(layer):
    seen, run = SampleGradients(6), sample_gradients.watched(lambda x: (layer(x),)[0:1])
    scale = torch.tensor([1.0, 2.0, 3.0])
    with seen.batch([4, 0, 2]):
        step(lambda x: run(x)[0], torch.randn(3, 3), scale)
    assert seen.squares[[4, 0, 2]].tolist() == [2.0, 8.0, 18.0]
    assert seen.squares[[1, 3, 5]].isnan().all()


def test_nothing_is_noted_without_a_batch_or_gradients(layer):
    seen, run = SampleGradients(3), sample_gradients.watched(lambda x: (layer(x),))
    step(lambda x: run(x)[0], torch.randn(3, 3), torch.ones(3))
    with seen.batch(range(3)), torch.no_grad():
        run(torch.randn(3, 3))
    assert seen.squares.isnan().all()
    assert sample_gradients.weights(3, torch.device("cpu")) is None


def test_several_results_add_up_and_the_last_graph_counts(layer):
    seen = SampleGradients(2)
    first = sample_gradients.watched(lambda x: (layer(x),))
    last = sample_gradients.watched(lambda x: (x * 2, x * 3))
    with seen.batch([0, 1]):
        (hidden,) = first(torch.randn(2, 3))
        double, triple = last(hidden)
        (double.sum() + 2 * triple.sum()).backward()
    assert seen.squares.tolist() == [2 + 2 * 4] * 2


def test_unseen_samples_count_as_the_mean():
    seen = SampleGradients(4)
    seen.squares[:2] = torch.tensor([1.0, 3.0])
    with seen.batch([0, 1, 2, 3]):
        assert sample_gradients.weights(4, torch.device("cpu")).tolist() == [1, 3, 2, 2]
        with sample_gradients.samples_of_slice(1, 2):
            assert sample_gradients.weights(2, torch.device("cpu")).tolist() == [3, 2]
        assert sample_gradients.weights(3, torch.device("cpu")) is None
    with seen.batch([2, 3]):
        assert sample_gradients.weights(2, torch.device("cpu")).tolist() == [1, 1]


def test_it_is_saved_and_loaded_like_a_module():
    seen, other = SampleGradients(3), SampleGradients(3)
    seen.squares[:] = torch.arange(3.0)
    other.load_state_dict(seen.state_dict())
    assert torch.equal(other.squares, seen.squares)


@pytest.mark.parametrize("indices", [[0, 3], [-1], [[0, 1]], [0.5]])
def test_samples_that_are_none(indices):
    with pytest.raises(ValueError, match="indices"), SampleGradients(3).batch(indices):
        pass


def test_an_empty_set():
    with pytest.raises(ValueError, match="count=0"):
        SampleGradients(0)
