"""Find the normalisations of the forward: which value each of them reads, its statistics, and whose sign it decides.

What batch, group and instance norm become in the joint graph differs in form, but is always affine in the value that is
normalised, with small coefficients: one for each channel, or each sample and channel. So a chain of small steps is
followed from the value to the result z. In training the mean and the reciprocal deviation are those of the `var_mean`
that reads the same value; with running statistics they are the first two coefficients. Slope and shift of the layer are
found by following the chain for two values, the mean, and the mean plus the deviation, whatever its form is.

An activation behind z that keeps its sign (ReLU, LeakyReLU) is what comparisons in the backward read.

Known gap: layer normalisation, whose statistics belong to positions and not to channels, is none of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from xconv_fx.ops import fixed
from xconv_fx.ops.layout import accumulator

from .graph import arguments, is_view, numel, shape_of
from .op_table import has
from .residuals import Residual, is_normalisation

aten = torch.ops.aten

_CONVERT = torch.ops.prims.convert_element_type.default
# Coefficients are at most this fraction of the value, in elements.
_SMALL = 1 / 16


@dataclass(frozen=True)
class Norm:
    """The normalisation of `value`, all as nodes of the forward.

    `path` leads from behind `value` to the result, its last node; `mean` and `rstd` are the statistics. `activation` is
    what has the result's sign and is held in memory anyway (None: there is none), `signed` the names of all nodes that
    have it.
    """

    value: fx.Node
    mean: fx.Node
    rstd: fx.Node
    path: tuple[fx.Node, ...]
    activation: fx.Node | None
    signed: frozenset[str]

    @property
    def coefficients(self) -> tuple[fx.Node, ...]:
        """What the path reads besides the value."""
        inside = {self.value, *self.path}
        return tuple(dict.fromkeys(arg for node in self.path for arg in node.all_input_nodes if arg not in inside))

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of scales."""
        size = shape_of(self.value)
        by_sample = any(len(shape) == len(size) and shape[0] > 1 for shape in map(shape_of, self.coefficients))
        wide = accumulator(self.value.meta["val"].dtype)
        return fixed.FIELDS * size[1] * (size[0] if by_sample else 1) * wide.itemsize

    def tells(self, node: fx.Node) -> bool | None:
        """Whether a comparison is `z > 0` (True) or `z <= 0` (False); None when it is neither. A ReLU stands for the
        latter."""
        if node.target is aten.relu.default and node.name in self.signed:
            return False
        if node.target not in (aten.gt.Scalar, aten.le.Scalar) or arguments(node)[1] != 0:
            return None
        compared = node.all_input_nodes[0]
        while compared.name not in self.signed and compared.target is _CONVERT:
            compared = compared.all_input_nodes[0]
        return node.target is aten.gt.Scalar if compared.name in self.signed else None

    def scales(self, bits: int, mean: Tensor, rstd: Tensor, *coefficients: Tensor) -> Tensor:
        """The table of `fixed.scales`, (FIELDS, 1 or samples, channels), from the values of the nodes."""
        size, wide = shape_of(self.value), accumulator(self.value.meta["val"].dtype)
        middle, deviation = (_by_channel(value.to(wide), size) for value in (mean, 1 / rstd))
        if self.activation is None:
            middle, deviation = _flat(middle, deviation)
            return fixed.scales(middle, deviation, None, None, bits)
        values = dict(zip(self.coefficients, coefficients, strict=True))
        shift = self._follow(middle, values)
        slope = self._follow(middle + deviation, values) - shift
        middle, deviation, shift, slope = _flat(middle, deviation, shift, slope)
        return fixed.scales(middle, deviation, shift, slope, bits)

    def _follow(self, value: Tensor, coefficients: Mapping[fx.Node, Tensor]) -> Tensor:
        """The result for one value of every channel; conversions are left out, which would round it."""
        found = {**coefficients, self.value: value}
        for node in self.path:
            if node.target is _CONVERT:
                found[node] = found[node.all_input_nodes[0]]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: found[arg])
            found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return found[self.path[-1]]


def find_norms(residuals: Iterable[Residual]) -> dict[str, Norm]:
    """The normalisations that read one of the residuals, by its name."""
    found = ((residual.name, find_norm(residual.forward)) for residual in residuals)
    return {name: norm for name, norm in found if norm is not None}


def find_norm(value: fx.Node) -> Norm | None:
    """The normalisation that reads a forward value (samples, channels, positions...), if one does."""
    if len(shape_of(value)) < 3:
        return None
    path = _path(value)
    statistics = _batch_statistics(value) or _running_statistics(path)
    if statistics is None or not path:
        return None
    activation, signed = _signs(path[-1])
    return Norm(value, *statistics, path, activation, signed)


def _path(value: fx.Node) -> tuple[fx.Node, ...]:
    """The affine steps that the value goes through, as far as nothing else reads what is between them."""
    path: list[fx.Node] = []
    current, limit = value, numel(value) * _SMALL
    while True:
        readers = [user for user in current.users if user.op == "call_function" and not _is_statistic(user)]
        steps = [user for user in readers if _is_step(user, current, limit)]
        if len(steps) != 1 or (path and len(readers) > 1):
            return tuple(path)
        current = steps[0]
        path.append(current)


