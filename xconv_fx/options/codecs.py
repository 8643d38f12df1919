"""The option `codecs`: which ways of holding a residual the planner may use, parsed and checked.

Names repeat those that the codecs register, so that options are parsed without importing torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from xconv_fx.errors import OptionError, join_clauses, nearest

EXACT_CODECS = ("keep", "recompute", "bitmask")
UNBIASED_CODECS = ("quantize", "probe")
# Legal where it is named, and no part of "all": its gradients are close, not unbiased.
BIASED_CODECS = ("fixed",)
NOISY_CODECS = UNBIASED_CODECS + BIASED_CODECS
CODECS = EXACT_CODECS + NOISY_CODECS
BITS = (1, 2, 4, 8)
FIXED_BITS = (2, 4, 8)
# What "fixed" stands for without a width: two bits are for experiments.
FIXED_DEFAULT = (4, 8)
PROBE_KINDS = ("fold", "gaussian", "rademacher", "orthogonal", "independent")
# What "probe" stands for without a kind: independent ones are no better than gaussian ones at equal bytes.
PROBE_DEFAULT = PROBE_KINDS[:-1]

SETS: Mapping[str, tuple[str, ...]] = {"all": EXACT_CODECS + UNBIASED_CODECS, "exact": EXACT_CODECS}

# Published systems, applied as they are instead of planned. ActNN's levels with the widths of codes, XConv's kinds.
ACTNN: Mapping[str, tuple[int, ...]] = {"actnn:L1": (4,), "actnn:L2": (4,), "actnn:L3": BITS}
XCONV = ("gaussian", "orthogonal", "independent", "rademacher")
PRESETS = (*ACTNN, "xconv", *(f"xconv:{kind}" for kind in XCONV))
# The reference implementation's default.
XCONV_PROBES = 8

CODECS_HINT = (
    f"write 'all' (all but fixed), 'exact' (the lossless ones) or names from {', '.join(CODECS)}; quantize takes bits "
    f"as in 'quantize:4' (of {', '.join(map(str, BITS))}), fixed as well (of {', '.join(map(str, FIXED_BITS))}), "
    f"probe a kind as in 'probe:gaussian' (of {', '.join(PROBE_KINDS)}); or a published system alone, of "
    f"{', '.join(PRESETS)}"
)


@dataclass(frozen=True)
class CodecSet:
    """Which codecs the planner may use. "keep" is always among `names`.

    `bits` are the widths allowed to "quantize", `fixed_bits` those of "fixed", and `kinds` the projections allowed to
    "probe"; each is empty exactly when its codec is not allowed. `preset` names a published system that decides in the
    planner's place ("": none does).
    """

    names: frozenset[str] = frozenset(SETS["all"])
    bits: tuple[int, ...] = BITS
    kinds: tuple[str, ...] = PROBE_DEFAULT
    fixed_bits: tuple[int, ...] = ()
    preset: str = ""

    @property
    def exact(self) -> bool:
        """True when every allowed codec is lossless."""
        return not self.names.intersection(NOISY_CODECS)

    def __contains__(self, codec: str) -> bool:
        return codec in self.names

    @staticmethod
    def parse(value: str | Collection[str] | CodecSet) -> CodecSet:
        """From "all", "exact", a codec with an optional parameter ("quantize:4"), a comma string or a list of those."""
        if isinstance(value, CodecSet):
            return value
        entries = value.split(",") if isinstance(value, str) else value
        if not isinstance(entries, Collection) or isinstance(entries, (bytes, Mapping)) or not entries:
            raise OptionError("codecs", value, CODECS_HINT)
        if len(entries) == 1 and (preset := _preset(next(iter(entries)))) is not None:
            return preset
        names: set[str] = {"keep"}
        bits: set[int] = set()
        fixed: set[int] = set()
        kinds: set[str] = set()
        for entry in entries:
            if not isinstance(entry, str):
                raise OptionError("codecs", value, f"{entry!r} is not a name; {CODECS_HINT}")
            for codec, parameter in _expand(entry.strip(), value):
                names.add(codec)
                if codec == "quantize":
                    bits.update(BITS if parameter is None else [_bits(codec, parameter, BITS, value)])
                if codec == "fixed":
                    fixed.update(FIXED_DEFAULT if parameter is None else [_bits(codec, parameter, FIXED_BITS, value)])
                if codec == "probe":
                    kinds.update(PROBE_DEFAULT if parameter is None else [_kind(parameter, value)])
        chosen = tuple(kind for kind in PROBE_KINDS if kind in kinds)
        return CodecSet(frozenset(names), tuple(sorted(bits)), chosen, tuple(sorted(fixed)))


def _preset(entry: object) -> CodecSet | None:
    """The codecs of a published system; None when the entry is not the name of one."""
    name = entry.strip() if isinstance(entry, str) else ""
    if name in ACTNN:
        shared = {"recompute"} if name == "actnn:L3" else set()
        return CodecSet(frozenset({"keep", "bitmask", "quantize", *shared}), ACTNN[name], (), preset=name)
    if name not in PRESETS:
        return None
    kind = name.partition(":")[2] or XCONV[0]
    return CodecSet(frozenset({"keep", "bitmask", "probe"}), (), (kind,), preset=name)


def _expand(entry: str, given: object) -> list[tuple[str, str | None]]:
    codec, colon, parameter = (part.strip() for part in entry.partition(":"))
    if not colon and codec in SETS:
        return [(name, None) for name in SETS[codec]]
    if entry in PRESETS:
        raise OptionError("codecs", given, f"{entry!r} stands alone: it says how everything is held")
    if codec not in CODECS:
        guess = nearest(entry, (*CODECS, *SETS, *PRESETS))
        raise OptionError("codecs", given, join_clauses(f"no codec {codec!r};", guess, CODECS_HINT))
    if colon and codec not in NOISY_CODECS:
        raise OptionError("codecs", given, f"{codec!r} takes no parameter; {CODECS_HINT}")
    return [(codec, parameter if colon else None)]


def _bits(codec: str, text: str, choices: tuple[int, ...], given: object) -> int:
    if text not in map(str, choices):
        raise OptionError("codecs", given, f"{codec} cannot use {text!r} bits; {CODECS_HINT}")
    return int(text)


def _kind(text: str, given: object) -> str:
    if text not in PROBE_KINDS:
        guess = nearest(text, PROBE_KINDS)
        raise OptionError("codecs", given, join_clauses(f"no probe kind {text!r};", guess, CODECS_HINT))
    return text
