"""Contribution of hospitals: the axioms of the Shapley value, and missing coalitions."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.errors import ConfigError
from fedgan.evaluation.arms.contribution import contribution, leave_one_out, shapley

NAMES = "abcdef"
VALUES = st.floats(0, 1)


def _coalitions(count):
    return [
        frozenset(chosen)
        for size in range(1, count + 1)
        for chosen in combinations(NAMES[:count], size)
    ]


@st.composite
def games(draw, most=4):
    keys = _coalitions(draw(st.integers(1, most)))
    return dict(
        zip(keys, draw(st.lists(VALUES, min_size=len(keys), max_size=len(keys))), strict=True)
    )


def _players(game):
    return sorted(frozenset().union(*game))


@settings(max_examples=60, deadline=None)
@given(games())
def test_shapley_is_the_mean_gain_over_all_orders(game):
    everyone, value = _players(game), {**game, frozenset(): 0.5}
    orders = list(permutations(everyone))
    for one, found in shapley(game).items():
        gains = [
            value[frozenset(order[: order.index(one) + 1])]
            - value[frozenset(order[: order.index(one)])]
            for order in orders
        ]
        assert found == pytest.approx(np.mean(gains), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(games(most=6), st.sampled_from([0.0, 0.5]))
def test_shapley_values_add_up_to_the_grand_coalition(game, empty):
    assert sum(shapley(game, empty).values()) == pytest.approx(
        game[frozenset(_players(game))] - empty, abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(games())
def test_symmetric_hospitals_have_equal_values(game):
    exchange = {"a": "b", "b": "a"}
    mirrored = {
        frozenset(exchange.get(one, one) for one in key): value for key, value in game.items()
    }
    if len(_players(game)) < 2:
        return
    alike = {key: (value + mirrored[key]) / 2 for key, value in game.items()}
    shares = shapley(alike)
    assert shares["a"] == pytest.approx(shares["b"], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(games(most=3), VALUES)
def test_hospital_with_a_constant_gain_has_that_value(game, gift):
    bigger = {
        **game,
        frozenset("z"): 0.5 + gift,
        **{key | {"z"}: value + gift for key, value in game.items()},
    }
    shares = shapley(bigger)
    assert shares.pop("z") == pytest.approx(gift, abs=1e-12)
    assert shares == pytest.approx(shapley(game), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_shapley_is_additive(data, count):
    keys = _coalitions(count)
    first, second = (
        dict(
            zip(
                keys,
                data.draw(st.lists(VALUES, min_size=len(keys), max_size=len(keys))),
                strict=True,
            )
        )
        for _ in "ab"
    )
    together = shapley({key: first[key] + second[key] for key in keys}, empty=1.0)
    apart = [shapley(game) for game in (first, second)]
    assert together == pytest.approx(
        {one: apart[0][one] + apart[1][one] for one in together}, abs=1e-12
    )


def test_leave_one_out_is_the_loss_without_each_hospital():
    game = {
        frozenset("abc"): 0.9,
        frozenset("bc"): 0.7,
        frozenset("ac"): 0.85,
        frozenset("ab"): 0.92,
    }
    assert leave_one_out(game) == pytest.approx({"a": 0.2, "b": 0.05, "c": -0.02})
    assert leave_one_out({frozenset("a"): 0.8}) == pytest.approx(
        {"a": 0.3}
    )  # a single hospital is compared with chance


def test_arrays_give_the_same_as_single_values():
    rng = np.random.default_rng(0)
    draws = {key: rng.random(50) for key in _coalitions(3)}
    for function in (leave_one_out, shapley):
        whole = function(draws)
        for row in (0, 31):
            single = function({key: float(value[row]) for key, value in draws.items()})
            assert {one: value[row] for one, value in whole.items()} == pytest.approx(single)


@pytest.mark.parametrize("function", [leave_one_out, shapley])
def test_missing_coalition_is_named(function):
    game = dict.fromkeys(_coalitions(3), 0.7)
    del game[frozenset("ca")]
    with pytest.raises(ConfigError, match=r"'a\+c' was not measured"):
        function(game)
    with pytest.raises(ConfigError, match="no coalition"):
        function({})


def test_six_hospitals_work_and_thirteen_are_refused():
    size = {key: len(key) / 6 for key in _coalitions(6)}
    assert shapley(size, empty=0.0) == pytest.approx(dict.fromkeys(NAMES, 1 / 6))
    with pytest.raises(ConfigError, match=r"2\^13"):
        shapley({frozenset([f"hospital {number}"]): 0.6 for number in range(13)})


def test_contribution_has_the_rows_of_the_report():
    point = {key: 0.5 + 0.1 * len(key) for key in _coalitions(3)}
    rng = np.random.default_rng(1)
    noise = rng.normal(scale=0.01, size=2000)
    draws = {key: value + (noise if len(key) == 3 else 0) for key, value in point.items()}
    table = contribution(point, draws, hospitals=("c", "a", "b"))
    assert (
        [row["hospital"] for row in table["leave_one_out"]]
        == [row["hospital"] for row in table["shapley"]]
        == ["c", "a", "b"]
    )
    first = table["leave_one_out"][0]
    assert (first["macro_auc_without"], first["loss"]) == pytest.approx((0.7, 0.1))
    assert first["ci"] == pytest.approx([0.1 - 0.0196, 0.1 + 0.0196], abs=0.002)
    assert table["shapley"][1]["value"] == pytest.approx(0.1)
    assert np.ptp(table["shapley"][1]["ci"]) == pytest.approx(np.ptp(first["ci"]) / 3)
    assert list(table["coalition_auc"]) == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
    assert table["empty_coalition_auc"] == 0.5
    assert table["notes"] == []


def test_contribution_notes_missing_coalitions():
    point = {key: 0.7 for key in _coalitions(3) if len(key) > 1}
    table = contribution(point)
    assert [row["ci"] for row in table["leave_one_out"]] == [None] * 3
    assert table["shapley"] is None
    assert table["notes"] == [
        "Shapley values need coalitions that were not measured: 'a', 'b', 'c'."
    ]
    point[frozenset("ab")] = None
    table = contribution(point, hospitals="abc")
    assert table["leave_one_out"] is None
    assert "'a+b'" in table["notes"][0]
    assert "a+b" not in table["coalition_auc"]
    with pytest.raises(ConfigError, match=r"'a\+c' has a hospital that is none of a, b"):
        contribution(point, hospitals="ab")
