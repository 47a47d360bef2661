"""Numbers as text. Anything that is no finite number becomes a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

DASH = "–"


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything else (null, text, Boolean, NaN, beyond 1e300).

    Magnitudes below 1e-300 become zero, so that no axis divides by them.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    if not abs(result) < 1e300:
        return None
    return result if abs(result) > 1e-300 else 0.0


def whole(value: Any) -> str:
    """A count with thousands separators: 12,000."""
    n = number(value)
    return DASH if n is None else f"{n:,.0f}"


def decimal(value: Any, digits: int = 3) -> str:
    """A number with a fixed number of decimals: 0.912."""
    n = number(value)
    return DASH if n is None else f"{n:,.{digits}f}".replace("-", "−")


def significant(value: Any, digits: int = 4) -> str:
    """A number of unknown size: 31.47, 0.003412, 3.1e-07, 12,345."""
    n = number(value)
    if n is None:
        return DASH
    return (f"{n:,.0f}" if abs(n) >= 10**digits else f"{n:.{digits}g}").replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    """A difference with its sign: +0.012, −0.060."""
    n = number(value)
    return DASH if n is None else f"{n:+,.{digits}f}".replace("-", "−")


def interval(value: Any, digits: int = 3) -> str:
    """A pair [low, high] as 0.891–0.930, or a dash."""
    pair = bounds(value)
    return DASH if pair is None else f"{decimal(pair[0], digits)}–{decimal(pair[1], digits)}"


def sized_interval(value: Any) -> str:
    """A pair of any size, with decimals for its larger end: 0.0439–0.133, −0.243 to −0.0302."""
    pair = bounds(value)
    if pair is None:
        return DASH
    digits = min(max(2 - math.floor(math.log10(max(abs(pair[0]), abs(pair[1]), 1e-6))), 0), 6)
    joint = " to " if pair[0] < 0 else "–"
    return f"{decimal(pair[0], digits)}{joint}{decimal(pair[1], digits)}"


def spread(value: Any, digits: int = 3) -> str:
    """A pair of differences as [−0.021, +0.013], or a dash."""
    pair = bounds(value)
    return DASH if pair is None else f"[{signed(pair[0], digits)}, {signed(pair[1], digits)}]"


def bounds(value: Any) -> tuple[float, float] | None:
    """A pair of finite numbers, lower first; None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (min(low, high), max(low, high))


def short(value: float, digits: int = 4) -> str:
    """An axis label: 0, 0.25, 500, 20k, 1.5M, 1e-5."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e12):
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−") if exponent else mantissa
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.{digits}g}{unit}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def labels(ticks: Sequence[float]) -> list[str]:
    """Axis labels of ticks, with enough digits to differ."""
    for digits in (4, 6, 9, 12):
        texts = [short(tick, digits) for tick in ticks]
        if len(set(texts)) == len(set(ticks)):
            break
    return texts


def duration(value: Any) -> str:
    """Seconds as 48 s, 3 min 42 s, 1 h 12 min."""
    n = number(value)
    if n is None or n < 0:
        return DASH
    if n < 10:
        return f"{n:.1f} s"
    seconds = round(n)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(n / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def size(value: Any) -> str:
    """Bytes in decimal units: 812 B, 48.2 MB, 1.21 GB."""
    n = number(value)
    if n is None or n < 0:
        return DASH
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5 or unit == "TB":
            return (
                f"{n:.0f} {unit}"
                if unit == "B"
                else f"{n:.3g} {unit}"
                if n < 999.5
                else f"{n:,.0f} {unit}"
            )
        n /= 1000
    raise AssertionError("unreachable")


def plural(count: int, one: str, many: str | None = None) -> str:
    """1 hospital, 3 hospitals."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
