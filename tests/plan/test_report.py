"""The report: what a person reads at several widths, and the JSON a program reads."""

from __future__ import annotations

import dataclasses
from io import StringIO

import pytest
from rich.console import Console

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.plan import Choice, Plan
from xconv_fx.plan.report import Name, as_text, read_json, render, to_json, write_json

MB = 10**6
SHAPE = (4, 16, 96, 96, 96)


def _choice(residual, layer, codec, before, after, shape=SHAPE, noise=0.0, **parameters) -> Choice:
    spec = CodecSpec(codec, **parameters)
    return Choice(residual, layer, "relu", shape, "float32", ("weight_grad",), spec, before, after, noise)


CHOICES = (
    _choice("gt_5", "encoder.stages.3.act", "bitmask", 57 * MB, 7 * MB),
    _choice(
        "relu_3", "encoder.stages.3.blocks.1.conv_block.conv2", "probe", 226 * MB, 3 * MB, probes=8, bits=2, noise=1.3
    ),
    _choice("getitem_12", "decoder.upsample.2.norm", "quantize", 453 * MB, 57 * MB, bits=4, noise=0.03),
    _choice("mean", "bn[0]", "keep", 64, 64, shape=()),
)
PLAN = Plan(
    device="cpu",
    budget=2000 * MB,
    baseline_peak=7100 * MB,
    predicted_peak=1920 * MB,
    peak_at="convolution_backward_3 (input half)",
    fixed_bytes=312 * MB,
    choices=CHOICES,
    noise=0.25,
    time=0.016,
    gap=0.005,
    attempts=2,
    audited_peak=1880 * MB,
    notes=("cat_3: [a view] leaves the graph",),
)


GOLDEN = """
 layer                    shape          codec     r  bits     MB   held  noise
 ──────────────────────────────────────────────────────────────────────────────
 decoder.upsample.2.norm  4x16x96x96x96  quantize        4  453.0   57.0   0.03
 encoder…onv_block.conv2  4x16x96x96x96  probe     8     2  226.0   3.00    1.3
 encoder.stages.3.act     4x16x96x96x96  bitmask             57.0   7.00
 bn[0]                    scalar         keep               <0.01  <0.01

 all 4                                                      736.0   67.0

 held     67.0 MB between forward and backward instead of 736 MB (11.0x less)
 peak     1.88 GB in the compiled code, 1.92 GB predicted; Inductor alone 7.10
          GB (3.8x less)
 budget   2.00 GB: fits, 120 MB to spare
 peak at  convolution_backward_3 (input half)
 fixed    312 MB on cpu whatever the plan
 time     16 ms more a step, predicted with generic rates
 noise    0.25 of the gradients' energy, by a prior (no stats)
 search   2 attempts, 0.5% above the solver's lower bound
 note     cat_3: [a view] leaves the graph
"""


def test_golden_report_at_80_columns():
    assert as_text(PLAN, width=80) == GOLDEN.strip("\n")


@pytest.mark.parametrize("width", [40, 60, 80, 99, 100, 120, 200])
def test_no_line_is_longer_than_the_width(width):
    assert max(map(len, as_text(PLAN, width=width).splitlines())) <= width


def test_wide_reports_name_residual_and_whole_layer():
    text = as_text(PLAN, width=120)
    assert "encoder.stages.3.blocks.1.conv_block.conv2" in text and "getitem_12" in text
    assert "…" not in text


def test_rows_are_sorted_and_one_a_residual():
    twice = dataclasses.replace(PLAN, choices=(*CHOICES, CHOICES[0]))
    layers = [line.split()[0] for line in as_text(twice, width=120).splitlines()[2:7]]
    assert [layer[:7] for layer in layers] == ["decoder", "encoder", "encoder", "encoder", "bn[0]"]


def test_limit_sums_up_the_rest():
    text = as_text(PLAN, width=120, limit=2)
    (rest,) = [line for line in text.splitlines() if "more" in line and "…" in line]
    assert rest.split() == ["…", "and", "2", "more", "57.0", "7.00"]
    assert "… and 4 more" in as_text(PLAN, width=120, limit=0)
    assert "…" not in as_text(PLAN, width=120, limit=4)


def test_columns_without_content_are_left_out():
    exact = dataclasses.replace(PLAN, choices=(CHOICES[0], CHOICES[3]))
    header = as_text(exact, width=120).splitlines()[0].split()
    assert header == ["layer", "residual", "shape", "codec", "MB", "held"]


def test_probes_name_their_kind_where_it_is_not_the_usual_one():
    def codec(kind: str | None) -> str:
        choice = _choice("r", "conv", "probe", 100, 10, probes=8, kind=kind)
        return as_text(dataclasses.replace(PLAN, choices=(choice,))).splitlines()[2].split()[3]

    assert (codec("gaussian"), codec("fold"), codec(None)) == ("probe:gaussian", "probe", "probe")


def test_calibrated_rates_are_named():
    text = as_text(dataclasses.replace(PLAN, calibrated=True))
    assert "16 ms more a step, predicted with calibrated rates" in text and "generic" not in text


def test_measured_noise_is_relative_to_sgd_noise_and_names_the_noisiest_layers():
    layers = (("stem", 0.001), ("block", 0.4), ("head", 0.02), ("exact", 0.0), ("last", 0.1))
    text = as_text(dataclasses.replace(PLAN, measured=True, layers=layers), width=120)
    assert "noise    0.25 of the SGD noise, by stats; most in block 0.4, last 0.1, head 0.02\n" in text
    assert "prior" not in text
    assert Plan.from_json(dataclasses.replace(PLAN, measured=True, layers=layers).to_json()).layers == layers


def test_facts_without_budget_audit_or_choices():
    bare = Plan("cpu", None, 10 * MB, 10 * MB, "", 10 * MB, ())
    text = as_text(bare)
    assert "nothing" in text and "10.0 MB predicted; Inductor alone 10.0 MB" in text
    for absent in ("budget", "compiled code", "less", "peak at", "noise", "layer"):
        assert absent not in text


def test_a_missed_budget_says_by_how_much():
    assert "missed by 80.0 MB" in as_text(dataclasses.replace(PLAN, budget=1800 * MB))


def _printed(environ: dict[str, str]) -> str:
    file = StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard", _environ=environ)
    console.print(render(PLAN, title="graph 1 of 2"))
    return file.getvalue()


def test_colour_only_where_wanted():
    assert "\x1b[35m" in _printed({})
    assert "\x1b[35m" not in _printed({"NO_COLOR": "1"})
    assert "\x1b" not in as_text(PLAN)


def test_ascii_terminals_get_ascii(monkeypatch):
    monkeypatch.setattr(Console, "encoding", property(lambda self: "ascii"))
    file = StringIO()
    Console(file=file, width=80).print(render(PLAN, limit=2))
    assert file.getvalue().isascii()


@pytest.mark.parametrize("width", range(1, 20))
def test_cropped_names_keep_both_ends(width):
    name = Name("encoder.stages.3.conv2")
    cropped = name.cropped(width)
    assert len(cropped) <= width
    if width >= 4:
        head, tail = cropped.split("…")
        assert head and name.text.startswith(head) and name.text.endswith(tail)
    assert name.cropped(22) == name.text


def test_plans_as_json_files(tmp_path):
    path = tmp_path / "plans.json"
    write_json([PLAN, PLAN], path)
    assert read_json(path) == (PLAN, PLAN)
    assert path.read_text() == to_json((PLAN, PLAN))
    path.write_text(PLAN.to_json())
    with pytest.raises(ValueError, match="array of plans"):
        read_json(path)
