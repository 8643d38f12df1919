"""What the losses people write allocate: `python benchmarks/losses.py` prints a table.

The unit is the model's result in float32, the precision that losses compute in. "between" is the most that is alive
between the model's forward and its backward: the result, until nobody holds it, what the loss makes of it, and the
gradients that go back to the model. "kept" is what is still alive when the model's own backward begins, besides these
gradients. In `loss(model(x)).backward()` nobody holds the result but the loss; a program that keeps it in a variable
takes one more where it is not saved anyway. The allowances of `xconv_fx/planner/loss.py` are set by this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from xconv_fx.hooks.allocator_watch import CpuWatch
from xconv_fx.planner.loss import KEPT, LOSS_COPIES

SHAPE = (4, 8, 48, 48)
CLASSES = SHAPE[1]


@dataclass(frozen=True)
class Targets:
    """What the losses compare a result with: values, classes of pixels, and these as ones and zeros."""

    values: Tensor
    classes: Tensor
    hot: Tensor

    @staticmethod
    def of(shape: tuple[int, ...]) -> Targets:
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(shape, generator=generator)
        classes = values.argmax(1)
        return Targets(values, classes, F.one_hot(classes, shape[1]).movedim(-1, 1).float().contiguous())


def dice(y: Tensor, t: Targets) -> Tensor:
    p = y.float().softmax(1)
    overlap, total = (p * t.hot).sum((2, 3)), (p + t.hot).sum((2, 3))
    return 1 - (2 * overlap / total).mean()


def focal(y: Tensor, t: Targets) -> Tensor:
    log_p = F.log_softmax(y.float(), 1)
    return -((1 - log_p.exp()) ** 2 * log_p * t.hot).sum(1).mean()


def ssim(y: Tensor, t: Targets) -> Tensor:
    """Structural similarity with windows of 7 pixels, as it is written in most repositories."""

    def local(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, 1, 3)

    x, target = y.float(), t.values
    mean_x, mean_t = local(x), local(target)
    var_x, var_t = local(x * x) - mean_x**2, local(target * target) - mean_t**2
    both = local(x * target) - mean_x * mean_t
    score = ((2 * mean_x * mean_t + 1e-4) * (2 * both + 9e-4)) / (
        (mean_x**2 + mean_t**2 + 1e-4) * (var_x + var_t + 9e-4)
    )
    return 1 - score.mean()


WEIGHTS = torch.linspace(0.5, 2, CLASSES)
LOSSES: dict[str, Callable[[Tensor, Targets], Tensor]] = {
    "mean": lambda y, t: y.float().mean(),
    "square().mean()": lambda y, t: y.float().square().mean(),
    "l1_loss": lambda y, t: F.l1_loss(y.float(), t.values),
    "mse_loss": lambda y, t: F.mse_loss(y.float(), t.values),
    "((y - t) ** 2).mean()": lambda y, t: ((y - t.values) ** 2).mean(),
    "smooth_l1_loss": lambda y, t: F.smooth_l1_loss(y.float(), t.values),
    "huber_loss": lambda y, t: F.huber_loss(y.float(), t.values),
    "charbonnier": lambda y, t: ((y - t.values) ** 2 + 1e-6).sqrt().mean(),
    "bce_with_logits": lambda y, t: F.binary_cross_entropy_with_logits(y.float(), t.values),
    "cross_entropy": lambda y, t: F.cross_entropy(y.float(), t.classes),
    "... with label smoothing": lambda y, t: F.cross_entropy(y.float(), t.classes, label_smoothing=0.1),
    "... with class weights": lambda y, t: F.cross_entropy(y.float(), t.classes, weight=WEIGHTS),
    "... with ignore_index": lambda y, t: F.cross_entropy(y.float(), t.classes, ignore_index=0),
    "dice": dice,
    "dice + cross entropy": lambda y, t: dice(y, t) + F.cross_entropy(y.float(), t.classes),
    "focal": focal,
    "dice + focal": lambda y, t: dice(y, t) + focal(y, t),
    "kl_div": lambda y, t: F.kl_div(F.log_softmax(y.float(), 1), t.values.softmax(1), reduction="batchmean"),
    "ssim": ssim,
    "l1 + ssim": lambda y, t: F.l1_loss(y.float(), t.values) + ssim(y, t),
}


class _Model(torch.autograd.Function):
    """Stands for the compiled model: notes what is alive when its backward begins."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: CpuWatch, seen: list[int]) -> Tensor:
        ctx.watch, ctx.seen = watch, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.seen += [ctx.watch.most, ctx.watch.live - gradient.untyped_storage().nbytes()]
        return gradient, None, None


def measure(loss: Callable[[Tensor, Targets], Tensor], dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """("between", "kept") of a loss on a result of `dtype`, in units of the result in float32."""
    torch.manual_seed(0)
    targets = Targets.of(SHAPE)
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    for _ in range(2):  # The first time, libraries keep what they make.
        watch, seen = CpuWatch(), list[int]()
        try:
            value = loss(_Model.apply(x, watch, seen), targets)  # type: ignore[no-untyped-call]
            value.backward()  # type: ignore[no-untyped-call]
        finally:
            watch.end()
        del value
        x.grad = None
    unit = x.numel() * 4
    return seen[0] / unit, seen[1] / unit


def rows(dtypes: Iterable[torch.dtype]) -> list[tuple[str, tuple[float, float]]]:
    """Every loss on results of every type, by name."""
    named = {torch.float32: "", torch.bfloat16: ", bf16"}
    return [(name + named[dtype], measure(loss, dtype)) for dtype in dtypes for name, loss in LOSSES.items()]


def main() -> None:
    table = Table("loss", "between", "kept")
    for name, (between, kept) in rows((torch.float32, torch.bfloat16)):
        over = between > 1 + LOSS_COPIES + 0.01 or kept > KEPT + 0.01
        table.add_row(name, f"{between:.2f}", f"{kept:.2f}", style="bold" if over else "")
    table.caption = f"allowed for: {1 + LOSS_COPIES} and {KEPT}; bold is more"
    Console().print(table)


if __name__ == "__main__":
    main()
