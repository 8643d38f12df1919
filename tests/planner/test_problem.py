"""The planning problem of small pairs: what is alive at which step, and which ways of holding are legal."""

from __future__ import annotations

import pytest
import torch
from helpers.storage import way
from helpers.tracing import trace
from torch import nn

from xconv_fx.cost_model.memory import peak, profile
from xconv_fx.cost_model.segments import legal, segmented
from xconv_fx.options import Options
from xconv_fx.passes.graph import is_tangent, nbytes
from xconv_fx.passes.late_layout import layout_copies
from xconv_fx.passes.liveness import timeline
from xconv_fx.passes.residuals import find_residuals
from xconv_fx.planner.dependencies import link
from xconv_fx.planner.loss import LOSS_COPIES
from xconv_fx.planner.problem import beside, build_problem, corrected, resident_bytes
from xconv_fx.planner.solve import choice_of
from xconv_fx.planner.surroundings import Surroundings


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


NETS = {
    "relu": nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8)),
    "norm": nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)),
    "silu": nn.Sequential(conv(3, 8), nn.SiLU(), conv(8, 8)),
    "pool": nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8)),
}


@pytest.fixture(scope="module")
def pairs():
    return {name: trace(net, torch.randn(2, 3, 16, 16)).pair() for name, net in NETS.items()}


def posed_of(pair, outside=0, corrections=None, **options):
    return link(
        corrected(
            beside(build_problem(pair, find_residuals(pair), Options.parse(options)), Surroundings(outside)),
            corrections or {},
        )
    )


def names(planning, residual):
    """The options of one residual, with the widths of codes."""
    row = dict(zip((r.name for r in planning.residuals), planning.candidates, strict=True))[residual]
    return [way(candidate) for candidate in row]


def turn(planning):
    """The step of the loss, between forward and backward."""
    (step,) = planning.steps("loss")
    return step


def keep(planning):
    return (0,) * len(planning.residuals)


@pytest.mark.parametrize("net", NETS)
def test_keeping_everything_is_the_graphs_own_profile(pairs, net):
    pair = pairs[net]
    planning = posed_of(pair)
    constant = resident_bytes(pair.forward.graph.nodes) + layout_copies(pair.forward)
    forward = [constant + alive for alive in timeline(pair.forward.graph).profile()]
    if net != "pool":  # Its comparison is no step of the problem: fused into whatever holds it.
        assert profile(planning.problem, keep(planning))[: turn(planning)].tolist() == forward
    tangents = sum(nbytes(n) for n in pair.backward.graph.find_nodes(op="placeholder") if is_tangent(n))
    saved = sum(nbytes(node) for node, _ in pair.residuals().values())
    result = 2 * 8 * 8 * 8 * 4 if net == "pool" else 2 * 8 * 16 * 16 * 4
    loss = constant + saved + result + LOSS_COPIES * tangents
    assert profile(planning.problem, keep(planning))[turn(planning)] == loss


def test_a_kept_residual_dies_after_its_last_reader(pairs):
    planning = posed_of(pairs["relu"])
    (item,) = planning.problem.items
    ((first, last, size),) = item.options[0].loads
    assert size == 2 * 8 * 16 * 16 * 4
    labels = planning.problem.labels
    # In the forward it is one of the graph's own buffers until its last reader there, just before the result's copy.
    assert labels[first - 1] == "convolution_1" and first + 1 == turn(planning) == labels.index("the loss")
    assert labels[last] == "where" or labels[last].startswith("convolution")
    assert last < len(labels)


def test_phases(pairs):
    planning = posed_of(pairs["relu"])
    phases, alive = planning.phase_peaks(keep(planning)), profile(planning.problem, keep(planning))
    assert list(phases) == ["forward", "loss", "backward"]
    assert max(phases.values()) == peak(planning.problem, keep(planning))[0]
    assert phases["loss"] == alive[turn(planning)]


def test_corrections_and_outside_bytes_are_added(pairs):
    before = posed_of(pairs["relu"]).phase_peaks((0,))
    after = posed_of(pairs["relu"], outside=1000, corrections={"backward": 7}).phase_peaks((0,))
    assert {phase: after[phase] - before[phase] for phase in before} == {
        "forward": 1000,
        "loss": 1000,
        "backward": 1007,
    }