def _is_step(node: fx.Node, value: fx.Node, limit: float) -> bool:
    others = [arg for arg in node.all_input_nodes if arg is not value]
    if node.target is _CONVERT:
        return True
    if not has(node, "step") or (node.target is aten.div.Tensor and node.args[0] is not value):
        return False
    twice = list(node.args).count(value) > 1
    return not twice and shape_of(node) == shape_of(value) and all(numel(arg) <= limit for arg in others)


def _is_statistic(node: fx.Node) -> bool:
    """Whether only statistics are computed from the node: a view or conversion for them, or they themselves."""
    if node.target is aten.var_mean.correction:
        return True
    passing = is_view(node) or node.target is _CONVERT
    return passing and bool(node.users) and all(map(_is_statistic, node.users))


def _batch_statistics(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Mean and reciprocal deviation from the only `var_mean` of the value, if it leaves whole channels together."""
    moments = list(_moments(value))
    if len(moments) != 1 or not _keeps_channels(moments[0], shape_of(value)):
        return None
    parts = {node.args[1]: node for node in moments[0].users if "getitem" in str(node.target)}
    if set(parts) != {0, 1}:
        return None
    reciprocal = _reciprocal(parts[0])
    return None if reciprocal is None else (parts[1], reciprocal)


def _moments(value: fx.Node) -> Iterator[fx.Node]:
    for user in value.users:
        if user.target is aten.var_mean.correction:
            yield user
        elif is_view(user) or user.target is _CONVERT:
            yield from _moments(user)


def _keeps_channels(moments: fx.Node, size: tuple[int, ...]) -> bool:
    """Whether the value's channels, or groups of them that are neighbours in a sample, have one statistic each."""
    source = shape_of(moments.all_input_nodes[0])
    reduced = {int(dim) % len(source) for dim in arguments(moments)[1]}
    kept = [dim for dim in range(len(source)) if dim not in reduced]
    if source == size:
        return kept in ([1], [0, 1], [0])
    groups = 1
    for dim in kept:
        groups *= source[dim]
    leading = all(source[dim] == 1 for dim in reduced if kept and dim < kept[-1])
    return leading and groups % size[0] == 0 and (size[0] * size[1]) % groups == 0


def _reciprocal(variance: fx.Node) -> fx.Node | None:
    """`rsqrt(variance + eps)`."""
    for user in variance.users:
        if user.target is aten.rsqrt.default:
            return user
        if user.target in (aten.add.Tensor, aten.add.Scalar) and len(user.all_input_nodes) == 1:
            return _reciprocal(user)
    return None


def _running_statistics(path: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node] | None:
    """The coefficients of `(value - mean) * rstd`, if a normalisation layer begins with that."""
    steps = [node for node in path if node.target is not _CONVERT]
    if len(steps) < 2 or [node.target for node in steps[:2]] != [aten.sub.Tensor, aten.mul.Tensor]:
        return None
    found = [[arg for arg in node.all_input_nodes if arg not in path][-1:] for node in steps[:2]]
    if not all(found) or not all(map(is_normalisation, steps[:2])) or steps[0].args[1] is not found[0][0]:
        return None
    return found[0][0], found[1][0]


def _signs(result: fx.Node) -> tuple[fx.Node | None, frozenset[str]]:
    """The activation that has the sign of the result, and the names of all that have it."""
    signed = {result}
    activation = None
    while True:
        following = [user for node in signed for user in node.users if user not in signed and _keeps_sign(user, signed)]
        if not following:
            break
        signed.update(following)
        activation = activation or next((node for node in following if node.target is not _CONVERT), None)
    return activation, frozenset(node.name for node in signed)


def _keeps_sign(node: fx.Node, signed: set[fx.Node]) -> bool:
    if node.target in (aten.relu.default, _CONVERT):
        return bool(node.meta["val"].dtype.is_floating_point)
    if node.target is not aten.where.self:
        return False
    # LeakyReLU: where(z > 0, z, slope * z) with a positive slope.
    condition, positive, negative = arguments(node)
    slope = negative.args[1] if isinstance(negative, fx.Node) and len(negative.args) == 2 else None
    return (
        isinstance(condition, fx.Node)
        and condition.target is aten.gt.Scalar
        and condition.args[0] in signed
        and arguments(condition)[1] == 0
        and positive in signed
        and negative.target in (aten.mul.Tensor, aten.mul.Scalar)
        and negative.args[0] in signed
        and isinstance(slope, (int, float))
        and slope > 0
    )


def _by_channel(statistic: Tensor, size: tuple[int, ...]) -> Tensor:
    """A statistic as (1 or samples, channels, 1...): of groups, repeated for each of their channels."""
    samples, channels = size[:2]
    ones = (1,) * (len(size) - 2)
    count = statistic.numel()
    if statistic.dim() == len(size) and statistic.shape[0] in (1, samples) and statistic.shape[1] == channels:
        return statistic.reshape(-1, channels, *ones)
    if count == channels and statistic.dim() < len(size):
        return statistic.reshape(1, channels, *ones)
    return statistic.reshape(count, 1).expand(count, samples * channels // count).reshape(samples, channels, *ones)


def _flat(*values: Tensor) -> list[Tensor]:
    """(1 or samples, channels, 1...) to (1 or samples, channels), all of one shape."""
    return [value.flatten(1) for value in torch.broadcast_tensors(*values)]
