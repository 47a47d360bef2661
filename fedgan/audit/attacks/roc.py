"""ROC figures of membership scores, weighted for the bootstrap."""

from __future__ import annotations

import numpy as np


def roc_figures(
    members: np.ndarray,
    non_members: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    rates: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """AUC (B,) and true-positive rates (B, R) at the false-positive rates `rates`.

    `members` (M,), `non_members` (N,): scores, higher for members. `weights` (B, M) and (B, N): how
    often each image counts (all 1, or bootstrap resamples). AUC is P(member score > non-member
    score), ties half (Mann-Whitney). The rate at x is the highest one of a threshold with a
    false-positive rate of at most x, without interpolation, because an attacker cannot use a
    fraction of a threshold (reported like this for membership attacks in arXiv 2112.03570).
    """
    scores = np.concatenate([members, non_members])
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # last of equal scores
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
        # Both curves increase, so the last allowed threshold is the best one.
        last = (alarms <= rate * alarms[:, -1:] + 1e-9).sum(1) - 1
        found.append(hits[np.arange(count), last] / hits[:, -1])
    return auc, np.stack(found, 1) if found else np.empty((count, 0))
