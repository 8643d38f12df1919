"""A frontier as a picture: peak against time and against noise, drawn by matplotlib, the extra `plot`."""

from __future__ import annotations

from xconv_fx.errors import UsageError
from xconv_fx.units import format_size

from .frontier import Frontier
from .table import log_noise, noise_text

TIME, NOISE = "#1f77b4", "#c2410c"


def draw(frontier: Frontier, title: str, path: str) -> None:
    """Write a PNG. Raises `UsageError` without matplotlib, or when the file cannot be written."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise UsageError(f"--png {path} needs matplotlib", "pip install 'xconv-fx[plot]'") from error
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    figure.suptitle(title)
    time, noise = figure.subplots(1, 2)
    points = frontier.points
    peaks = [point.peak for point in points]
    time.plot(peaks, [100 * point.slowdown for point in points], "o-", color=TIME)
    time.set(ylabel="extra time of a step, %")
    levels = log_noise(points)
    noise.plot(peaks, levels, "o-", color=NOISE)
    noise.set(ylabel="noise of the gradients")
    noise.set_yticks(*_noise_ticks(frontier, levels))
    for axes in (time, noise):
        axes.set_xlabel("predicted peak of a step")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_size(max(size, 0))))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path!r}: {error}", "--png with a path such as frontier.png") from error


def _noise_ticks(frontier: Frontier, levels: list[float]) -> tuple[list[float], list[str]]:
    """A tick every few decades, and one for exact plans where there are any."""
    exact = [level for level, point in zip(levels, frontier.points, strict=True) if not point.noise]
    noisy = [level for level, point in zip(levels, frontier.points, strict=True) if point.noise]
    ticks: dict[float, str] = {level: noise_text(0) for level in exact}
    if noisy:
        low, high = round(min(noisy)), round(max(noisy))
        ticks |= {float(decade): f"$10^{{{decade}}}$" for decade in range(low, high + 1, max(1, (high - low) // 5))}
    return list(ticks), list(ticks.values())
