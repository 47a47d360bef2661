"""Contribution of each hospital: leave-one-out loss, and Shapley value over all coalitions.

The value of a coalition is the macro AUC of classifiers trained on its generator's images. Values
are floats, or arrays (B,) over the same bootstrap resamples of the test images: then the results
are arrays too, which give intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import factorial
from typing import Any, TypeVar

import numpy as np

from fedgan.errors import ConfigError
from fedgan.evaluation.metrics.bootstrap import interval
from fedgan.evaluation.metrics.utility import finite_or_none

CHANCE = 0.5  # macro AUC of the empty coalition: no images, scores without information
MOST_PLAYERS = 12  # 4,096 coalitions, each a training
Value = TypeVar("Value", float, np.ndarray)
Coalition = frozenset[str]


def leave_one_out(values: Mapping[Coalition, Value]) -> dict[str, Value]:
    """Loss v(all) − v(all but one) per hospital, by name; positive: worse without the hospital.

    `values` holds the coalition of all, and each one without a single hospital; others are ignored.
    A single hospital is compared with chance, 0.5. Raises `ConfigError` that names a missing
    coalition.
    """
    everyone = players(values)
    table = {frozenset(): values.get(frozenset(), CHANCE), **values}
    full = frozenset(everyone)
    return {one: _value(table, full) - _value(table, full - {one}) for one in everyone}


def shapley(values: Mapping[Coalition, Value], empty: float = CHANCE) -> dict[str, Value]:
    """Exact Shapley value per hospital, by name: mean marginal gain over all orders (Shapley 1953).

    `values` holds every non-empty coalition (2^n − 1 of n hospitals); the empty one has the value
    `empty`. The results add up to v(all) − `empty`. Raises `ConfigError` that names a missing
    coalition.
    """
    everyone = players(values)
    if len(everyone) > MOST_PLAYERS:
        raise ConfigError(
            f"exact Shapley values of {len(everyone)} hospitals need 2^{len(everyone)} trainings: "
            "leave them out"
        )
    table: dict[Coalition, Any] = {**values, frozenset(): empty}
    count = len(everyone)
    result: dict[str, Any] = {}
    for one in everyone:
        others = [other for other in everyone if other != one]
        total: Any = 0.0
        for size in range(count):
            share = factorial(size) * factorial(count - size - 1) / factorial(count)
            for chosen in combinations(others, size):
                before = frozenset(chosen)
                total = total + share * (_value(table, before | {one}) - _value(table, before))
        result[one] = total
    return result


def contribution(
    values: Mapping[Coalition, float | None],
    draws: Mapping[Coalition, np.ndarray] | None = None,
    hospitals: Sequence[str] = (),
    empty: float = CHANCE,
) -> dict[str, Any]:
    """`contribution` of comparison.json: `leave_one_out`, `shapley`, `coalition_auc` ("a+b").

    `values`: macro AUC per coalition (None: not measured). `draws`: arrays (B,) of it over the same
    resamples (`paired.bootstrap_auc`), for the intervals. `hospitals`: order of the rows, and the
    coalition of all. A result without all its coalitions is None, and a sentence in `notes` names
    them. Intervals are over test images, not over trainings. Raises `ConfigError` for a coalition
    with a hospital that is not in `hospitals`.
    """
    measured = {key: value for key, value in values.items() if value is not None}
    order = list(hospitals) or players(values)
    grand = frozenset(order)
    unknown = next((key for key in values if not key <= grand), None)
    if unknown is not None:
        raise ConfigError(
            f"the coalition '{title(unknown)}' has a hospital that is none of {', '.join(order)}: "
            "name them all"
        )
    notes: list[str] = []
    keys = sorted(measured, key=lambda key: (len(key), sorted(key)))
    return {
        "leave_one_out": _leave_one_out_rows(measured, draws or {}, order, notes),
        "shapley": _shapley_rows(measured, draws or {}, order, empty, notes),
        "coalition_auc": {title(key): finite_or_none(measured[key]) for key in keys},
        "empty_coalition_auc": empty,
        "notes": notes,
    }


def players(values: Mapping[Coalition, Any]) -> list[str]:
    """All hospitals of the coalitions, by name. Raises `ConfigError` when there is none."""
    found = sorted(frozenset().union(*values))
    if not found:
        raise ConfigError(
            "no coalition of hospitals was measured: add 'coalitions' to comparison.arms"
        )
    return found


def title(coalition: Coalition) -> str:
    """A coalition as text: its hospitals by name, "a+b"."""
    return "+".join(sorted(coalition))


def _leave_one_out_rows(
    values: Mapping[Coalition, float],
    draws: Mapping[Coalition, np.ndarray],
    order: list[str],
    notes: list[str],
) -> list[dict[str, Any]] | None:
    grand = frozenset(order)
    needed = [grand, *(grand - {one} for one in order if len(order) > 1)]
    if missing := _missing(values, needed):
        notes.append(
            "The loss without each hospital needs coalitions that were not measured: "
            f"{_quoted(missing)}."
        )
        return None
    loss = leave_one_out({key: values[key] for key in needed})
    has_draws = not _missing(draws, needed)
    resampled = leave_one_out({key: draws[key] for key in needed}) if has_draws else {}
    return [
        {
            "hospital": one,
            "macro_auc_without": finite_or_none(values.get(grand - {one}, CHANCE)),
            "loss": finite_or_none(loss[one]),
            "ci": interval(resampled[one]) if has_draws else None,
        }
        for one in order
    ]


def _shapley_rows(
    values: Mapping[Coalition, float],
    draws: Mapping[Coalition, np.ndarray],
    order: list[str],
    empty: float,
    notes: list[str],
) -> list[dict[str, Any]] | None:
    needed = [
        frozenset(chosen)
        for size in range(1, len(order) + 1)
        for chosen in combinations(order, size)
    ]
    if missing := _missing(values, needed):
        notes.append(f"Shapley values need coalitions that were not measured: {_quoted(missing)}.")
        return None
    exact = shapley({key: values[key] for key in needed}, empty)
    has_draws = not _missing(draws, needed)
    resampled = shapley({key: draws[key] for key in needed}, empty) if has_draws else {}
    return [
        {
            "hospital": one,
            "value": finite_or_none(exact[one]),
            "ci": interval(resampled[one]) if has_draws else None,
        }
        for one in order
    ]


def _missing(values: Mapping[Coalition, Any], needed: Sequence[Coalition]) -> list[Coalition]:
    return [key for key in needed if key not in values]


def _quoted(coalitions: Sequence[Coalition]) -> str:
    return ", ".join(f"'{title(key)}'" for key in coalitions)


def _value(values: Mapping[Coalition, Any], coalition: Coalition) -> Any:
    if coalition not in values:
        raise ConfigError(
            f"the coalition '{title(coalition)}' was not measured, and the contribution of a "
            "hospital needs it: add 'coalitions' to comparison.arms, or fix the arm that failed"
        )
    return values[coalition]
