"""The planning problem of small pairs: what is alive at which step, and which ways of holding are legal."""

from __future__ import annotations

import pytest
import torch
from helpers.storage import way
from helpers.tracing import trace
from torch import nn

from xconv_fx.cost_model.memory import peak, profile
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
    ("relu", "relu", {}, {"keep", "bitmask", "quantize1", "quantize2", "quantize4", "quantize8", "probe2"}),
    ("relu", "relu", {"codecs": "exact"}, {"keep", "bitmask"}),
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


def test_a_rerun_needs_sources_that_are_at_most_one_replay_away():
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)]
    planning = posed_of(trace(nn.Sequential(*layers), torch.randn(2, 3, 16, 16)).pair(), codecs="exact")
    order = [r.name for r in planning.residuals]
    rows = {name: {way(c): c.option for c in row} for name, row in zip(order, planning.candidates, strict=True)}
    offered = {name: [way(c) for c in row] for name, row in zip(order, planning.candidates, strict=True)}
    assert rows["convolution"]["recomputed_convolution"].needs == (), "the network's input is there anyway"
    needs = {
        order[item]: {offered[order[item]][i] for i in allowed}
        for item, allowed in rows["convolution_1"]["recomputed_convolution"].needs
    }
    assert needs == {"relu": {"keep", "recomputed_elementwise"}, "convolution": {"keep"}}
    assert rows["convolution_1"]["recomputed_convolution"].time > rows["relu_1"]["recomputed_elementwise"].time > 0
    # From where it is first read, by itself or by what is replayed from it, its result is held in full.
    first, last, size = rows["convolution_1"]["recomputed_convolution"].loads[1]
    labels = planning.problem.labels
    assert first < last and size == 2 * 8 * 16 * 16 * 4
    assert labels[first].startswith("convolution_backward"), "the next layer's weight gradient reads the replayed relu"


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
    rows = dict(zip(order, planning.candidates, strict=True))
    late, early = (c for c in rows["convolution"] if way(c) == "recomputed_convolution")
    (added,) = (name for name in order if name.startswith("add"))
    ((item, allowed),) = late.option.needs
    assert order[item] == added and {way(rows[added][i]) for i in allowed} == {"keep"}
    assert early.option.needs == ()
    # The sum's first reader is the head's weight gradient, which is the first of all.
    assert early.option.loads[1][0] < late.option.loads[1][0]
    assert labels[early.option.loads[1][0]] == next(n for n in labels if n.startswith("convolution_backward"))
    # Both say the same of the residual: which of them a plan means, the other residuals tell.
    for sum_is, meant in ((0, late), (1, early)):
        choice = [0] * len(order)
        choice[order.index("convolution")], choice[item] = rows["convolution"].index(meant), sum_is
        choices = [row[place].choice for row, place in zip(planning.candidates, choice, strict=True)]
        assert choice_of(planning, choices) == tuple(choice)


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
    keep, apart = planning.candidates[0]
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
