"""One parser for each option: each takes what the user wrote, and raises `OptionError` for what makes no sense."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_origin

from xconv_fx.errors import OptionError, join_clauses, nearest

from .budget import Budget, parse_size
from .codecs import CodecSet
from .probes import Probes

if TYPE_CHECKING:
    from .statistics import Statistics

PREFERENCES = ("exact", "balanced", "speed")
# What is done when the first training step takes more than its budget.
VERIFY = ("replan", "warn", "off")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Inductor settings that the backend sets itself, with what setting them from outside would break.
RESERVED_INDUCTOR = MappingProxyType(
    {
        "custom_partitioner_fn": "it is how the backend chooses what is held between forward and backward",
        "_pre_fusion_custom_pass": "the backend orders the kernels with it, so that the peak stays as planned",
        "_post_fusion_custom_pass": "the backend orders the kernels with it, so that the peak stays as planned",
        "reorder_for_peak_memory": "the backend orders the kernels itself, to the peak that the plan was audited for",
    }
)


class Unset(enum.Enum):
    """What stands for an option that was not given, where None means something else."""

    UNSET = "unset"


UNSET = Unset.UNSET


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