LEGAL = [
    (
        "relu",
        "relu",
        {},
        {"keep", "bitmask", "recomputed_convolution", "quantize1", "quantize2", "quantize4", "quantize8", "probe2"},
    ),
    ("relu", "relu", {"codecs": "exact"}, {"keep", "bitmask", "recomputed_convolution"}),
    ("relu", "relu", {"codecs": ["quantize:2"]}, {"keep"}),  # Without "bitmask" its sign cannot be held.
    ("relu", "relu", {"codecs": ["quantize:2", "bitmask"]}, {"keep", "bitmask", "quantize2"}),
    ("relu", "relu", {"codecs": ["probe:gaussian", "bitmask"]}, {"keep", "bitmask", "probe"}),
    ("norm", "convolution", {}, {"keep", "recomputed_convolution", "quantize1", "quantize2", "quantize4", "quantize8"}),
    ("norm", "convolution", {"codecs": "bitmask"}, {"keep"}),
    ("norm", "relu", {"codecs": "exact"}, {"keep", "bitmask", "recomputed_elementwise"}),
    (
        "norm",
        "relu",
        {"codecs": ["recompute", "quantize:4", "bitmask"]},
        {"keep", "bitmask", "recomputed_elementwise", "recomputed_from_codes", "quantize4"},
    ),
    ("norm", "relu", {"codecs": ["recompute", "quantize:4"]}, {"keep", "recomputed_elementwise"}),
    ("silu", "convolution", {}, {"keep", "recomputed_convolution"}),
    ("silu", "div", {"codecs": "exact"}, {"keep", "recomputed_elementwise"}),
    ("pool", "le", {}, {"keep", "bitmask"}),
]


@pytest.mark.parametrize(("net", "residual", "options", "expected"), LEGAL)
def test_legal_ways_to_hold(pairs, net, residual, options, expected):
    assert set(names(posed_of(pairs[net], **options), residual)) == expected


def test_replaying_needs_its_sources(pairs):
    planning = posed_of(pairs["norm"], codecs=["recompute", "quantize:1", "quantize:4", "bitmask"])
    source = [r.name for r in planning.residuals].index("convolution")
    offered = names(planning, "convolution")
    row = dict(zip(names(planning, "relu"), planning.candidates[1 - source], strict=True))
    ((item, allowed),) = row["recomputed_elementwise"].option.needs
    assert (item, {offered[i] for i in allowed}) == (source, {"keep", "recomputed_convolution"})
    ((item, allowed),) = row["recomputed_from_codes"].option.needs
    assert (item, {offered[i] for i in allowed}) == (source, {"keep", "recomputed_convolution", "quantize4"})
    assert row["keep"].option.needs == row["quantize4"].option.needs == ()


def three_norms():
    """The planning problem of conv-norm-relu three times, with exact codecs."""
    layers = [layer for _ in range(3) for layer in (conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())]
    return posed_of(trace(nn.Sequential(*layers, conv(8, 8)), torch.randn(2, 8, 16, 16)).pair(), codecs="exact")


def options_of(planning, residual, name):
    """The candidates of this kind that a residual has, the latest start first, and what each needs: kinds by name."""
    rows = dict(zip((r.name for r in planning.residuals), planning.candidates, strict=True))
    order = list(rows)
    return [
        (candidate, {order[item]: [rows[order[item]][i] for i in allowed] for item, allowed in candidate.option.needs})
        for candidate in rows[residual]
        if way(candidate) == name
    ]


def test_a_rerun_needs_sources_that_are_there_by_then():
    planning = three_norms()
    assert all(not needs for _, needs in options_of(planning, "convolution", "recomputed_convolution"))
    reruns = options_of(planning, "convolution_1", "recomputed_convolution")
    assert len(reruns) > 1, "alone, and in segments"
    for candidate, needs in reruns:
        assert set(needs) == {"relu"}, "whatever that is made of is its own matter"
        assert {way(source) for source in needs["relu"]} == {"keep", "recomputed_elementwise"}
        assert all(source.start <= candidate.start for source in needs["relu"])
    # From where it is first read, by itself or by what is replayed from it, its result is held in full.
    (alone, _), (before, _), *_ = reruns
    labels = planning.problem.labels
    for candidate in (alone, before):
        first, last, size = candidate.option.loads[1]
        assert candidate.start == first < last and size == 2 * 8 * 16 * 16 * 4
    assert labels[alone.start].startswith("sum"), "of batch norm's backward"
    assert labels[before.start].startswith("convolution_backward"), "whose weight gradient reads the replayed relu"
    replayed = options_of(planning, "relu_1", "recomputed_elementwise")[0][0]
    assert alone.option.time > replayed.option.time > 0


