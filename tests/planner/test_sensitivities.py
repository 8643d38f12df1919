"""What a plan takes from statistics, and what it says of layers without."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import trace
from torch import nn

import xconv_fx
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.errors import OptionError
from xconv_fx.noise.expected import expected_noise, measured_noise
from xconv_fx.ops.codec import SavedAs
from xconv_fx.ops.fixed import normal_error
from xconv_fx.options import Options
from xconv_fx.options.statistics import LayerStatistics, Layout, Statistics
from xconv_fx.passes.residuals import find_residuals
from xconv_fx.planner import solve
from xconv_fx.planner.dependencies import link
from xconv_fx.planner.problem import build_problem
from xconv_fx.planner.requirement import StorageKind


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1))


X = torch.randn(4, 3, 16, 16)


@pytest.fixture(scope="module")
def pair():
    return trace(build(), X).pair()


@pytest.fixture(scope="module")
def stats():
    return xconv_fx.calibrate(build(), lambda out: (out - 1).square().mean(), [(X, ())])


def posed_of(pair, stats, **options):
    return link(build_problem(pair, find_residuals(pair), Options.parse({"stats": stats, **options})))


def candidates(planning, residual, codec="quantize"):
    row = dict(zip((r.name for r in planning.residuals), planning.candidates, strict=True))[residual]
    return {c.choice.bits: c for c in row if c.choice.codec == codec}


def test_an_input_adds_its_codes_variance_relative_to_all_sgd_noise(pair, stats):
    found = candidates(posed_of(pair, stats, codecs="quantize,bitmask,probe"), "relu_1")
    known = stats.layers["5"]
    for bits, v in known.layout((0, 2, 3, 1)).codes:
        candidate = found[bits]
        assert candidate.choice.noise == v
        assert candidate.option.noise == pytest.approx(v * known.energy / stats.sgd)
        assert candidate.added.layers == (("5", pytest.approx(candidate.option.noise)),)
    assert found[2].choice.noise != candidates(posed_of(pair, None), "relu_1")[2].choice.noise


def test_a_normalisations_input_adds_what_reaches_the_layers_before(pair, stats):
    """The first layer's input is the network's, which is no residual; its gradient counts all the same."""
    candidate = candidates(posed_of(pair, stats), "convolution")[4]
    known = stats.layers["1"]
    assert [name for name, _ in known.reaches] == ["0"]
    v = dict(known.layout((0, 2, 3, 1)).codes)[4]
    assert candidate.added.layers == (("0", pytest.approx(v * known.reached(v)[0][1] / stats.sgd)),)
    assert candidate.choice.noise == v


def test_plans_report_each_layer_relative_to_its_own_sgd_noise(pair, stats):
    planning = posed_of(pair, stats, codecs="quantize,bitmask")
    codes = [[i for i, c in enumerate(row) if c.choice.codec == "quantize"] for row in planning.candidates]
    plan = solve.describe(planning, tuple(row[0] if row else 0 for row in codes), None, 0, 0.0)
    assert plan.measured and dict(plan.layers).keys() <= {"0", "3", "5"} and len(plan.layers) > 1
    # Every layer's noise in units of its own SGD noise adds up to the plan's, in units of all.
    total = sum(noise * stats.layers[name].sgd for name, noise in plan.layers) / stats.sgd
    assert plan.noise == pytest.approx(total) and plan.noise > 0
    assert not any("prior" in note for note in plan.notes)


def test_layers_without_statistics_keep_the_prior_and_are_named(pair, stats):
    some = Statistics({name: layer for name, layer in stats.layers.items() if name != "5"})
    planning, prior = posed_of(pair, some), posed_of(pair, None)
    assert candidates(planning, "relu_1")[4].option.noise == candidates(prior, "relu_1")[4].option.noise
    plan = solve.describe(planning, tuple(0 for _ in planning.residuals), None, 0, 0.0)
    assert "without statistics, their noise by a prior: 5" in plan.notes
    assert not solve.describe(prior, tuple(0 for _ in prior.residuals), None, 0, 0.0).measured


def test_statistics_of_other_layers_are_refused(pair, stats):
    others = Statistics({f"net.{name}": layer for name, layer in stats.layers.items()})
    with pytest.raises(
        OptionError, match=r"'net\.0, net\.1, net\.3, net\.5': none of these layers is in the graph.*3, 5"
    ):
        posed_of(pair, others)


BLANK = SavedAs(CodecSpec("probe", probes=128, kind="fold"), (2, 8, 16, 16), torch.float32, (0, 2, 3, 1))


def test_factors_between_measured_numbers_of_terms_are_interpolated(stats):
    known = stats.layers["5"]
    folds = known.layouts["channels_last"].folds
    plain = expected_noise(BLANK.varied(bits=None), rectified=False)
    between = next(fold.folding for fold in folds if fold.terms == 16)
    assert measured_noise(BLANK, known) == pytest.approx(plain * between)
    many = BLANK.varied(probes=2)
    assert measured_noise(many, known) == pytest.approx(1023 * folds[-1].folding), "beyond the last, as the last"


def test_what_was_not_measured_of_a_layer_is_a_prior():
    bare = LayerStatistics((4, 8), 1, {"contiguous": Layout(((4, 0.5),))}, energy=1.0, sgd=1.0)
    for kind in ("fold", "gaussian"):
        held = BLANK.varied(kind=kind)
        assert measured_noise(held, bare) == expected_noise(held, rectified=True)


def narrowest(candidate):
    """The fewest bits of codes that it can be recomputed from."""
    ((_, required),) = candidate.requires
    return min(spec.bits for spec in required.specs)


def test_a_replay_is_as_noisy_as_the_codes_that_it_is_made_from(pair, stats):
    """Of each width that its source may have; by the prior as noisy as the source, else as measured."""
    for known in (None, stats):
        planning = posed_of(pair, known, codecs="quantize,recompute,bitmask")
        rows = dict(zip((r.name for r in planning.residuals), planning.candidates, strict=True))
        source = [r.name for r in planning.residuals].index("convolution")
        replays = {narrowest(c): c for c in rows["relu"] if c.kind is StorageKind.RECOMPUTED_FROM_CODES}
        codes = candidates(planning, "convolution")
        assert set(replays) == {2, 4, 8}
        for bits, replay in replays.items():
            ((item, allowed),) = replay.option.needs
            widths = {rows["convolution"][place].choice.bits for place in allowed} - {None}
            assert item == source and widths == {width for width in (2, 4, 8) if width >= bits}
            if known is None:
                assert replay.choice.noise == codes[bits].choice.noise
            else:
                assert replay.choice.noise == dict(dict(known.layers["3"].replays)["1"])[bits]
        assert replays[2].option.noise > 10 * replays[4].option.noise > 100 * replays[8].option.noise > 0


def test_fixed_point_adds_what_was_measured(pair, stats):
    """What it changes on the data, not the prior for normal values, in the layer before and in that which replays."""
    priors = {}
    for known in (None, stats):
        planning = posed_of(pair, known, codecs="fixed:2,fixed:4,fixed:8,bitmask")
        rows = dict(zip((r.name for r in planning.residuals), planning.candidates, strict=True))
        replays = {narrowest(c): c for c in rows["relu"] if c.kind is StorageKind.RECOMPUTED_FROM_SIGNED_CODES}
        held = candidates(planning, "convolution", "fixed")
        assert set(replays) == set(held) == {2, 4, 8}
        for bits in held:
            assert held[bits].choice.noise == normal_error(bits)
            if known is None:
                priors[bits] = replays[bits].choice.noise
                assert priors[bits] == normal_error(bits)
                continue
            before, after = (
                dict(dict(layer.fixed)[name]) for layer, name in ((known.layers["1"], "0"), (known.layers["3"], "1"))
            )
            assert held[bits].added.layers == (("0", pytest.approx(before[bits] / stats.sgd)),)
            assert replays[bits].choice.noise == after[bits] != priors[bits]
