"""The options of `torch.compile(model, backend="xconv", options={...})`, parsed and checked in one place.

`torch.compile` hands a third-party backend `options=` and `mode=` as they are, each only when given and never both
(it raises by itself). `mode` is therefore also accepted among the options. Names and values are checked before
anything is compiled: a misspelt option that is silently ignored would train without its budget.

Known gap: patterns in `probes` are checked against layer names only when the layers are known, by `Probes.check`.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_origin

from xconv_fx.errors import OptionError, join_clauses, nearest

from .budget import Budget, MemoryLimit, parse_size
from .codecs import ACTNN, CodecSet

if TYPE_CHECKING:
    from .statistics import Statistics

# Limits of what is predicted, which can refuse plans that the budget allows.
LIMITS = ("max_noise", "max_layer_noise", "max_slowdown")
PREFERENCES = ("exact", "balanced", "speed")
# What is done when the first training step takes more than its budget.
VERIFY = ("replan", "warn", "off")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Unset(enum.Enum):
    """What stands for an option that was not given, where None means something else."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class NoiseLimits:
    """What a plan's predicted `noise` may be at most, and that of any one `layer`'s gradient (None: no limit)."""

    noise: float | None = None
    layer: float | None = None


# What plans keep within when no limit is given, so that a budget alone never drowns a gradient: noise as large as the
# gradient itself (with statistics, as its SGD noise). In benchmarks/fidelity.jsonl, plans of up to 0.2 learnt as exact
# training does, and those that hurt had 18 and more.
PROTECTION = NoiseLimits(noise=1.0, layer=1.0)


PROBES_HINT = "write a positive int for every layer, or a mapping of layer names or patterns such as {'decoder.*': 16}"

# Inductor settings that the backend sets itself, with what setting them from outside would break.
RESERVED_INDUCTOR = MappingProxyType(
    {
        "custom_partitioner_fn": "it is how the backend chooses what is held between forward and backward",
        "_pre_fusion_custom_pass": "the backend orders the kernels with it, so that the peak stays as planned",
        "_post_fusion_custom_pass": "the backend orders the kernels with it, so that the peak stays as planned",
        "reorder_for_peak_memory": "the backend orders the kernels itself, to the peak that the plan was audited for",
    }
)


@dataclass(frozen=True)
class Probes:
    """How many probes a layer must use: `count` for every layer, or the first of `patterns` that matches its name.

    An exact name wins over patterns, which are those of `fnmatch`. With neither, the planner chooses.
    """

    count: int | None = None
    patterns: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def parse(value: int | Mapping[str, int] | Probes | None) -> Probes:
        if value is None or isinstance(value, Probes):
            return value or Probes()
        if not isinstance(value, Mapping):
            return Probes(count=_positive(value, value))
        for name in value:
            if not isinstance(name, str) or not name:
                raise OptionError("probes", dict(value), f"{name!r} is not a layer name; {PROBES_HINT}")
        return Probes(patterns=tuple((name, _positive(count, dict(value))) for name, count in value.items()))

    def count_for(self, layer: str) -> int | None:
        """The number of probes that `layer` must use, or None when the planner chooses."""
        exact = dict(self.patterns).get(layer)
        if exact is not None:
            return exact
        return next((count for pattern, count in self.patterns if fnmatchcase(layer, pattern)), self.count)

    def count_among(self, layers: Iterable[str]) -> int | None:
        """Of layers that read one tensor, which holds one number of probes: the largest that one of them must use."""
        counts = (self.count_for(layer) for layer in layers)
        return max((count for count in counts if count is not None), default=self.count)

    def check(self, layers: Collection[str]) -> None:
        """Raise `OptionError` when a name or pattern matches none of `layers`: a typo must not pass as a no-op."""
        for pattern, _ in self.patterns:
            if pattern not in layers and not any(fnmatchcase(layer, pattern) for layer in layers):
                some = ", ".join(sorted(layers)[:8]) + (", ..." if len(layers) > 8 else "")
                hint = join_clauses("no layer matches;", nearest(pattern, layers), f"the layers are {some}")
                raise OptionError("probes", pattern, hint)