def test_of_a_whole_segment_nothing_is_held_but_what_it_begins_with():
    planning = three_norms()
    *_, longest = segmented(planning.problem)
    chosen = {
        r.name: row[place] for r, row, place in zip(planning.residuals, planning.candidates, longest, strict=True)
    }
    reruns = [chosen[f"convolution{part}"] for part in ("", "_1", "_2")]
    assert {way(candidate) for candidate in reruns} == {"recomputed_convolution"}
    assert len({candidate.start for candidate in reruns}) == 1, "all from the first of the network's input"
    assert {way(chosen[name]) for name in ("relu", "relu_1", "relu_2")} == {"recomputed_elementwise"}
    alive = profile(planning.problem, longest)
    tensor = 2 * 8 * 16 * 16 * 4
    saved = profile(planning.problem, keep(planning))[turn(planning)] - alive[turn(planning)]
    assert saved == pytest.approx(6 * tensor, rel=0.02), "statistics apart"


class Skipping(nn.Module):
    """What the first block makes is read by the second, and added to what that makes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(conv(c, 8), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8))
        self.head = conv(8, 8)

    def forward(self, x):
        made = self.first(x)
        return self.head(self.second(made) + made)


def test_a_rerun_is_there_in_time_for_what_is_replayed_of_what_is_replayed_from_it():
    planning = posed_of(trace(Skipping(), torch.randn(2, 3, 16, 16)).pair(), codecs="exact")
    order, labels = [r.name for r in planning.residuals], planning.problem.labels
    (added,) = (name for name in order if name.startswith("add"))
    row = planning.candidates[order.index("convolution")]
    starts = [candidate for candidate in row if way(candidate) == "recomputed_convolution"]
    late, early = next(c for c in starts if labels[c.start].startswith("convolution_backward")), starts[-1]
    # The sum's first reader is the head's weight gradient, which is the first of all.
    assert labels[early.start] == next(name for name in labels if name.startswith("convolution_backward"))
    assert early.start < late.start
    # Both say the same of the residual: which of them a plan means, the other residuals tell.
    for sum_is, meant in (("keep", late), ("recomputed_elementwise", early)):
        kinds = {"convolution": "recomputed_convolution", "relu": "recomputed_elementwise", added: sum_is}
        rows = [{way(c): c.choice for c in row} for row in planning.candidates]
        found = choice_of(planning, [row[kinds.get(name, "keep")] for name, row in zip(order, rows, strict=True)])
        assert row[found[order.index("convolution")]] is meant
        assert legal(planning.problem, list(found)) == list(found)


def test_a_replayed_source_lives_as_long_as_what_is_replayed_from_it(pairs):
    """Both die with batch norm's backward here; what is replayed holds only its statistics."""
    planning = posed_of(pairs["norm"], codecs="exact")
    row = dict(
        zip(
            names(planning, "relu"),
            planning.candidates[[r.name for r in planning.residuals].index("relu")],
            strict=True,
        )
    )
    kept, replayed = row["keep"], row["recomputed_elementwise"]
    assert replayed.choice.bytes_after < 1000 < kept.choice.bytes_after == kept.choice.bytes_before
    assert replayed.option.noise == 0 and replayed.option.time > 0


def test_bits_for_the_mask_let_go_of_the_tensor_before_the_input_gradient(pairs):
    planning = posed_of(pairs["relu"], codecs="exact")
    row = {way(candidate): candidate for candidate in planning.candidates[0]}
    keep, apart = row["keep"], row["bitmask"]
    labels = planning.problem.labels
    kept, held = (
        {labels[end] for _, end, size in c.option.loads if size == c.choice.bytes_before} for c in (keep, apart)
    )
    assert "convolution_backward_default" in held and "convolution_backward_default" not in kept
    assert apart.choice.bytes_after == keep.choice.bytes_after + 512 and apart.option.noise == 0


def test_codes_hold_less_and_add_noise(pairs):
    row = posed_of(pairs["relu"], codecs=["quantize", "bitmask"]).candidates[0]
    held = {candidate.choice.bits: candidate for candidate in row[1:]}
    sizes = [held[bits].choice.bytes_after for bits in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    # 4096 codes of 8 bits, the packed mask, and ranges.
    assert 4096 + 512 < sizes[-1] < 1.1 * (4096 + 512)
    noises = [held[bits].option.noise for bits in (1, 2, 4, 8)]
    assert noises == sorted(noises, reverse=True) and noises[-1] > 0


def test_a_decoded_tensor_exists_where_an_extern_kernel_reads_it(pairs):
    planning = posed_of(pairs["relu"], codecs=["quantize:4", "bitmask"])
    coded = next(candidate for candidate in planning.candidates[0] if candidate.choice.codec == "quantize")
    decoded = [load for load in coded.option.loads if load[2] == coded.choice.bytes_before]
    assert [(first, last) for first, last, _ in decoded] == [(first, first) for first, _, _ in decoded]
    assert {planning.problem.labels[first] for first, _, _ in decoded} == {"convolution_backward_default"}
