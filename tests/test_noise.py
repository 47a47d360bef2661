"""ChaCha20's key stream, normal numbers from it, and the grid of a release."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedgan.privacy.noise import BLOCK, KeyStream, Purpose, grid, release

KEY = bytes(range(32))


@pytest.mark.parametrize(
    ("number", "begin", "end"),
    [
        # RFC 8439, appendix A.1, vectors 1 and 5: zero key, block 0, nonces 0 and 0 … 02
        (0, "76b8e0ada0f13d90405d6ae55386bd28", "6a43b8f41518a11cc387b669b2ee6586"),
        (2 << 56, "c2c64d378cd536374ae204b9ef933fcd", "f75f8fc299e8148362fa198a39531bed6d"[2:]),
    ],
)
def test_key_stream_is_that_of_the_standard(number, begin, end):
    block = KeyStream(bytes(32), number, 0).words(8).numpy().tobytes().hex()
    assert (block[:32], block[-32:]) == (begin, end)


def test_normal_numbers_follow_their_distribution():
    count = 4_000_001
    found = KeyStream(KEY, 1, Purpose.NOISE).normal((count,)).numpy()
    assert abs(found.mean()) < 5 / math.sqrt(count)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], count) / count
    assert low < np.mean(found**2) < high
    assert stats.kstest(found[:200_000], "norm").pvalue > 1e-5
    for edge in (3.0, 4.0, 4.7):
        for tail in (found > edge, found < -edge):
            share = stats.norm.sf(edge)
            assert stats.binomtest(int(tail.sum()), count, share).pvalue > 1e-6, edge
    # the two numbers of a pair, and neighbours
    for distance in (1, BLOCK // 2):
        product = found[:-distance] * found[distance:]
        assert abs(product.mean()) < 5 / math.sqrt(count)


def test_radius_has_more_bits_than_a_double_near_one():
    """With 53 bits the largest number would be 8.6; rare words must reach further."""

    class Rare(KeyStream):
        def words(self, count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64)

    assert float(Rare(KEY, 0, 1).normal((2,)).max()) == pytest.approx(12.18, abs=0.01)


def test_key_streams_differ_by_key_number_and_purpose():
    streams = [
        KeyStream(KEY, 1, Purpose.NOISE),
        KeyStream(KEY, 2, Purpose.NOISE),
        KeyStream(KEY, 1, Purpose.SAMPLE),
        KeyStream(KEY[::-1], 1, Purpose.NOISE),
    ]
    found = np.stack([stream.normal((20_000,)).numpy() for stream in streams])
    between = np.corrcoef(found)[~np.eye(4, dtype=bool)]
    assert np.abs(between).max() < 6 / math.sqrt(20_000)
    again = KeyStream(KEY, 1, Purpose.NOISE)
    assert np.array_equal(again.normal((20_000,)).numpy(), found[0])
    assert not np.array_equal(again.normal((20_000,)).numpy(), found[0])  # it goes on


@given(
    st.floats(1e-6, 1e6), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), st.integers(0, 99)
)
def test_release_is_the_nearest_multiple_of_a_power_of_two(deviation, terms, number):
    total = torch.tensor(terms, dtype=torch.float64) * deviation
    draws = KeyStream(KEY, number, Purpose.NOISE).normal((len(terms),))
    found, spacing = release(total, draws, deviation), grid(deviation)
    assert math.frexp(spacing)[0] == 0.5
    assert deviation * 2.0**-21 < spacing <= deviation * 2.0**-20
    assert bool((found / spacing == (found / spacing).round()).all())
    assert float((found - total - draws * deviation).abs().max()) <= spacing * (0.5 + 1e-6)
    near = found[found.abs() <= 8 * deviation]
    assert torch.equal(near.float().double(), near)  # no bit is lost in float32


def test_release_without_noise_is_the_sum():
    total = torch.tensor([0.1, 1e-9], dtype=torch.float64)
    assert torch.equal(release(total, torch.ones(2), 0.0), total)
