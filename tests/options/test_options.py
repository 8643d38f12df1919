"""Options: what is accepted, what each mistake is told, and what a fingerprint depends on."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xconv_fx.errors import OptionError
from xconv_fx.ops import codec, dense, fixed, fold
from xconv_fx.ops.layout import CODE_BITS
from xconv_fx.options import MODES, PARSERS, RESERVED_INDUCTOR, Options, Probes
from xconv_fx.options.budget import Budget
from xconv_fx.options.codecs import (
    BITS,
    CODECS,
    EXACT_CODECS,
    FIXED_BITS,
    NOISY_CODECS,
    PRESETS,
    PROBE_DEFAULT,
    PROBE_KINDS,
    SETS,
    XCONV,
    CodecSet,
)


def test_no_options_give_the_defaults():
    assert Options.parse() == Options.parse(None, None) == Options.parse({}) == Options()
    assert Options().mem_budget is None and Options().codecs.names == frozenset(SETS["all"])


def test_every_option_has_a_parser_and_the_default_parses_to_itself():
    fields = Options.__dataclass_fields__
    assert set(PARSERS) == set(fields)
    defaults = Options()
    assert Options.parse({name: getattr(defaults, name) for name in fields}) == defaults


def test_all_options_together(tmp_path):
    options = Options.parse(
        {
            "mem_budget": "60%",
            "codecs": "exact, quantize:4",
            "probes": {"encoder.*": 8},
            "reserve": "200MB",
            "calls": 2,
            "verify": "warn",
            "seed": 7,
            "report": str(tmp_path / "plan.json"),
            "inductor": {"max_autotune": True},
            "mode": "max-autotune-no-cudagraphs",
        }
    )
    assert options.mem_budget == Budget(fraction=0.6)
    assert options.codecs.bits == (4,) and "recompute" in options.codecs and "probe" not in options.codecs
    assert options.probes.count_for("encoder.0") == 8
    assert options.reserve == 200 * 10**6
    assert (options.calls, options.verify) == (2, "warn")
    assert options.seed == 7
    assert options.report == tmp_path / "plan.json"
    assert options.mode == "max-autotune-no-cudagraphs"


def test_unknown_options_are_told_the_nearest_name():
    with pytest.raises(OptionError, match="did you mean 'mem_budget'") as caught:
        Options.parse({"mem_bugdet": "8GB"})
    assert (caught.value.option, caught.value.value) == ("mem_bugdet", "8GB")
    with pytest.raises(OptionError, match="the options are mem_budget, codecs"):
        Options.parse({"zzz": 1})


def test_options_must_be_a_mapping():
    with pytest.raises(OptionError, match="write a dict"):
        Options.parse("8GB")  # type: ignore[arg-type]


def test_parsing_does_not_change_the_users_dict():
    given = {"mem_budget": "8GB"}
    Options.parse(given, "max-autotune")
    assert given == {"mem_budget": "8GB"}


def test_options_can_be_hashed_and_pickled():
    options = Options.parse({"mem_budget": "8GB", "inductor": {"max_autotune": True}, "probes": {"a": 1}})
    assert pickle.loads(pickle.dumps(options)) == options
    assert hash(options) == hash(pickle.loads(pickle.dumps(options)))


class TestCodecs:
    @pytest.mark.parametrize(
        ("value", "names", "bits", "kinds"),
        [
            ("all", set(SETS["all"]), BITS, PROBE_DEFAULT),
            ("exact", {"keep", "recompute", "bitmask"}, (), ()),
            ("keep", {"keep"}, (), ()),
            ("bitmask", {"keep", "bitmask"}, (), ()),
            ("quantize:4", {"keep", "quantize"}, (4,), ()),
            ("quantize:8, quantize:2", {"keep", "quantize"}, (2, 8), ()),
            ("quantize,quantize:2", {"keep", "quantize"}, BITS, ()),
            (["probe:gaussian", "recompute"], {"keep", "probe", "recompute"}, (), ("gaussian",)),
            (("probe",), {"keep", "probe"}, (), PROBE_DEFAULT),
            ({"exact", "probe:fold"}, {"keep", "recompute", "bitmask", "probe"}, (), ("fold",)),
        ],
    )
    def test_parse(self, value, names, bits, kinds):
        codecs = CodecSet.parse(value)
        assert (codecs.names, codecs.bits, codecs.kinds) == (names, bits, kinds)
        assert codecs.exact == names.isdisjoint({"quantize", "probe"}) and not codecs.fixed_bits
        assert CodecSet.parse(codecs) is codecs

    @pytest.mark.parametrize(
        ("value", "bits"), [("fixed", (4, 8)), ("fixed:2", (2,)), ("all,fixed:8,fixed:2", (2, 8)), ("all", ())]
    )
    def test_fixed_point_is_no_part_of_all(self, value, bits):
        codecs = CodecSet.parse(value)
        assert codecs.fixed_bits == bits and ("fixed" in codecs) == bool(bits) and not codecs.exact

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_stand_alone_and_need_no_budget(self, name):
        options = Options.parse({"codecs": name})
        assert options.codecs.preset == name and not options.plain and not options.codecs.exact
        assert CodecSet.parse([name]) == options.codecs
        assert options.fingerprint() != Options.parse({"codecs": "all"}).fingerprint()
        with pytest.raises(OptionError, match="stands alone"):
            CodecSet.parse(f"exact,{name}")
        with pytest.raises(OptionError, match="runs the batch at once"):
            Options.parse({"codecs": name, "slices": 2})

    def test_probes_are_for_xconv(self):
        assert Options.parse({"codecs": "xconv:orthogonal", "probes": 4}).codecs.kinds == ("orthogonal",)
        with pytest.raises(OptionError, match="codecs='xconv'"):
            Options.parse({"codecs": "actnn:L2", "probes": 4})

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ("actnn:L4", "did you mean 'actnn:L3'"),
            ("xconv:fold", "no codec"),
            ("fixed:1", "fixed cannot use '1' bits"),
            ("quantise", "did you mean 'quantize'"),
            ("quantize:3", "cannot use '3' bits"),
            ("quantize:", "cannot use '' bits"),
            ("quantize:04", "cannot use '04' bits"),
            ("probe:gausian", "did you mean 'gaussian'"),
            ("bitmask:1", "'bitmask' takes no parameter"),
            ("all:1", "no codec 'all'"),
            ("", "no codec ''"),
            ("keep,,probe", "no codec ''"),
            ([], "write 'all' .*'exact'"),
            ([4], "4 is not a name"),
            (4, "write 'all' .*'exact'"),
            (None, "write 'all' .*'exact'"),
            ({"quantize": 4}, "write 'all' .*'exact'"),
            (b"all", "write 'all' .*'exact'"),
        ],
    )
    def test_mistakes(self, value, told):
        with pytest.raises(OptionError, match=told) as caught:
            Options.parse({"codecs": value})
        assert caught.value.option == "codecs"


class TestProbes:
    def test_one_number_for_every_layer(self):
        assert Probes.parse(8).count_for("anything") == 8
        assert Probes.parse(None).count_for("anything") is None

    def test_exact_names_win_then_the_first_pattern(self):
        probes = Probes.parse({"enc.*": 8, "enc.1.*": 4, "enc.1.conv": 2, "L['x'].conv": 3})
        assert probes.count_for("enc.1.conv") == 2
        assert probes.count_for("enc.1.norm") == 8
        # Brackets are character classes in a pattern, but this is the layer's own name.
        assert probes.count_for("L['x'].conv") == 3
        assert probes.count_for("dec.1") is None

    def test_layers_that_read_one_tensor(self):
        probes = Probes.parse({"conv": 8, "shortcut": 12})
        assert [probes.count_among(names) for names in (["conv", "shortcut"], ["conv", "other"], ["other"], [])] == [
            12, 8, None, None,
        ]  # fmt: skip
        assert Probes.parse(4).count_among([]) == 4

    @pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", {"a": 0}, {"a": "8"}, {"a": True}, {3: 4}, {"": 4}, [8]])
    def test_mistakes(self, value):
        with pytest.raises(OptionError, match="write a positive int for every layer") as caught:
            Options.parse({"probes": value})
        assert caught.value.option == "probes"

    def test_a_pattern_that_matches_no_layer_is_told_the_layers(self):
        layers = ["encoder.conv", "decoder.conv"]
        Probes.parse({"encoder.*": 8, "decoder.conv": 2}).check(layers)
        Probes.parse(3).check([])
        with pytest.raises(OptionError, match=r"did you mean 'encoder\.conv'.*the layers are decoder\.conv"):
            Probes.parse({"encodr.conv": 8}).check(layers)


class TestSampleBits:
    @pytest.mark.parametrize(
        ("given", "shared"),
        [({}, False), ({"sample_bits": True}, True), ({"codecs": "actnn:L3"}, True), ({"codecs": "actnn:L2"}, False),
         ({"codecs": "actnn:L3", "sample_bits": False}, False), ({"codecs": "quantize:4", "sample_bits": True}, True)],
    )  # fmt: skip
    def test_shared_by_choice_or_as_in_actnn(self, given, shared):
        assert Options.parse(given).shares_samples is shared

    @pytest.mark.parametrize("codecs", ["exact", "exact,quantize:8", "xconv"])
    def test_without_codes_that_can_share(self, codecs):
        with pytest.raises(OptionError, match="needs codes of 2 or 4 bits") as caught:
            Options.parse({"sample_bits": True, "codecs": codecs})
        assert caught.value.option == "sample_bits"

    def test_mistakes(self):
        with pytest.raises(OptionError, match="write True, False, or None"):
            Options.parse({"sample_bits": 2})


class TestSeed:
    @pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, None])
    def test_accepted(self, seed):
        assert Options.parse({"seed": seed}).seed == seed

    @pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "7", True])
    def test_mistakes(self, seed):
        with pytest.raises(OptionError, match="an int from 0"):
            Options.parse({"seed": seed})


class TestReport:
    def test_a_path_object_is_a_path(self, tmp_path):
        assert Options.parse({"report": tmp_path / "p.json"}).report == tmp_path / "p.json"
        assert Options.parse({"report": "plan.json"}).report == Path("plan.json")

    def test_mistakes(self, tmp_path):
        with pytest.raises(OptionError, match="does not exist; create it first"):
            Options.parse({"report": tmp_path / "missing" / "plan.json"})
        with pytest.raises(OptionError, match=r"a directory; write a file such as .*plan\.json"):
            Options.parse({"report": tmp_path})
        for value in (3, "", True):
            with pytest.raises(OptionError, match="path of the JSON file"):
                Options.parse({"report": value})


class TestInductor:
    def test_modes_are_those_of_torch(self):
        from torch._inductor import list_mode_options

        assert set(MODES) <= set(list_mode_options())
        for mode in MODES:
            assert Options.parse(None, mode).inductor_config() == list_mode_options(mode)

    def test_explicit_settings_override_the_mode(self):
        options = Options.parse({"inductor": {"coordinate-descent-tuning": False}}, "max-autotune-no-cudagraphs")
        assert options.inductor_config() == {"max_autotune": True, "coordinate_descent_tuning": False}

    def test_reserved_settings_exist_and_are_refused_with_the_reason(self):
        known = torch._inductor.config.get_config_copy()
        for key, reason in RESERVED_INDUCTOR.items():
            assert key in known
            with pytest.raises(OptionError, match=reason) as caught:
                Options.parse({"inductor": {key: None}})
            assert caught.value.option == f"inductor.{key}"

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ({"max_autotun": True}, "did you mean 'max_autotune'"),
            ({"zzzzzz": True}, "list_options"),
            ({"max_autotune": "yes"}, "a value of type bool"),
            ({3: True}, "no such Inductor setting"),
            ("max_autotune", "write a dict"),
        ],
    )
    def test_mistakes(self, value, told):
        with pytest.raises(OptionError, match=told):
            Options.parse({"inductor": value})


class TestMode:
    def test_mode_can_be_an_option(self):
        assert Options.parse({"mode": "max-autotune"}) == Options.parse(None, "max-autotune")
        assert Options.parse({"mode": "max-autotune"}, "max-autotune").mode == "max-autotune"
        assert Options.parse({"mode": None}).mode == "default"

    def test_mistakes(self):
        with pytest.raises(OptionError, match="did you mean 'max-autotune"):
            Options.parse(None, "max-autotun")
        with pytest.raises(OptionError, match="give only one"):
            Options.parse({"mode": "default"}, "max-autotune")
        with pytest.raises(OptionError, match="the modes are default"):
            Options.parse({"mode": ["default"]})


def test_torch_compile_hands_a_backend_what_the_parser_expects():
    received = []

    def backend(graph, inputs, **given):
        received.append(given)
        return graph

    for given in ({}, {"mode": "max-autotune"}, {"options": {"mem_budget": "8GB"}}):
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend=backend, **given)(torch.ones(2))
        assert received.pop() == given
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(lambda x: x, backend=backend, mode="max-autotune", options={"mem_budget": "8GB"})


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("calls", 0, "how many forwards"),
        ("calls", 1.5, "how many forwards"),
        ("calls", True, "how many forwards"),
        ("verify", "re-plan", "did you mean 'replan'"),
        ("verify", True, "write one of replan, warn, off"),
    ],
)
def test_options_of_a_whole_step_are_checked(name, value, hint):
    with pytest.raises(OptionError, match=hint) as caught:
        Options.parse({name: value})
    assert caught.value.option == name


class TestFingerprint:
    CHANGES = (
        {"mem_budget": "8GB"},
        {"mem_budget": "60%"},
        {"codecs": "exact"},
        {"codecs": "quantize:4"},
        {"probes": 8},
        {"probes": {"a": 8}},
        {"reserve": 1},
        {"calls": 2},
        {"seed": 0},
        {"inductor": {"max_autotune": True}},
        {"mode": "max-autotune"},
    )

    def test_everything_that_changes_results_changes_it(self):
        prints = {Options.parse(change).fingerprint() for change in ({}, *self.CHANGES)}
        assert len(prints) == 1 + len(self.CHANGES)

    def test_what_does_not_change_results_does_not(self, tmp_path):
        assert Options.parse({"report": tmp_path / "p.json"}).fingerprint() == Options().fingerprint()
        assert Options.parse({"verify": "off"}).fingerprint() == Options().fingerprint()
        assert (
            Options.parse({"mem_budget": "8GB"}).fingerprint() == Options.parse({"mem_budget": 8 * 10**9}).fingerprint()
        )

    def test_it_is_the_same_in_another_process(self):
        given = "{'codecs': 'all', 'mem_budget': '60%', 'probes': {'a': 1}}"
        code = f"from xconv_fx.options import Options; print(Options.parse({given}).fingerprint())"
        command = [sys.executable, "-c", code]
        other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert other == Options.parse({"codecs": "all", "mem_budget": "60%", "probes": {"a": 1}}).fingerprint()

    def test_custom_passes_identify_themselves_and_functions_go_by_name(self):
        class Pass:
            def __init__(self, identity: str) -> None:
                self.identity = identity

            def __call__(self, graph: object) -> None: ...

            def uuid(self) -> str:
                return self.identity

        def with_pass(custom: object) -> str:
            return Options(inductor={"joint_custom_pre_pass": custom}).fingerprint()

        assert with_pass(Pass("a")) == with_pass(Pass("a")) != with_pass(Pass("b"))
        assert with_pass(print) == with_pass(print) != with_pass(len)


class TestAgreementWithTheCodecs:
    """Options are parsed without importing torch, so they repeat names that the codecs define."""

    def test_every_codec_can_be_chosen(self):
        # Keeping and recomputing hold nothing in a tensor's place, so they have no row in the table of codecs.
        assert set(codec.names()) == set(CODECS) - {"keep", "recompute"}

    def test_exact_means_lossless(self):
        assert {name for name in codec.names() if codec.codec_of(name).lossless} == set(EXACT_CODECS) & set(
            codec.names()
        )
        assert set(NOISY_CODECS).isdisjoint(EXACT_CODECS)

    def test_every_width_can_be_encoded(self):
        assert set(BITS) == {bits for bits in CODE_BITS if bits <= 8}
        assert set(FIXED_BITS) == set(fixed.SPAN)

    def test_probe_kinds(self):
        assert PROBE_KINDS == fold.KINDS and set(PROBE_KINDS) == {"fold", *dense.KINDS}
        assert set(XCONV) == set(dense.KINDS) and set(PROBE_DEFAULT) < set(PROBE_KINDS)