def _positive(count: object, given: object) -> int:
    if not isinstance(count, Integral) or isinstance(count, bool) or int(count) < 1:
        raise OptionError("probes", given, f"{count!r} is not a positive int; {PROBES_HINT}")
    return int(count)


@dataclass(frozen=True)
class Options:
    """What a user asked for, checked.

    `mem_budget` limits the physical peak of a training step (None: no limit, only what costs nothing is saved);
    `codecs` and `probes` restrict the planner, and so does `slices` (None: as many as it likes; 1: the whole batch at
    once). `prefer` says how it weighs noise and time; `max_noise`, `max_layer_noise` (of the noisiest layer) and
    `max_slowdown` limit the predictions (see `noise_limits` for what holds when none is given); `stats` are the
    model's own, by which noise is predicted (None: by priors); `sample_bits` shares the bits of codes out among the
    samples of a batch (None: only under a preset that does). `reserve` is bytes of the budget left for memory
    outside the compiled step; `calls` is how often the model runs in one step before a backward, and `verify` what is
    done when the first step takes more than the budget; `seed` fixes the sequence of random draws (None: one drawn from
    torch's generator every step); `report` is where the plan is written as JSON; `inductor` and `mode` are passed to
    Inductor.
    """

    mem_budget: Budget | None = None
    codecs: CodecSet = field(default_factory=CodecSet)
    probes: Probes = Probes()
    slices: int | None = None
    prefer: str = "balanced"
    max_noise: float | Unset | None = UNSET
    max_layer_noise: float | Unset | None = UNSET
    max_slowdown: float | None = None
    stats: Statistics | None = None
    sample_bits: bool | None = None
    reserve: int = 0
    calls: int = 1
    plan: Path | None = None
    verify: str = "replan"
    seed: int | None = None
    report: Path | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mode: str = "default"

    @staticmethod
    def parse(options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Check what `torch.compile` passed. Raises `OptionError` naming the option, its value and what would work."""
        if options is not None and not isinstance(options, Mapping):
            raise OptionError("options", options, "write a dict such as {'mem_budget': '8GB'}")
        given = dict(options or {})
        for name in given:
            if name not in PARSERS:
                every = f"the options are {', '.join(PARSERS)}"
                raise OptionError(
                    str(name), given[name], join_clauses("no such option;", nearest(str(name), PARSERS), every)
                )
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise OptionError("mode", given["mode"], f"torch.compile was called with mode={mode!r}; give only one")
        parsed = Options(**{name: PARSERS[name](value) for name, value in given.items()})
        parsed._check_plan(given)
        parsed._check_preset()
        parsed._check_sample_bits()
        return parsed

    def _check_plan(self, given: Collection[str]) -> None:
        """A plan says how everything is held: nothing is left to prefer or to limit."""
        if self.plan is None:
            return
        for name in ("slices", "prefer", *LIMITS):
            if name in given:
                raise OptionError(name, getattr(self, name), f"the option plan fixes it; leave {name} out, or plan")

    def _check_preset(self) -> None:
        """A preset of codecs leaves no choice of slices, and ActNN's none of probes."""
        preset = self.codecs.preset
        if preset and self.slices not in (None, 1):
            raise OptionError("slices", self.slices, f"codecs={preset!r} runs the batch at once; write 1 or None")
        if preset in ACTNN and self.probes != Probes():
            raise OptionError("probes", self.probes.count, f"codecs={preset!r} holds codes; write codecs='xconv'")

    def _check_sample_bits(self) -> None:
        """Bits are shared out where there are codes of a width between the least and the greatest."""
        if self.sample_bits and ("quantize" not in self.codecs or not {2, 4}.intersection(self.codecs.bits)):
            raise OptionError("sample_bits", True, "it needs codes of 2 or 4 bits; write codecs='quantize:2' or 'all'")

    @property
    def shares_samples(self) -> bool:
        """Whether codes of 2 and 4 bits have a width for each sample: by choice, or as in ActNN's third level."""
        return self.codecs.preset == "actnn:L3" if self.sample_bits is None else self.sample_bits

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for that Inductor does not do by itself."""
        whole = self.slices in (None, 1)
        asked = self.plan is not None or self.mem_budget is not None or bool(self.codecs.preset)
        return not asked and self.probes == Probes() and whole

    @property
    def protected(self) -> bool:
        """Whether the limits of noise are ours: none was given, nor a preset or probes, which say how noisy it may be.

        None, for either limit, lifts them.
        """
        given = self.max_noise is not UNSET or self.max_layer_noise is not UNSET
        return not given and not self.codecs.preset and self.probes == Probes()

    @property
    def noise_limits(self) -> NoiseLimits:
        """The limits that were given, or what protects learning."""
        if self.protected:
            return PROTECTION
        total, layer = (None if isinstance(limit, Unset) else limit for limit in (self.max_noise, self.max_layer_noise))
        return NoiseLimits(total, layer)

    def given_limits(self) -> dict[str, float]:
        """The limits of what is predicted that the user gave, by their options' names."""
        limits = {name: getattr(self, name) for name in LIMITS}
        return {name: limit for name, limit in limits.items() if isinstance(limit, (int, float))}

    def check_effect(self) -> None:
        """Raise `OptionError` for an option that would do nothing, because nothing is compressed without a budget.

        Preferences and limits are kept by a step that compresses nothing.
        """
        if self.mem_budget is not None or self.plan is not None:
            return
        planned = "without mem_budget nothing is planned"
        if self.reserve:
            raise OptionError("reserve", self.reserve, f"{planned}, and no part of a budget is left; write mem_budget")
        if self.codecs.preset or self.probes != Probes():
            return
        if self.sample_bits:
            raise OptionError("sample_bits", True, f"{planned}, and nothing is in codes; write mem_budget or a preset")
        if not self.codecs.exact and self.codecs != CodecSet():
            names = ",".join(sorted(self.codecs.names))
            hint = f"{planned}, and everything is kept; write mem_budget, or a preset, which needs none"
            raise OptionError("codecs", names, hint)

    def of_problem(self) -> Options:
        """What a planning problem depends on: how values may be held, but not what is asked of the plan."""
        asked = {"mem_budget", "slices", "prefer", *LIMITS, "reserve", "calls", "plan", "verify", "seed", "report"}
        defaults: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in asked})

    def limit(self, budget: int | None = None) -> MemoryLimit:
        """What a budget of so many bytes (None: the options' own, which must be in bytes) lets a step take."""
        if budget is None:
            assert self.mem_budget is not None and self.mem_budget.bytes is not None, "a budget in bytes"
            budget = self.mem_budget.bytes
        return MemoryLimit(budget, self.reserve)

    def smallest_for(self, peak: int) -> int:
        """The smallest budget under which a step may have this peak; in bytes."""
        return MemoryLimit.smallest_for(peak, self.reserve).budget

    @property
    def draws_as_aten(self) -> bool:
        """Whether Inductor is told to draw the numbers that eager PyTorch draws."""
        from xconv_fx import hooks

        return bool(self.inductor_config().get("fallback_random", hooks.setting("fallback_random")))

    def inductor_config(self) -> dict[str, Any]:
        """Inductor settings of `mode`, overridden by those of `inductor`."""
        from xconv_fx import hooks

        return {**hooks.settings_of(self.mode), **self.inductor}

    def fingerprint(self) -> str:
        """A stable hash of everything that changes what is computed. For compile caches."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in ("report", "verify")]
        fields = {name: getattr(self, name) for name in names}
        text = json.dumps(fields, default=_stable, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _stable(value: Any) -> Any:
    """JSON for what `json` cannot write, the same in every process: no addresses, no order of a set."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        # Inductor's custom passes identify themselves; a bare function has only its name.
        identity = value.uuid() if hasattr(value, "uuid") else ""
        return f"{named.__module__}.{named.__qualname__} {identity}"
    return repr(value)


