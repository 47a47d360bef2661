"""Canvas of the phantoms: coordinates, band-limited noise, strokes, discs, area means.

Phantoms are rendered in normalised coordinates, x to the right and y down in [-1, 1], on a canvas
of `work` x `work` pixels, and averaged down to the requested resolution at the end. The same
generator state therefore gives the same image at every resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedgan.errors import ConfigError

SMALLEST, LARGEST = 16, 1024
_STEPS = 64  # noise fields shift by multiples of 1/64 of the canvas, exact for every canvas size
_FIELDS = 3  # fields per band
_SPECTRUM = 512  # cycles of the noise spectrum; a canvas uses those below its Nyquist limit

# Cycles across the canvas: from, to.
BANDS = {"broad": (0.7, 2.6), "coarse": (1.5, 5.0), "middle": (5.0, 14.0), "fine": (16.0, 60.0)}


@dataclass(frozen=True)
class Canvas:
    """A canvas of `work` x `work` pixels for images of `resolution` x `resolution`."""

    resolution: int
    work: int
    x: np.ndarray  # (1, work) float32, left -1 to right 1
    y: np.ndarray  # (work, 1) float32, top -1 to bottom 1

    @property
    def pixel(self) -> float:
        """Side of one canvas pixel in normalised units."""
        return 2.0 / self.work

    def noise(self, rng: np.random.Generator, band: str) -> np.ndarray:
        """Noise (work, work) float32 of mean 0, variance 1 and frequencies `BANDS[band]`."""
        total = np.zeros((self.work, self.work), np.float32)
        # The sum of two shifted fields gives (3 * 64 * 64 * 4) squared different ones.
        for _ in range(2):
            which, down, right, turn = (int(n) for n in rng.integers((_FIELDS, _STEPS, _STEPS, 4)))
            tiled = _bank(self.work, band)[which]
            top, left = down * self.work // _STEPS, right * self.work // _STEPS
            view = tiled[top : top + self.work, left : left + self.work]
            total += view[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]
        total *= np.float32(np.sqrt(0.5))
        return total

    def blobs(
        self, points: np.ndarray, radii: np.ndarray | float, heights: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Sum of K round Gaussians, (work, work) float32.

        `points` (K, 2) as x, y; `radii` (K,) standard deviations.
        """
        points = np.asarray(points, np.float32).reshape(-1, 2)
        scale = (
            -0.5
            / np.square(np.broadcast_to(np.asarray(radii, np.float32), (len(points),)))[:, None]
        )
        across = np.exp(scale * np.square(self.x - points[:, :1]))
        down = np.exp(scale * np.square(self.y[:, 0] - points[:, 1:]))
        down *= np.broadcast_to(np.asarray(heights, np.float32), (len(points),))[:, None]
        return down.T @ across

    def strokes(
        self, curves: np.ndarray, widths: np.ndarray | float, strengths: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Coverage (work, work) float32 in [0, 1] of K smooth lines.

        `curves` (K, 3, 2): control points x, y of quadratic Bezier curves; `widths`: half widths at
        both ends, broadcast to (K, 2); `strengths` (K,): coverage in the middle of a wide line.
        Overlapping lines take the maximum.
        """
        cover = np.zeros(self.work * self.work, np.float32)
        curves = np.asarray(curves, np.float64).reshape(-1, 3, 2)
        if not len(curves):
            return cover.reshape(self.work, self.work)
        points, half, strength = self._along(curves, np.asarray(widths), np.asarray(strengths))
        # A line thinner than a pixel gets the width of a pixel and less strength.
        floor = 0.75 * self.pixel
        strength = strength * np.minimum(1.0, half / floor)
        reach = int(np.ceil(max(half.max(), floor) / self.pixel)) + 1
        centre = (points + 1.0) / self.pixel - 0.5
        offsets = np.arange(-reach, reach + 1)
        column = np.rint(centre[:, 0]).astype(np.int32)[:, None] + offsets
        row = np.rint(centre[:, 1]).astype(np.int32)[:, None] + offsets
        across = np.where(
            (column >= 0) & (column < self.work), np.square(column - centre[:, :1]), np.inf
        ).astype(np.float32)
        down = np.where(
            (row >= 0) & (row < self.work), np.square(row - centre[:, 1:]), np.inf
        ).astype(np.float32)
        edge = (np.maximum(half, floor) / self.pixel + 0.5).astype(np.float32)
        value = np.clip(
            edge[:, None, None] - np.sqrt(down[:, :, None] + across[:, None, :]), 0.0, 1.0
        )
        value *= strength.astype(np.float32)[:, None, None]
        where = row[:, :, None] * self.work + column[:, None, :]
        seen = value > 0
        np.maximum.at(cover, where[seen], value[seen])
        return cover.reshape(self.work, self.work)

    def _along(
        self, curves: np.ndarray, widths: np.ndarray, strengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (P, 2) on all curves, about one pixel apart, with half widths and strengths."""
        legs = np.hypot(*np.moveaxis(np.diff(curves, axis=1), -1, 0)).sum(axis=1)
        counts = np.maximum(2, (legs / self.pixel).astype(int) + 1)
        which = np.repeat(np.arange(len(curves)), counts)
        t = (np.arange(len(which)) - (np.cumsum(counts) - counts)[which]) / (counts - 1)[which]
        p, t2 = curves[which], t[:, None]
        points = (1 - t2) ** 2 * p[:, 0] + 2 * t2 * (1 - t2) * p[:, 1] + t2**2 * p[:, 2]
        ends = np.broadcast_to(widths, (len(curves), 2))[which]
        return (
            points,
            ends[:, 0] + t * (ends[:, 1] - ends[:, 0]),
            np.broadcast_to(strengths, len(curves))[which],
        )

    def down(self, image: np.ndarray) -> np.ndarray:
        """Area mean of (..., work, work) as (..., resolution, resolution) float32."""
        return area_mean(image, self.resolution)


def area_mean(image: np.ndarray, resolution: int) -> np.ndarray:
    """Means over equal squares: (..., S, S) to (..., resolution, resolution).

    S is a multiple of `resolution`.
    """
    size = image.shape[-1]
    factor = size // resolution
    if factor == 1:
        return np.asarray(image, np.float32)
    lead = image.shape[:-2]
    rows = image.reshape(*lead, resolution, factor, size).mean(axis=-2, dtype=np.float32)
    return rows.reshape(*lead, resolution, resolution, factor).mean(axis=-1, dtype=np.float32)


def step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Hermite step: 0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - np.float32(low)) * np.float32(1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def check_resolution(resolution: int) -> None:
    """Raise `ConfigError` unless `resolution` is a power of two from 16 to 1024."""
    if not SMALLEST <= resolution <= LARGEST or resolution & (resolution - 1):
        raise ConfigError(
            f"data.resolution = {resolution}: phantoms need a power of two from {SMALLEST} to "
            f"{LARGEST}"
        )


@lru_cache(maxsize=8)
def make_canvas(resolution: int) -> Canvas:
    """The canvas for images of `resolution`.

    128 pixels up to 64, twice the resolution at 128 and 256, the resolution itself above.
    """
    check_resolution(resolution)
    work = 128 if resolution <= 64 else 2 * resolution if resolution <= 256 else resolution
    centres = ((np.arange(work) + 0.5) * (2.0 / work) - 1.0).astype(np.float32)
    return Canvas(resolution, work, centres[None, :], centres[:, None])


@lru_cache(maxsize=len(BANDS) * 2)
def _bank(work: int, band: str) -> np.ndarray:
    """Noise fields (_FIELDS, 2 * work, 2 * work), repeated twice per axis for shifted views.

    One fixed spectrum, cut at the Nyquist limit of the canvas, gives every canvas size the same
    fields.
    """
    low, high = BANDS[band]
    half = int(min(np.ceil(high * 1.6), _SPECTRUM))
    draws = np.random.default_rng([2110, list(BANDS).index(band)]).standard_normal(
        (_FIELDS, 2, 2 * half, half + 1)
    )
    rows = np.fft.fftfreq(2 * half, 1.0 / (2 * half))[:, None]
    cycles = np.hypot(rows, np.arange(half + 1)[None, :])
    gain = (
        np.exp(-((cycles / high) ** 4))
        * (1.0 - np.exp(-((cycles / low) ** 4)))
        / np.maximum(cycles, 1.0)
    )
    out = np.empty((_FIELDS, 2 * work, 2 * work), np.float32)
    keep = min(half, work // 2 - 1)
    for index, (real, imaginary) in enumerate(draws):
        coefficients = (real + 1j * imaginary) * gain
        spectrum = np.zeros((work, work // 2 + 1), np.complex128)
        spectrum[:keep, : keep + 1] = coefficients[:keep, : keep + 1]
        spectrum[-keep:, : keep + 1] = coefficients[-keep:, : keep + 1]
        field = np.fft.irfft2(spectrum) * work * work
        # The power of the whole spectrum gives every canvas size the same amplitude.
        power = np.sqrt(2 * (gain**2).sum() * 2)
        out[index] = np.tile((field / power).astype(np.float32), (2, 2))
    return out
