"""What each hospital contributes: the loss without it, and its Shapley value over all coalitions of hospitals.

The value of a coalition is the macro AUC of classifiers trained on what its generator makes. Values are floats, or
arrays (B,) over the same bootstrap resamples of the test images: then so are the results, and they have intervals.
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

CHANCE = 0.5  # macro AUC of the empty coalition: no images, so scores without information
MOST_PLAYERS = 12  # 4,096 coalitions; each one is a training, so nobody gets there
Value = TypeVar("Value", float, np.ndarray)
Coalition = frozenset[str]


def leave_one_out(values: Mapping[Coalition, Value]) -> dict[str, Value]:
    """Loss v(all) − v(all but one) for each hospital, in order of name; positive: the federation is worse without it.

    `values` holds the coalition of all and each one that lacks a single hospital; others are not looked at. A hospital that
    is the only one is compared with chance, 0.5. Raises `ConfigError` that names a missing coalition.
    """
    everyone = players(values)
    table = {frozenset(): values.get(frozenset(), CHANCE), **values}
    full = frozenset(everyone)
    return {one: _value(table, full) - _value(table, full - {one}) for one in everyone}


def shapley(values: Mapping[Coalition, Value], empty: float = CHANCE) -> dict[str, Value]:
    """Exact Shapley value of each hospital, in order of name (Shapley 1953): its mean marginal gain over all orders of joining.

    `values` holds every coalition that is not empty (2^n − 1 of n hospitals); the empty one is worth `empty`, chance. The
    values add up to v(all) − `empty`. Raises `ConfigError` that names a missing coalition.
    """
    everyone = players(values)
    if len(everyone) > MOST_PLAYERS:
        raise ConfigError(
            f"exact Shapley values of {len(everyone)} hospitals take 2^{len(everyone)} trainings: leave them out"
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
    """The `contribution` of comparison.json: `leave_one_out`, `shapley` and `values` by coalition ("a+b").

    `values` gives the macro AUC of each coalition (None counts as not measured), `draws` (B,) arrays of it over the same
    resamples (`paired.bootstrap_auc`) for the intervals; `hospitals` the order of the rows and who belongs to the coalition
    of all. What lacks a coalition is None, with a sentence in `notes` that names it. Intervals speak of the test images, not
    of training again. Raises `ConfigError` for a coalition with a hospital that is none of `hospitals`.
    """
    measured = {key: value for key, value in values.items() if value is not None}
    order = list(hospitals) or players(values)
    grand = frozenset(order)
    stranger = next((key for key in values if not key <= grand), None)
    if stranger is not None:
        raise ConfigError(
            f"the coalition '{title(stranger)}' has a hospital that is none of {', '.join(order)}: name them all"
        )
    notes: list[str] = []
    return {
        "leave_one_out": _without(measured, draws or {}, order, notes),
        "shapley": _shares(measured, draws or {}, order, empty, notes),
        "values": {
            title(key): finite_or_none(measured[key])
            for key in sorted(measured, key=lambda key: (len(key), sorted(key)))
        },
        "empty": empty,
        "notes": notes,
    }


def players(values: Mapping[Coalition, Any]) -> list[str]:
    """All hospitals that occur in a coalition, in order of name. Raises `ConfigError` when there is none."""
    found = sorted(frozenset().union(*values))
    if not found:
        raise ConfigError(
            "no coalition of hospitals was measured: add 'coalitions' to comparison.arms"
        )
    return found


def title(coalition: Coalition) -> str:
    """A coalition as text: its hospitals in order of name, "a+b"."""
    return "+".join(sorted(coalition))


def _without(
    values: Mapping[Coalition, float],
    draws: Mapping[Coalition, np.ndarray],
    order: list[str],
    notes: list[str],
) -> Any:
    grand = frozenset(order)
    needed = [grand, *(grand - {one} for one in order if len(order) > 1)]
    if missing := _missing(values, needed):
        notes.append(
            f"The loss without each hospital needs coalitions that were not measured: {_quoted(missing)}."
        )
        return None
    loss = leave_one_out({key: values[key] for key in needed})
    drawn = (
        leave_one_out({key: draws[key] for key in needed}) if not _missing(draws, needed) else {}
    )
    return [
        {
            "hospital": one,
            "macro_auc_without": finite_or_none(values.get(grand - {one}, CHANCE)),
            "loss": finite_or_none(loss[one]),
            "ci": interval(drawn[one]) if one in drawn else None,
        }
        for one in order
    ]


def _shares(
    values: Mapping[Coalition, float],
    draws: Mapping[Coalition, np.ndarray],
    order: list[str],
    empty: float,
    notes: list[str],
) -> Any:
    needed = [
        frozenset(chosen)
        for size in range(1, len(order) + 1)
        for chosen in combinations(order, size)
    ]
    if missing := _missing(values, needed):
        notes.append(f"Shapley values need coalitions that were not measured: {_quoted(missing)}.")
        return None
    exact = shapley({key: values[key] for key in needed}, empty)
    drawn = (
        shapley({key: draws[key] for key in needed}, empty) if not _missing(draws, needed) else {}
    )
    return [
        {
            "hospital": one,
            "value": finite_or_none(exact[one]),
            "ci": interval(drawn[one]) if one in drawn else None,
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
            f"the coalition '{title(coalition)}' was not measured, and the contribution of a hospital needs it: "
            "add 'coalitions' to comparison.arms, or mend the arm that failed"
        )
    return values[coalition]
