"""Streams of seeds: the same seeds for the same start, whatever else draws random numbers."""

from __future__ import annotations

import pytest
import torch

from xconv_fx.ops import seed as seeds

CPU = torch.device("cpu")
draw = torch.ops.xconv.stream_seeds


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """No streams but this test's own."""
    monkeypatch.setattr(seeds, "_generators", {})


def take(stream, count=5):
    return [draw(stream, 1, CPU).item() for _ in range(count)]


def test_a_stream_repeats_from_its_start():
    seeds.start(1, 42)
    first = take(1)
    torch.manual_seed(7)
    seeds.start(1, 42)
    assert take(1) == first
    assert len(set(first)) == len(first)


def test_streams_do_not_disturb_each_other_nor_torchs_generator():
    seeds.start(1, 42)
    seeds.start(2, 42)
    seeds.start(3, 43)
    torch.manual_seed(0)
    alone = torch.rand(3)
    torch.manual_seed(0)
    one, *_ = interleaved = [tuple(draw(stream, 1, CPU).item() for stream in (1, 2, 3)) for _ in range(4)]
    assert torch.equal(torch.rand(3), alone)
    assert all(a == b for a, b, _ in interleaved)
    assert one[0] != one[2]


def test_seeds_use_all_bits():
    seeds.start(1, 0)
    drawn = take(1, 200)
    assert min(drawn) < -(2**62) and max(drawn) > 2**62


def test_a_stream_that_never_started_is_an_error():
    with pytest.raises(ValueError, match="stream 9 was not started"):
        draw(9, 1, CPU)


def test_what_is_drawn():
    seeds.start(1, 0)
    drawn = draw(1, 4, CPU)
    assert (drawn.dtype, drawn.shape, drawn.device) == (torch.int64, (4,), CPU)
    # Draws differ from call to call, so of opcheck's tests only those that compare no values apply.
    torch.library.opcheck(draw.default, (1, 4, CPU), test_utils=("test_schema", "test_faketensor"))


def test_a_compiler_may_not_merge_draws():
    assert torch.Tag.nondeterministic_seeded in draw.default.tags
    assert torch.Tag.nondeterministic_seeded in torch.ops.xconv.seeds.default.tags


def test_what_a_cuda_graph_may_capture():
    """A stream is drawn on the host, which a replay does not do again; torch's generator of a device counts replays."""
    assert torch.Tag.cudagraph_unsafe in draw.default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.xconv.seeds.default.tags


def test_a_step_without_a_stream_draws_from_torchs_generator():
    torch.manual_seed(7)
    drawn = torch.ops.xconv.seeds(2, CPU)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.randint(-(2**63), 2**63 - 1, (2,)))
    torch.library.opcheck(torch.ops.xconv.seeds.default, (2, CPU), test_utils=("test_schema", "test_faketensor"))


def test_draws_from_torchs_generator():
    """In the way in which Inductor draws the seeds of a compiled step: over all int64 but the greatest."""
    x, weight = torch.zeros(3), torch.zeros(2, 3)
    torch.manual_seed(7)
    drawn = [torch.ops.xconv.draw_seed(x, weight) for _ in range(2)]
    torch.manual_seed(7)
    assert torch.equal(torch.cat(drawn), torch.randint(-(2**63), 2**63 - 1, (2,))) and drawn[0] != drawn[1]
    torch.library.opcheck(torch.ops.xconv.draw_seed.default, (x, weight), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in torch.ops.xconv.draw_seed.default.tags
