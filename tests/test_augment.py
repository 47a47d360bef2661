"""Augmentation pipe: recorded images, definitions, and the paper's distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from fedgan.errors import ConfigError
from fedgan.training.augment import PIPES, AugmentPipe
from fedgan.training.augment.corruptions import BAND_POWER, band_gains
from fedgan.training.augment.geometry import inverse_map, warp, warp_aligned, warp_any
from fedgan.training.augment.pipe import COLOR, NEUTRAL
from fedgan.training.augment.wavelets import (
    CENTRE_TAP,
    SYM2,
    SYM6,
    axis_matrix,
    band_filters,
    downsampling_matrix,
    mirrored,
    resample,
    upsampling_matrix,
)

NAMES = (
    *("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac"),
    *("brightness", "contrast", "lumaflip", "hue", "saturation"),
)


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def smooth_images(batch: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    """Low frequencies only, symmetric at the borders: resampling hardly changes them."""
    waves = torch.cos(
        math.pi * torch.outer(torch.arange(size), torch.arange(3)) / (size - 1)
    ).double()
    return torch.einsum(
        "hk,bckl,wl->bchw",
        waves,
        random_images(batch, channels, 3, 3, seed=seed, dtype=torch.float64),
        waves,
    )


# --- recorded numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_augmentations_match_recorded_images(
    reference_vectors: dict[str, np.ndarray], name: str
) -> None:
    names = NAMES if name == "all" else [name]
    values: dict[str, float | torch.Tensor] = {
        key: float(reference_vectors[f"ada/value/{key}"]) for key in names
    }
    images = torch.from_numpy(reference_vectors["ada/in"])
    result = AugmentPipe("bgc")(images, 1.0, None, values=values)
    np.testing.assert_allclose(
        result.numpy(), reference_vectors[f"ada/out/{name}"], rtol=1e-4, atol=1e-4
    )


# --- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipe", PIPES)
def test_p_0_returns_the_same_tensor_and_draws_nothing(pipe: str) -> None:
    images = random_images(4, 3, 16, 16)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    result = AugmentPipe(pipe)(images, 0.0, generator)
    assert torch.equal(result, random_images(4, 3, 16, 16))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("pipe", ["bg", "bgc"])
def test_image_without_active_transform_is_bit_identical(pipe: str) -> None:
    images = random_images(64, 3, 16, 16)
    augment = AugmentPipe(pipe)
    drawn = augment.draw(64, 0.05, torch.Generator().manual_seed(1))
    neutral = torch.stack(
        [
            (value == NEUTRAL.get(name, 0.0)).reshape(64, -1).all(dim=1)
            for name, value in drawn.items()
        ]
    ).all(dim=0)
    result = augment(images, 0.05, torch.Generator().manual_seed(1))
    same = (result == images).flatten(1).all(dim=1)
    assert 0 < neutral.sum() < 64
    assert same[neutral].all()
    assert not same.all()


def test_neutral_values_are_the_identity() -> None:
    images = random_images(2, 3, 16, 16)
    augment = AugmentPipe("bgcfnc")
    neutral: dict[str, float | torch.Tensor] = {
        name: NEUTRAL.get(name, 0.0) for name in augment.transforms
    }
    torch.testing.assert_close(
        augment(images, 1.0, None, values=neutral), images, rtol=0, atol=1e-6
    )


# --- geometry against a plain definition ---------------------------------------------------------


def rotation(angle: float) -> np.ndarray:
    """Counter-clockwise as displayed, with y pointing down."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])


def plain_map(
    values: dict[str, float | tuple[float, float]], width: int, height: int
) -> np.ndarray:
    """The composite of appendix B, from input to output coordinates, one matrix per transform."""
    get = {"scale": 1.0, "aniso": 1.0, "xint": (0.0, 0.0), "xfrac": (0.0, 0.0), **values}.get
    shift, part = get("xint"), get("xfrac")
    return (
        translation(part[0] * width, part[1] * height)
        @ rotation(get("rotate_after", 0.0))
        @ np.diag([get("aniso"), 1 / get("aniso"), 1])
        @ rotation(get("rotate", 0.0))
        @ np.diag([get("scale"), get("scale"), 1])
        @ translation(round(shift[0] * width), round(shift[1] * height))
        @ rotation(get("rotate90", 0) * math.pi / 2)
        @ np.diag([1 - 2 * get("xflip", 0), 1, 1])
    )


