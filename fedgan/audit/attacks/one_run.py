"""Lower bound of ε from one training run with canaries (arXiv 2305.08846).

m canaries are included in the training data by independent fair coins. After the run each gets a
score, higher for a suspected member. The auditor guesses "in" for the highest scores, "out" for the
lowest, and abstains in between (algorithm 1). (ε, δ)-privacy bounds the number of correct guesses,
so that many correct ones reject small ε.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.evaluation.metrics.intervals import LEVEL

GUESSED = (0.8, 0.5, 0.25)  # shares of the canaries that are guessed; the best one counts


@dataclass(frozen=True)
class CanaryFindings:
    """Result of one kind of canaries.

    `guesses` of `canaries` were made, `correct` of them; `epsilon_low`: lower bound of ε at `level`
    confidence and the δ that it was computed for.
    """

    canaries: int
    included: int
    guesses: int
    correct: int
    epsilon_low: float
    level: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """P(at least `correct` of `guesses` are correct), at most, under (ε, δ)-privacy.

    β + 2 m δ α (theorem 5.2, corollary 5.4), where W ~ Binomial(`guesses`, e^ε / (1 + e^ε)):

        β = P(W ≥ v),   α = max over i = 1 … v of P(v > W ≥ v - i) / i.

    m = `canaries` counts all coins, also those of canaries without a guess; v = `correct`.
    """
    from scipy.special import expit
    from scipy.stats import binom

    steps = np.arange(correct + 1)
    tails = binom.sf(correct - steps - 1, guesses, expit(epsilon))  # P(W ≥ v - i), i = 0 … v
    alpha = ((tails[1:] - tails[0]) / steps[1:]).max(initial=0.0)
    return float(min(1.0, tails[0] + 2 * canaries * delta * alpha))


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, level: float = LEVEL
) -> float:
    """The ε at δ up to which `p_value` rejects (ε, δ)-privacy at `level`; 0 where it rejects none.

    Raises `ValueError` unless 0 ≤ `correct` ≤ `guesses` ≤ `canaries`.
    """
    from scipy.optimize import brentq

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} correct of {guesses} guesses on {canaries} canaries")

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - (1 - level)

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:  # ends: all of W reaches v as ε grows
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-6))


def score_canaries(
    scores: np.ndarray, included: np.ndarray, delta: float, level: float = LEVEL
) -> CanaryFindings:
    """Guess canaries by `scores` (m,) and bound ε; `included` (m,) bool: their coins.

    The best of several numbers of guesses counts, each at a level that makes all of them hold
    together (Bonferroni). Raises `ValueError` for scores that are NaN.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores of canaries are not numbers")
    order, count = np.argsort(scores, kind="stable"), len(scores)
    single = 1 - (1 - level) / len(GUESSED)
    found = []
    for share in GUESSED:
        side = int(share * count / 2)
        correct = int(included[order[count - side :]].sum() + (~included[order[:side]]).sum())
        bound = epsilon_lower_bound(count, 2 * side, correct, delta, single)
        found.append(CanaryFindings(count, int(included.sum()), 2 * side, correct, bound, level))
    return max(found, key=lambda one: one.epsilon_low)
