"""Axis scales: values to positions, and round tick values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Map [low, high] to [start, stop] in pixels; low < high, and low > 0 if `log`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of `value`, clamped to the axis and rounded to a tenth of a pixel."""
        warp = math.log10 if self.log else float
        value = min(max(value, self.low), self.high)
        share = (warp(value) - warp(self.low)) / (warp(self.high) - warp(self.low))
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values inside the axis."""
        return (
            log_ticks(self.low, self.high, count)
            if self.log
            else nice_ticks(self.low, self.high, count)
        )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` + 1 multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last < first:  # the step is wider than the range
        return nice_ticks(low, high, count + 1)
    digits = max(0, -math.floor(math.log10(step))) + 1
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten inside [low, high]; 1, 2 and 5 times them if those are too few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / max(count, 1))]
    finer = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return finer if len(finer) >= 2 else nice_ticks(low, high, count)


def span(
    values: Iterable[float], include: Sequence[float] = (), margin: float = 0.06
) -> tuple[float, float]:
    """A range of positive width that holds all `values` and `include`, with a margin."""
    every = [*values, *include]
    if not every:
        return 0.0, 1.0
    low, high = min(every), max(every)
    width = high - low
    if width <= 1e-9 * max(abs(low), abs(high), 1e-12):
        width = abs(low) or 1.0
        return low - width / 2, high + width / 2
    low_margin = 0.0 if low >= 0 and low - margin * width < 0 else margin * width
    return (0.0 if low_margin == 0.0 else low - low_margin), high + margin * width


def log_span(values: Iterable[float]) -> tuple[float, float] | None:
    """A range for a logarithmic axis, or None unless all values are positive and differ 50-fold."""
    every = list(values)
    if not every or min(every) <= 0 or max(every) / min(every) < 50:
        return None
    return min(every) / 1.3, max(every) * 1.3


def log_range(values: Iterable[float], least: float = 6.0) -> tuple[float, float]:
    """A range of at least `least`-fold width for a logarithmic axis: it holds two ticks 1, 2, 5."""
    every = list(values) or [1.0]
    low, high = min(every) / 1.3, max(every) * 1.3
    margin = math.sqrt(max(1.0, least / (high / low)))
    return low / margin, high * margin


def spread_out(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move increasing positions minimally until each is `gap` from the next, inside [low, high].

    The order stays. If the range is too narrow for all gaps, the gaps are smaller.
    """
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    # Isotonic regression: without its gaps, no position may precede the one before; runs that do
    # take their mean.
    runs: list[list[float]] = []
    for i, position in enumerate(positions):
        runs.append([position - i * gap])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    level = [
        min(max(_mean(run), low), high - gap * (len(positions) - 1)) for run in runs for _ in run
    ]
    return [round(value + i * gap, 1) for i, value in enumerate(level)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def thin(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most about `most` points that keep a line's shape: minimum and maximum of each bucket."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    ends = [points[0]] if kept[0] != points[0] else []
    return ends + kept + ([points[-1]] if kept[-1] != points[-1] else [])