def plain_warp(image: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """One channel (H, W): mirrored margin, insert zeros, filter, bilinear, filter, decimate."""
    (height, width), margin = image.shape, 4 * max(image.shape)
    taps = np.array(SYM6) * math.sqrt(2)
    padded = np.pad(image, margin, mode="reflect")
    fine = np.zeros((2 * padded.shape[0], 2 * padded.shape[1]))
    fine[::2, ::2] = padded
    for axis in (0, 1):
        fine = np.apply_along_axis(np.convolve, axis, fine, taps)
    backward = np.linalg.inv(forward)
    ys, xs = (
        (np.arange(2 * n + len(SYM6) - 2) - CENTRE_TAP) / 2 - (n - 1) / 2 for n in (height, width)
    )
    point = np.stack([*np.meshgrid(xs, ys), np.ones((len(ys), len(xs)))], axis=-1) @ backward.T
    column = 2 * (point[..., 0] + (width - 1) / 2 + margin) + CENTRE_TAP
    row = 2 * (point[..., 1] + (height - 1) / 2 + margin) + CENTRE_TAP
    read = ndimage.map_coordinates(fine, [row, column], order=1, prefilter=False, mode="constant")
    down = np.array(SYM6) / math.sqrt(2)
    return np.array(
        [
            [
                (read[2 * y : 2 * y + 12, 2 * x : 2 * x + 12] * np.outer(down, down)).sum()
                for x in range(width)
            ]
            for y in range(height)
        ]
    )


shares = st.floats(-0.3, 0.3)
factors = st.floats(0.6, 1.6)
angles = st.sampled_from([0.0]) | st.floats(-math.pi, math.pi)


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "xflip": st.integers(0, 1),
            "rotate90": st.integers(0, 3),
            "xint": st.tuples(shares, shares),
            "scale": factors,
            "rotate": angles,
            "aniso": factors,
            "rotate_after": angles,
            "xfrac": st.tuples(shares, shares),
        },
    ),
    st.sampled_from([(9, 9), (8, 8), (9, 8)]),
)
def test_warp_equals_its_definition(values: dict[str, float], shape: tuple[int, int]) -> None:
    image = random_images(1, 1, *shape, dtype=torch.float64)
    fixed: dict[str, float | torch.Tensor] = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()
    }
    fast = AugmentPipe("bg")(image, 1.0, None, values=fixed)
    plain = plain_warp(image[0, 0].numpy(), plain_map(values, shape[1], shape[0]))
    np.testing.assert_allclose(fast[0, 0].numpy(), plain, atol=1e-8)
    single = AugmentPipe("bg")(image.float(), 1.0, None, values=fixed)
    np.testing.assert_allclose(single[0, 0].numpy(), plain, atol=1e-4)


def test_warp_aligned_equals_warp_any() -> None:
    pipe = AugmentPipe("bg")
    drawn = pipe.draw(40, 0.6, torch.Generator().manual_seed(5))
    drawn["rotate"] = drawn["rotate_after"] = torch.zeros(40, dtype=torch.float64)
    inverse = inverse_map(drawn, 40, 16, 16)
    images = random_images(40, 2, 16, 16)
    torch.testing.assert_close(
        warp_aligned(images, inverse), warp_any(images, inverse), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["up", "down"])
