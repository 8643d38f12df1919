"""How many probes layers must use: the option `probes`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral

from xconv_fx.errors import OptionError, join_clauses, nearest

PROBES_HINT = "write a positive int for every layer, or a mapping of layer names or patterns such as {'decoder.*': 16}"


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
