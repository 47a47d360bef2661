"""Apportionment by largest remainders: sums, bounds, minima and ties."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgan.apportion import apportion, limit_shares

WEIGHTS = st.lists(st.fractions(0, 1000), min_size=1, max_size=12).filter(any)


@given(st.integers(0, 20_000), WEIGHTS)
def test_counts_sum_to_the_total_within_one_of_their_shares(
    total: int, weights: list[Fraction]
) -> None:
    exact = [total * weight / sum(weights) for weight in weights]
    counts = apportion(exact, total)
    assert sum(counts) == total
    for count, share in zip(counts, exact, strict=True):
        assert abs(count - share) < 1
        assert share > 0 or count == 0


@given(st.integers(0, 300), st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_no_count_is_below_the_minimum(extra: int, weights: list[int]) -> None:
    total = len(weights) + extra
    exact = [total * weight / sum(weights) for weight in weights]
    counts = apportion(exact, total, minimum=1)
    assert sum(counts) == total
    assert min(counts) >= 1
    assert all(count <= max(1, share + 1) for count, share in zip(counts, exact, strict=True))
    for heavy, light in itertools.pairwise(weights):
        first, second = counts[weights.index(heavy)], counts[weights.index(light)]
        assert heavy < light or first >= second


@pytest.mark.parametrize(
    ("exact", "total", "options", "counts"),
    [
        ([0.5, 0.5, 1.0], 2, {}, [1, 0, 1]),  # the first of equal remainders
        ([1.5, 1.5, 0.0], 3, {"minimum": 1}, [1, 1, 1]),
        ([2.6, 2.4, 0.0, 0.0], 5, {"minimum": 1}, [2, 1, 1, 1]),
        ([0.2, 0.8], 1, {"minimum": 1}, [1, 1]),  # no count can be reduced
        ([3.9999999999, 1.0000000001], 5, {"tolerance": 1e-9}, [4, 1]),
        ([3.0, 7.0, -2.0], 8, {"reduce_largest": True}, [3, 5, 0]),
        ([3.0, 7.0, -2.0], 8, {}, [2, 6, 0]),
        ([], 0, {}, []),
    ],
)
def test_ties_minima_and_negative_shares(
    exact: list[float], total: int, options: dict[str, float], counts: list[int]
) -> None:
    assert apportion(exact, total, **options) == counts


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    st.floats(0.5, 1.0),
)
def test_limit_of_shares_holds_and_changes_no_other(sizes: list[int], share: float) -> None:
    limited = limit_shares(sizes, share)
    others = len(sizes) - 1
    limit = share / (share + others * (1 - share))
    reduced = [after for before, after in zip(sizes, limited, strict=True) if after != before]
    assert all(after == max(reduced) for after in reduced)
    assert not reduced or max(limited) == max(reduced)
    if others:  # at least one image is left to each
        assert max(limited) <= max(1, limit * sum(limited) + 1)


def test_limit_of_shares_of_two_and_of_three() -> None:
    assert limit_shares([1_000_000, 3000], 0.9) == [27_000, 3000]
    assert limit_shares([1_000_000, 1000, 2000], 0.9) == [13_500, 1000, 2000]
    assert limit_shares([9, 1], 0.9) == [9, 1]
    assert limit_shares([20_000, 10_000, 2000], 0.9) == [20_000, 10_000, 2000]
    assert limit_shares([1_000_000, 1], 1.0) == [1_000_000, 1]
