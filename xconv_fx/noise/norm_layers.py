"""What a normalisation layer computes of its input, and what errors of that input change.

With x^ the normalised input and g the output gradient times the layer's weight, the input gradient is
(g - mean(g) - x^ mean(g x^)) / sigma over each *set* of elements that are normalised together: a channel, or a part of
a sample.

Known gap: statistics are the batch's, also of layers that normalise by running ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import SavedAs, codec_of, fixed

from .moments import BATCH_NORM, INSTANCE_NORM


def reads_its_input(module: nn.Module) -> bool:
    """Whether the backward of a normalisation layer reads its input; by running statistics it does not."""
    return not isinstance(module, (BATCH_NORM, INSTANCE_NORM)) or module.training or not module.track_running_stats


def holds_fixed(module: nn.Module, x: Tensor) -> bool:
    """Whether the codec "fixed" knows the layer's input: channels of (samples, channels, positions...)."""
    return x.dim() > 2 and not isinstance(module, nn.LayerNorm)


@dataclass(frozen=True)
class Normalisation:
    """A call of the layer `module` with input `x`; `mean` and `scale`, 1 / sigma, broadcast to it."""

    module: nn.Module
    x: Tensor
    mean: Tensor
    scale: Tensor

    @staticmethod
    def of(module: nn.Module, x: Tensor) -> Normalisation:
        mean = _set_mean(module, x)
        variance = _set_mean(module, (x - mean).square())
        return Normalisation(module, x, mean, (variance + module.eps).rsqrt())  # type: ignore[operator]

    def scaled(self, dy: Tensor) -> Tensor:
        """An output gradient, or anything of its shape, times the layer's weight."""
        weight = self._parameter("weight")
        return dy if weight is None else dy * weight

    @property
    def slope(self) -> Tensor:
        """By what factor an error of x arrives in the result, in the shape of x."""
        return self.scaled(self.scale.expand_as(self.x))

    @property
    def result(self) -> Tensor:
        """What the layer returns."""
        bias = self._parameter("bias")
        result = self.scaled((self.x - self.mean) * self.scale)
        return result if bias is None else result + bias

    def input_gradient(self, dy: Tensor) -> Tensor:
        """The gradient of x."""
        g, normal = self.scaled(dy), (self.x - self.mean) * self.scale
        return (g - _set_mean(self.module, g) - normal * _set_mean(self.module, g * normal)) * self.scale

    def change(self, dy: Tensor, error: Tensor) -> Tensor:
        """What the input gradient changes by when the backward reads x + error."""
        linear, product = self.changes(dy, error)
        return linear + product

    def changes(self, dy: Tensor, error: Tensor, even: bool = False) -> tuple[Tensor, Tensor]:
        """The same in two parts: linear in the error, and the products of errors.

        An error enters twice: as it is, times the mean of g x^, which is small; and through that mean, times x^, which
        is small as well but adds up in the weight gradient of the layer before. `even`, for independent errors, gives
        what that mean changes by the size that it has in the root mean square, and leaves chance its sign: the mean
        energy of the change is the same, and fewer draws tell it.
        """
        g, normal, off = self.scaled(dy), (self.x - self.mean) * self.scale, error * self.scale
        moved = _set_mean(self.module, g * off)
        if even:
            members = self.x.numel() / _sets(self.module, self.x)
            moved = moved.sign() * (_set_mean(self.module, (g * off).square()) / members).sqrt()
        linear = off * _set_mean(self.module, g * normal) + normal * moved
        return -linear * self.scale, -off * moved * self.scale

    def fixed_error(self, bits: int, signed: bool) -> Tensor:
        """What is off in x when it is held as "fixed"; `signed` says whether an activation needs the result's sign.

        The table of scales is made as the compiler does (`passes/find_norms.py`).
        """
        x = self.x
        middle, deviation = self._by_channel(self.mean), self._by_channel(1 / self.scale)
        shift = slope = positive = None
        if signed:
            slope = self._by_channel(self.scaled(torch.ones_like(x)))
            bias = self._parameter("bias")
            shift = torch.zeros_like(slope) if bias is None else self._by_channel(bias)
            positive = self.result > 0
        table = fixed.scales(middle, deviation, shift, slope, bits)
        held = SavedAs(CodecSpec("fixed", bits=bits), tuple(x.shape), x.dtype, tuple(range(x.dim())))
        return codec_of("fixed").decode(fixed.encode(x, table, held, positive), table, held) - x

    def _parameter(self, name: str) -> Tensor | None:
        """The layer's weight or bias in a shape that broadcasts to x."""
        value = getattr(self.module, name, None)
        if value is None:
            return None
        shape = value.shape if isinstance(self.module, nn.LayerNorm) else (-1, *(1 for _ in self.x.shape[2:]))
        return value.detach().to(self.x.dtype).view(shape)

    def _by_channel(self, value: Tensor) -> Tensor:
        """(samples, channels) of what is the same all over a channel of a sample."""
        return value.expand_as(self.x).flatten(2)[:, :, 0]


def _sets(module: nn.Module, x: Tensor) -> int:
    """How many sets of elements are normalised together."""
    if isinstance(module, nn.GroupNorm):
        return len(x) * module.num_groups
    return _set_mean(module, x).numel()


def _set_mean(module: nn.Module, x: Tensor) -> Tensor:
    """For each element the mean over what is normalised together with it."""
    if isinstance(module, nn.GroupNorm):
        groups = x.unflatten(1, (module.num_groups, -1))
        return groups.mean(list(range(2, groups.dim())), keepdim=True).expand_as(groups).reshape(x.shape)
    if isinstance(module, nn.LayerNorm):
        return x.mean(list(range(x.dim() - len(module.normalized_shape), x.dim())), keepdim=True)
    first = [0] if isinstance(module, BATCH_NORM) else []
    return x.mean([*first, *range(2, x.dim())], keepdim=True)
