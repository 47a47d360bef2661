"""The drawing board of the phantoms: coordinates, band-limited noise, strokes, discs, area means.

Everything is drawn in normalised coordinates, x to the right and y down in [-1, 1], on a board of
`work` pixels a side, and averaged down to the asked resolution at the end. A phantom that is drawn
with the same generator at two resolutions is therefore the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedgan.errors import ConfigError

SMALLEST, LARGEST = 16, 1024
_STEPS = (
    64  # a noise field is moved by multiples of 1/64 of the board, which every board can do exactly
)
_FIELDS = 3  # fields in the bank for each band
_SPECTRUM = 512  # cycles that the noise spectrum holds; a board takes those that it can show

# Cycles across the board: from, to.
BANDS = {"broad": (0.7, 2.6), "coarse": (1.5, 5.0), "middle": (5.0, 14.0), "fine": (16.0, 60.0)}


@dataclass(frozen=True)
class Canvas:
    """A board of `work` x `work` pixels for pictures of `resolution` x `resolution`."""

    resolution: int
    work: int
    x: np.ndarray  # (1, work) float32, left -1 to right 1
    y: np.ndarray  # (work, 1) float32, top -1 to bottom 1

    @property
    def pixel(self) -> float:
        """Side of one pixel of the board in normalised units."""
        return 2.0 / self.work

    def noise(self, rng: np.random.Generator, band: str) -> np.ndarray:
        """A (work, work) float32 field of mean 0 and variance 1 whose cycles lie in `BANDS[band]`."""
        total = np.zeros((self.work, self.work), np.float32)
        for _ in range(
            2
        ):  # the sum of two shifted fields: (3 * 64 * 64 * 4) squared different ones
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
        """The sum of K round Gaussians: `points` (K, 2) as x, y; `radii` (K,) standard deviations; (work, work) float32."""
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
        """Coverage (work, work) float32 in [0, 1] by K smooth lines.

        `curves` (K, 3, 2): control points x, y of quadratic Bezier curves; `widths` (K, 2) or alike: half
        widths at both ends; `strengths` (K,): coverage of a wide line's middle. Lines overlap by the maximum.
        """
        cover = np.zeros(self.work * self.work, np.float32)
        curves = np.asarray(curves, np.float64).reshape(-1, 3, 2)
        if not len(curves):
            return cover.reshape(self.work, self.work)
        points, half, strength = self._along(curves, np.asarray(widths), np.asarray(strengths))
        # A line thinner than a pixel covers it in part: the width of a pixel, less strength.
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
        """Points (P, 2) on all curves, about a pixel apart, with their half widths and strengths."""
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

    def down(self, picture: np.ndarray) -> np.ndarray:
        """The area mean of (..., work, work), as (..., resolution, resolution) float32."""
        return area_mean(picture, self.resolution)


def area_mean(picture: np.ndarray, resolution: int) -> np.ndarray:
    """Means over squares of equal size: (..., S, S) to (..., resolution, resolution), S a multiple of `resolution`."""
    size = picture.shape[-1]
    factor = size // resolution
    if factor == 1:
        return np.asarray(picture, np.float32)
    lead = picture.shape[:-2]
    rows = picture.reshape(*lead, resolution, factor, size).mean(axis=-2, dtype=np.float32)
    return rows.reshape(*lead, resolution, resolution, factor).mean(axis=-1, dtype=np.float32)


def step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Hermite step: 0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - np.float32(low)) * np.float32(1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def check_resolution(resolution: int) -> None:
    """Raise `ConfigError` unless `resolution` is a power of two from 16 to 1024."""
    if not SMALLEST <= resolution <= LARGEST or resolution & (resolution - 1):
        raise ConfigError(
            f"data.resolution = {resolution}: phantoms are drawn at powers of two from {SMALLEST} to {LARGEST}"
        )


@lru_cache(maxsize=8)
def canvas(resolution: int) -> Canvas:
    """The board for pictures of `resolution`: 128 pixels up to 64, twice the resolution at 128 and 256, then as it is."""
    check_resolution(resolution)
    work = 128 if resolution <= 64 else 2 * resolution if resolution <= 256 else resolution
    centres = ((np.arange(work) + 0.5) * (2.0 / work) - 1.0).astype(np.float32)
    return Canvas(resolution, work, centres[None, :], centres[:, None])


@lru_cache(maxsize=len(BANDS) * 2)
def _bank(work: int, band: str) -> np.ndarray:
    """Noise fields (_FIELDS, 2 * work, 2 * work), each repeated once to either side, for cutting out shifted views.

    They come from one fixed spectrum that is cut to what the board can show, so that boards of all
    sizes hold the same fields.
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
        power = np.sqrt(
            2 * (gain**2).sum() * 2
        )  # by the whole spectrum, so that a small board is not louder
        out[index] = np.tile((field / power).astype(np.float32), (2, 2))
    return out