@pytest.mark.parametrize("axis", [2, 3])
def test_resampling_in_blocks_equals_the_whole_matrix(kind: str, axis: int) -> None:
    n = 100
    matrix = axis_matrix(kind, n, torch.float64, torch.device("cpu"))
    images = random_images(1, 2, matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    whole = torch.einsum("rk,bckw->bcrw" if axis == 2 else "rk,bchk->bchr", matrix, images)
    torch.testing.assert_close(resample(images, kind, n, axis), whole)


def test_warp_of_one_image_does_not_change_another() -> None:
    pipe = AugmentPipe("bg")
    inverse = inverse_map(pipe.draw(12, 0.5, torch.Generator().manual_seed(2)), 12, 16, 16)
    images = random_images(12, 3, 16, 16)
    together = warp(images, inverse)
    for row in range(12):
        alone = warp(images[row : row + 1], inverse[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-6)


def test_pixel_blitting_is_flip_turn_and_shift() -> None:
    # sym6 is slightly asymmetric (its centre of mass is 0.1 taps off): equal up to 0.1 pixels.
    images, blit = smooth_images(2, 3, 128), AugmentPipe("blit")
    close = {"rtol": 0, "atol": 0.05}
    assert (
        min(
            (images - other).abs().max()
            for other in (images.flip(3), torch.rot90(images, 2, (2, 3)))
        )
        > 1
    )
    torch.testing.assert_close(
        blit(images, 1.0, None, values={"xflip": 1}), images.flip(3), **close
    )
    for turns in (1, 2, 3):
        torch.testing.assert_close(
            blit(images, 1.0, None, values={"rotate90": turns}),
            torch.rot90(images, turns, (2, 3)),
            **close,
        )


@given(st.integers(-40, 40), st.integers(-40, 40))
@settings(max_examples=25)
def test_integer_shift_moves_mirrored_pixels_exactly(x: int, y: int) -> None:
    images = random_images(1, 2, 16, 16)
    shifted = AugmentPipe("blit")(
        images, 1.0, None, values={"xint": torch.tensor([x / 16, y / 16])}
    )
    rows, columns = (mirrored(np.arange(16) - shift, 16) for shift in (y, x))
    torch.testing.assert_close(shifted, images[:, :, rows][:, :, :, columns], rtol=0, atol=5e-6)


def test_scaling_and_rotation_are_about_the_centre() -> None:
    size = 33
    axis = torch.arange(size).double() - 16
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def blob(at_x: float, at_y: float, wide: float = 9.0, high: float = 9.0) -> torch.Tensor:
        return torch.exp(-(x - at_x).square() / wide - (y - at_y).square() / high)[None, None]

    pipe, close = AugmentPipe("geom"), {"rtol": 0, "atol": 0.03}
    moved = {
        "scale": (1.5, blob(9.0, -3.0, 9 * 2.25, 9 * 2.25)),
        "aniso": (1.5, blob(9.0, -2 / 1.5, 9 * 2.25, 9 / 2.25)),
        "rotate": (math.pi / 2, blob(-2.0, -6.0)),  # counter-clockwise: from right to up
        "rotate_after": (-math.pi / 2, blob(2.0, 6.0)),
        "xfrac": (0.1, blob(6.0 + 3.3, -2.0 + 3.3)),
    }
    for name, (value, expected) in moved.items():
        torch.testing.assert_close(
            pipe(blob(6.0, -2.0), 1.0, None, values={name: value}), expected, msg=name, **close
        )


# --- filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taps", "moments"), [(SYM6, 6), (SYM2, 2)])
def test_wavelets_are_orthonormal_with_vanishing_moments(
    taps: tuple[float, ...], moments: int
) -> None:
    h = np.array(taps)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(len(h) // 2):
        assert (h[2 * shift :] * h[: len(h) - 2 * shift]).sum() == pytest.approx(
            float(shift == 0), abs=1e-11
        )
    n = np.arange(len(h))
    for power in range(moments):
        assert ((-1.0) ** n * (n / len(h)) ** power * h).sum() == pytest.approx(0.0, abs=1e-9)


def test_centre_tap_is_nearest_to_the_centre_of_mass() -> None:
    h = np.array(SYM6)
    assert round((np.arange(12) * h).sum() / h.sum()) == CENTRE_TAP


@pytest.mark.parametrize("n", [5, 16, 33])
def test_downsampling_undoes_upsampling(n: int) -> None:
    period = 4 * (n - 1)
    rows = np.arange(2 * n + 10) % period
    np.testing.assert_allclose(
        downsampling_matrix(n) @ upsampling_matrix(n)[rows], np.eye(n), atol=1e-10
    )


def test_bands_sum_to_one_and_pass_their_frequencies() -> None:
    bands = band_filters()
    centres = np.array([1 / 16, 3 / 16, 3 / 8, 3 / 4]) * math.pi
    total = np.zeros(max(map(len, bands)))
    for number, band in enumerate(bands):
        reach = len(band) // 2
        np.testing.assert_allclose(band, band[::-1], atol=1e-12)
        total[len(total) // 2 - reach : len(total) // 2 + reach + 1] += band
        response = np.cos(np.outer(centres, np.arange(-reach, reach + 1))) @ band
        assert response.argmax() == number
        assert response[number] > 0.6
    np.testing.assert_allclose(total, np.arange(len(total)) == len(total) // 2, atol=1e-12)


def test_filtering_is_a_mirrored_convolution() -> None:
    images = random_images(2, 1, 16, 24, dtype=torch.float64)
    amplification = torch.tensor([0.7, 1.6, 2.5, 0.3], dtype=torch.float64)
    gains = band_gains(amplification[None])[0].numpy()
    taps = np.zeros(43)
    for gain, band in zip(gains, band_filters(), strict=True):
        taps[21 - len(band) // 2 : 22 + len(band) // 2] += gain * band
    plain = ndimage.convolve1d(
        ndimage.convolve1d(images.numpy(), taps, axis=2, mode="mirror"), taps, axis=3, mode="mirror"
    )
    fast = AugmentPipe("filter")(images, 1.0, None, values={"filter": amplification})
    np.testing.assert_allclose(fast.numpy(), plain, atol=1e-10)


@given(st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4))
def test_amplified_bands_keep_the_expected_power(amplification: list[float]) -> None:
    alone = torch.ones(4, 4, dtype=torch.float64)
    alone.fill_diagonal_(0).add_(torch.diag(torch.tensor(amplification, dtype=torch.float64)))
    alone[alone == 0] = 1.0
    power = (torch.tensor(BAND_POWER, dtype=torch.float64) * band_gains(alone).square()).sum(dim=1)
    torch.testing.assert_close(power, torch.ones_like(power))
    whole = band_gains(torch.tensor([amplification], dtype=torch.float64))[0]
    torch.testing.assert_close(whole, band_gains(alone).prod(dim=0))


# --- colour --------------------------------------------------------------------------------------


def plain_color(rgb: np.ndarray, values: dict[str, float]) -> np.ndarray:
    """One colour (3,) through the transforms in turn, in homogeneous coordinates."""
    v = np.array([1.0, 1.0, 1.0]) / math.sqrt(3)
    x = rgb + values.get("brightness", 0.0)
    x = x * values.get("contrast", 1.0)
    if values.get("lumaflip", 0.0):
        x = x - 2 * v * (v @ x)
    angle = values.get("hue", 0.0)
    x = x * math.cos(angle) + np.cross(v, x) * math.sin(angle) + v * (v @ x) * (1 - math.cos(angle))
    return v * (v @ x) + (x - v * (v @ x)) * values.get("saturation", 1.0)


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "brightness": st.floats(-1, 1),
            "contrast": factors,
            "lumaflip": st.sampled_from([0.0, 1.0]),
            "hue": angles,
            "saturation": factors,
        },
    )
)
def test_colour_equals_its_definition(values: dict[str, float]) -> None:
    images = random_images(2, 3, 4, 5)
    fast = AugmentPipe("color")(images, 1.0, None, values=values).numpy()  # type: ignore[arg-type]
    plain = np.apply_along_axis(plain_color, 1, images.double().numpy(), values)
    np.testing.assert_allclose(fast, plain, atol=1e-5)


def test_grey_images_use_the_grey_part_of_colour() -> None:
    images, color = random_images(3, 1, 16, 16), AugmentPipe("color")
    expected = {
        "brightness": (0.3, images + 0.3),
        "contrast": (1.7, images * 1.7),
        "lumaflip": (1.0, -images),
        "hue": (2.0, images),
        "saturation": (3.0, images),
    }
    for name, (value, result) in expected.items():
        torch.testing.assert_close(
            color(images, 1.0, None, values={name: value}), result, rtol=0, atol=1e-6, msg=name
        )


def test_grey_images_equal_rgb_with_equal_channels() -> None:
    images = random_images(16, 1, 16, 16)
    grey = AugmentPipe("bgc")(images, 0.8, torch.Generator().manual_seed(4))
    rgb = AugmentPipe("bgc")(images.expand(-1, 3, -1, -1), 0.8, torch.Generator().manual_seed(4))
    torch.testing.assert_close(rgb, grey.expand(-1, 3, -1, -1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_colour_refuses_two_channels_even_at_p_0(p: float) -> None:
    with pytest.raises(ConfigError, match="1 or 3 channels, not 2"):
        AugmentPipe("bgc")(random_images(2, 2, 16, 16), p)
    assert AugmentPipe("bg")(random_images(2, 2, 16, 16), p).shape == (2, 2, 16, 16)


# --- noise and cut-out ---------------------------------------------------------------------------


def test_noise_has_the_given_standard_deviation() -> None:
    images = random_images(3, 3, 32, 32)
    sigma = torch.tensor([0.0, 0.05, 0.2])
    added = (
        AugmentPipe("noise")(images, 1.0, torch.Generator().manual_seed(0), values={"noise": sigma})
        - images
    )
    assert torch.equal(added[0], torch.zeros(3, 32, 32))
    torch.testing.assert_close(added.flatten(1).std(dim=1), sigma, rtol=0.05, atol=0)
    assert abs(np.corrcoef(added[2].flatten(1).numpy())[0, 1]) < 0.1


def test_cutout_clears_half_the_width_and_height() -> None:
    images = torch.ones(3, 2, 16, 16)
    where = torch.tensor([[1.0, 0.5, 0.5], [1.0, 0.0, 1.0], [0.0, 0.5, 0.5]])
    result = AugmentPipe("cutout")(images, 1.0, None, values={"cutout": where})
    expected = torch.ones(3, 2, 16, 16)
    expected[0, :, 4:12, 4:12] = 0
    expected[1, :, 12:, :4] = 0
    assert torch.equal(result, expected)


# --- draws ---------------------------------------------------------------------------------------

DRAWS = 20_000


def within_binomial_bounds(hits: int, p: float, draws: int = DRAWS) -> bool:
    low, high = stats.binom.interval(1 - 1e-6, draws, p)
    return low <= hits <= high


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    return AugmentPipe("bgcfnc").draw(DRAWS, 0.3, torch.Generator().manual_seed(11))


def test_each_transform_is_active_with_probability_p(drawn: dict[str, torch.Tensor]) -> None:
    shares = {
        "xflip": 0.15,
        "lumaflip": 0.15,
        "rotate90": 0.225,
        "rotate": 1 - math.sqrt(0.7),
        "rotate_after": 1 - math.sqrt(0.7),
    }
    for name, value in drawn.items():
        columns = value.reshape(DRAWS, -1)[:, : 4 if name == "filter" else 1]
        for column in columns.T:
            touched = int((column != NEUTRAL.get(name, 0.0)).sum())
            assert within_binomial_bounds(touched, shares.get(name, 0.3)), name


def test_rotation_is_active_with_probability_p(drawn: dict[str, torch.Tensor]) -> None:
    assert within_binomial_bounds(
        int(((drawn["rotate"] != 0) | (drawn["rotate_after"] != 0)).sum()), 0.3
    )


def test_numbers_of_a_transform_share_one_gate_except_bands(
    drawn: dict[str, torch.Tensor],
) -> None:
    for name in ("xint", "xfrac", "cutout"):
        touched = drawn[name] != 0
        assert torch.equal(touched.any(dim=1), touched.all(dim=1)), name
    bands = (drawn["filter"] != 1).sum(dim=1)
    assert within_binomial_bounds(int((bands == 0).sum()), 0.7**4)


def test_transforms_are_active_independently(drawn: dict[str, torch.Tensor]) -> None:
    touched = np.stack(
        [
            (drawn[name] != NEUTRAL.get(name, 0.0)).numpy()
            for name in ("scale", "aniso", "contrast", "hue", "noise")
        ]
    )
    correlations = np.corrcoef(touched)[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(DRAWS)


def test_strengths_follow_the_papers_distributions() -> None:
    drawn = AugmentPipe("bgcfnc").draw(2 * DRAWS, 1.0, torch.Generator().manual_seed(12))
    whole_turn = stats.uniform(-math.pi, 2 * math.pi)
    expected = {
        "xint": (drawn["xint"], stats.uniform(-0.125, 0.25)),
        "scale": (drawn["scale"].log2(), stats.norm(0, 0.2)),
        "rotate": (drawn["rotate"], whole_turn),
        "rotate_after": (drawn["rotate_after"], whole_turn),
        "aniso": (drawn["aniso"].log2(), stats.norm(0, 0.2)),
        "xfrac": (drawn["xfrac"], stats.norm(0, 0.125)),
        "brightness": (drawn["brightness"], stats.norm(0, 0.2)),
        "contrast": (drawn["contrast"].log2(), stats.norm(0, 0.5)),
        "hue": (drawn["hue"], whole_turn),
        "saturation": (drawn["saturation"].log2(), stats.norm(0, 1)),
        "filter": (drawn["filter"].log2(), stats.norm(0, 1)),
        "noise": (drawn["noise"], stats.halfnorm(0, 0.1)),
        "cutout": (drawn["cutout"][:, 1:], stats.uniform(0, 1)),
    }
    for name, (sample, distribution) in expected.items():
        for column in sample.reshape(len(sample), -1).T:
            assert stats.kstest(column.numpy(), distribution.cdf).pvalue > 1e-4, name
    assert set(drawn["rotate90"].tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert within_binomial_bounds(int(drawn["xflip"].sum()), 0.5, 2 * DRAWS)
    assert within_binomial_bounds(int((drawn["rotate90"] == 3).sum()), 0.25, 2 * DRAWS)


def test_the_two_axes_are_shifted_independently() -> None:
    drawn = AugmentPipe("bg").draw(4000, 1.0, torch.Generator().manual_seed(13))
    for name in ("xint", "xfrac"):
        assert abs(np.corrcoef(drawn[name].T.numpy())[0, 1]) < 0.1


@pytest.mark.parametrize("pipe", PIPES)
def test_generator_state_determines_the_augmented_images(
    pipe: str,
) -> None:
    images, augment = random_images(6, 3, 16, 16), AugmentPipe(pipe)
    generator = torch.Generator().manual_seed(9)
    own = torch.get_rng_state()
    augment(images, 0.7, generator)
    middle = generator.get_state()
    second = augment(images, 0.7, generator)
    resumed = torch.Generator()
    resumed.set_state(middle)
    assert torch.equal(augment(images, 0.7, resumed), second)
    assert torch.equal(torch.get_rng_state(), own)
    assert not torch.equal(second, images)


@pytest.mark.parametrize("pipe", ["bgc", "bgcfnc"])
def test_number_of_draws_does_not_depend_on_p(pipe: str) -> None:
    states = []
    for p in (0.01, 0.5, 1.0):
        generator = torch.Generator().manual_seed(9)
        AugmentPipe(pipe)(random_images(4, 3, 16, 16), p, generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


# --- gradients, types, refusals ------------------------------------------------------------------


def test_gradients_match_finite_differences() -> None:
    images = random_images(3, 3, 5, 5, dtype=torch.float64).requires_grad_(True)
    still, scaled, turned = 0, 1, 2
    values: dict[str, float | torch.Tensor] = {
        "scale": torch.ones(3).index_fill(0, torch.tensor([scaled, turned]), 1.2),
        "rotate90": torch.zeros(3).index_fill(0, torch.tensor([scaled]), 1.0),
        "rotate": torch.zeros(3).index_fill(0, torch.tensor([turned]), 0.7),
        "brightness": 0.2,
        "contrast": 1.3,
        "hue": 1.0,
        "saturation": 0.6,
    }
    augment = AugmentPipe("bgc")
    geometry = AugmentPipe("bg")(
        images, 1.0, None, values={k: v for k, v in values.items() if k not in COLOR}
    )
    assert torch.equal(geometry[still], images[still])
    assert torch.autograd.gradcheck(lambda x: augment(x, 1.0, None, values=values), (images,))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pipe", PIPES)
def test_every_pipe_is_differentiable(pipe: str, channels: int) -> None:
    images = random_images(8, channels, 16, 16).requires_grad_(True)
    result = AugmentPipe(pipe)(images, 0.9, torch.Generator().manual_seed(1))
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    result.square().sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert (images.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_autocast_and_bfloat16_use_float32() -> None:
    images, augment = random_images(8, 3, 16, 16).bfloat16(), AugmentPipe("bgcf")
    exact = augment(images.float(), 0.8, torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = augment(images.float(), 0.8, torch.Generator().manual_seed(2))
        half = augment(images, 0.8, torch.Generator().manual_seed(2))
    assert torch.equal(under_autocast, exact)
    assert torch.equal(half, exact.bfloat16())


def test_matrices_of_inference_mode_support_backward() -> None:
    images = random_images(2, 3, 14, 14)  # a size that no other test uses
    with torch.inference_mode():
        AugmentPipe("bgcf")(images, 1.0, torch.Generator().manual_seed(1))
    images.requires_grad_(True)
    AugmentPipe("bgcf")(images, 1.0, torch.Generator().manual_seed(1)).sum().backward()
    assert images.grad is not None


def test_channels_last_images_give_the_same_result() -> None:
    images = random_images(6, 3, 16, 16)
    plain, last = (
        AugmentPipe("bgcfnc")(x, 0.8, torch.Generator().manual_seed(1))
        for x in (images, images.contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(plain, last, rtol=0, atol=1e-5)


def test_invalid_arguments_raise_config_error() -> None:
    images = random_images(2, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"augment\.pipe = 'bgx' must be one of"):
        AugmentPipe("bgx")
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="must be from 0 to 1"):
            AugmentPipe("bgc")(images, p)
    with pytest.raises(ConfigError, match="has no quantity 'hue'"):
        AugmentPipe("bg")(images, 1.0, None, values={"hue": 1.0})
    with pytest.raises(ConfigError, match=r"\(B, C, H, W\)"):
        AugmentPipe("bg")(images[0], 1.0)
