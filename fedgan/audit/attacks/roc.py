"""How well scores tell members from non-members, with intervals: arrays of scores in, numbers out.

An image counts as often as its weight says, so that one sweep over the sorted scores serves the figure itself (all
weights 1) and every resample of the bootstrap.
"""

from __future__ import annotations

import numpy as np


def roc_figures(
    members: np.ndarray,
    non_members: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    rates: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """AUC (B,) and true-positive rates (B, R) at the false-positive rates `rates`, of scores that are higher for members.

    `members` (M,), `non_members` (M',) scores; `weights` (B, M) and (B, M'): how often each image counts. AUC is the
    probability that a member has the higher score, ties half (Mann-Whitney). The rate at x is the highest one of a
    threshold whose false-positive rate is x at most: nothing is interpolated, for an attacker cannot use half a threshold
    (arXiv 2112.03570 reports membership attacks so).
    """
    scores = np.concatenate([members, non_members])
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(
        np.append(np.diff(scores[order]) != 0, True)
    )  # the last of each run of equal scores
    count = len(weights[0])
    hits = np.concatenate([weights[0], np.zeros((count, len(non_members)))], 1)[:, order].cumsum(1)[
        :, ends
    ]
    alarms = np.concatenate([np.zeros((count, len(members))), weights[1]], 1)[:, order].cumsum(1)[
        :, ends
    ]
    hits, alarms = (np.concatenate([np.zeros((count, 1)), part], 1) for part in (hits, alarms))
    area = (np.diff(alarms, axis=1) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(1)
    auc = area / (hits[:, -1] * alarms[:, -1])
    found = []
    for rate in rates:
        # Both curves rise, so the last threshold that is still allowed is the best one.
        last = (alarms <= rate * alarms[:, -1:] + 1e-9).sum(1) - 1
        found.append(hits[np.arange(count), last] / hits[:, -1])
    return auc, np.stack(found, 1) if found else np.empty((count, 0))
