"""The options of `torch.compile(model, backend="xconv", options={...})`, parsed and checked in one place.

`torch.compile` hands a third-party backend `options=` and `mode=` as they are, each only when given and never both
(it raises by itself). `mode` is therefore also accepted among the options. Names and values are checked before
anything is compiled: a misspelt option that is silently ignored would train without its budget.

Known gap: patterns in `probes` are checked against layer names only when the layers are known, by `Probes.check`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xconv_fx.errors import OptionError, join_clauses, nearest

from .budget import Budget, MemoryLimit
from .codecs import ACTNN, CodecSet
from .parsers import MODES as MODES
from .parsers import PARSERS, UNSET, Unset
from .parsers import PREFERENCES as PREFERENCES
from .parsers import RESERVED_INDUCTOR as RESERVED_INDUCTOR
from .parsers import VERIFY as VERIFY
from .probes import PROBES_HINT as PROBES_HINT
from .probes import Probes

if TYPE_CHECKING:
    from .statistics import Statistics

# Limits of what is predicted, which can refuse plans that the budget allows.
LIMITS = ("max_noise", "max_layer_noise", "max_slowdown")


@dataclass(frozen=True)
class NoiseLimits:
    """What a plan's predicted `noise` may be at most, and that of any one `layer`'s gradient (None: no limit)."""

    noise: float | None = None
    layer: float | None = None


# What plans keep within when no limit is given, so that a budget alone never drowns a gradient: noise as large as the
# gradient itself (with statistics, as its SGD noise). In benchmarks/fidelity.jsonl, plans of up to 0.2 learnt as exact
# training does, and those that hurt had 18 and more.
PROTECTION = NoiseLimits(noise=1.0, layer=1.0)


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
    probes: Probes = field(default_factory=Probes)
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