def _parse_reserve(value: Any) -> int:
    return parse_size(value, option="reserve", allow_zero=True)


def _parse_slices(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise OptionError("slices", value, "write the number of slices that the batch is run in, 1 for never, or None")
    return int(value)


def _parse_calls(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        hint = "write how many forwards of the model a step runs before their backward, such as 2 for a pair of views"
        raise OptionError("calls", value, hint)
    return int(value)


def _one_of(name: str, choices: tuple[str, ...]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            guess = nearest(value, choices) if isinstance(value, str) else ""
            raise OptionError(name, value, join_clauses(guess, f"write one of {', '.join(choices)}"))
        return str(value)

    return parse


def _limit(name: str) -> Callable[[Any], float | None]:
    def parse(value: Any) -> float | None:
        if value is None or value == "none":  # Files and command lines have no None.
            return None
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
            raise OptionError(name, value, "write a number from 0, such as 0.1, or None for no limit")
        return float(value)

    return parse


def _noise_limit(name: str) -> Callable[[Any], float | Unset | None]:
    parse = _limit(name)
    return lambda value: value if isinstance(value, Unset) else parse(value)


def _parse_stats(value: Any) -> Statistics | None:
    from .statistics import parse

    return parse(value)


def _parse_sample_bits(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise OptionError("sample_bits", value, "write True, False, or None for what the codecs do by themselves")
    return value


def _parse_seed(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < 2**63:
        raise OptionError("seed", value, "write an int from 0 to 2**63 - 1, or None for another seed every step")
    return int(value)


def _parse_report(value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise OptionError("report", value, "write the path of the JSON file to create")
    path = Path(os.fspath(value))
    if path.is_dir():
        raise OptionError("report", str(path), f"a directory; write a file such as {str(path / 'plan.json')!r}")
    if not path.parent.is_dir():
        raise OptionError("report", str(path), f"the directory {str(path.parent)!r} does not exist; create it first")
    return path


def _parse_mode(value: Any) -> str:
    if value is None:
        return "default"
    if value not in MODES:
        guess = nearest(value, MODES) if isinstance(value, str) else ""
        raise OptionError("mode", value, join_clauses(guess, f"the modes are {', '.join(MODES)}"))
    return value


def _parse_plan(value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, Path)):
        raise OptionError("plan", value, "write the path of a file that the option report, or xconv plan, wrote")
    path = Path(value)
    if path.is_dir():
        raise OptionError(
            "plan", str(value), "it is a directory; write the path of a file that the option report wrote"
        )
    if not path.is_file():
        raise OptionError(
            "plan", str(value), "there is no such file; the option report, and xconv plan --json, write one"
        )
    return path


def _parse_inductor(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError("inductor", value, "write a dict of torch._inductor.config settings")
    return dict(_inductor_setting(key, setting) for key, setting in value.items())


def _inductor_setting(key: object, setting: Any) -> tuple[str, Any]:
    from xconv_fx import hooks

    name = key.replace("-", "_") if isinstance(key, str) else ""
    if name in RESERVED_INDUCTOR:
        raise OptionError(f"inductor.{name}", setting, f"it cannot be set: {RESERVED_INDUCTOR[name]}")
    known = hooks.known_settings()
    if name not in known:
        guess = nearest(name, known) or "see torch._inductor.list_options()"
        raise OptionError(f"inductor.{key}", setting, f"no such Inductor setting; {guess}")
    expected = known[name]
    widened = (int, float) if expected is float else expected
    # torch.compile checks its own options in the same way: generic types such as `int | None` are not checked.
    if get_origin(expected) is None and isinstance(expected, type) and not isinstance(setting, widened):
        raise OptionError(f"inductor.{name}", setting, f"write a value of type {expected.__name__}")
    return name, setting


def _parse_budget(value: Any) -> Budget | None:
    return None if value is None else Budget.parse(value)


PARSERS: Mapping[str, Any] = MappingProxyType(
    {
        "mem_budget": _parse_budget,
        "codecs": CodecSet.parse,
        "probes": Probes.parse,
        "slices": _parse_slices,
        "prefer": _one_of("prefer", PREFERENCES),
        "max_noise": _noise_limit("max_noise"),
        "max_layer_noise": _noise_limit("max_layer_noise"),
        "max_slowdown": _limit("max_slowdown"),
        "stats": _parse_stats,
        "sample_bits": _parse_sample_bits,
        "reserve": _parse_reserve,
        "calls": _parse_calls,
        "plan": _parse_plan,
        "verify": _one_of("verify", VERIFY),
        "seed": _parse_seed,
        "report": _parse_report,
        "inductor": _parse_inductor,
        "mode": _parse_mode,
    }
)
