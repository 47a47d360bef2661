"""Accountants against dp-accounting and closed forms; searches for noise and steps."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from fedgan.errors import ConfigError
from fedgan.privacy import accountants
from fedgan.privacy.accounting import (
    Mechanism,
    epsilon_of,
    epsilon_prv,
    epsilon_rdp,
    joint_noise,
    merge,
    noise_for,
    steps_within,
)

N = 3773
LONG = Mechanism(0.667, 1 / N, 2_400_000)
PHASES = (
    Phase.explicit,
    Phase.generate,
)  # examples are slow: do not shrink
QUICK = settings(max_examples=8, deadline=None, derandomize=True, phases=PHASES)

noises = st.floats(0.5, 8.0)
rates = st.floats(0.001, 0.9)
steps_ = st.integers(1, 3000)
deltas = st.floats(1e-6, 1e-2)
parts_ = st.lists(
    st.builds(Mechanism, noises, rates | st.just(1.0), st.integers(0, 300)), max_size=3
)


def event(parts: list[Mechanism]) -> dp_event.DpEvent:
    """The same mechanisms as dp-accounting events."""
    return dp_event.ComposedDpEvent(
        [
            dp_event.SelfComposedDpEvent(
                dp_event.PoissonSampledDpEvent(
                    part.sample_rate, dp_event.GaussianDpEvent(part.noise_multiplier)
                ),
                part.steps,
            )
            for part in parts
        ]
    )


def pld_epsilon(parts: list[Mechanism], delta: float, width: float, pessimistic: bool) -> float:
    """ε by dp-accounting's privacy loss distributions (add and remove): upper or lower bound."""
    total = None
    for part in parts:
        single = pld.from_gaussian_mechanism(
            part.noise_multiplier,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=width,
            sampling_prob=part.sample_rate,
            use_connect_dots=pessimistic,
        )
        composed = single.self_compose(part.steps)
        total = composed if total is None else total.compose(composed)
    return float(total.get_epsilon_for_delta(delta))


def exact_epsilon(noise: float, q: float, delta: float) -> float:
    """ε of one sampled step from δ(ε) of its two densities; the larger of add and remove."""

    def removed(epsilon: float) -> float:
        x = (
            noise**2 * math.log((math.expm1(epsilon) + q) / q) + 0.5
        )  # the density ratio is e^ε there
        return (
            q * norm.sf((x - 1) / noise)
            + (1 - q) * norm.sf(x / noise)
            - math.exp(epsilon) * norm.sf(x / noise)
        )

    def added(epsilon: float) -> float:
        if math.exp(-epsilon) <= 1 - q:
            return 0.0
        x = noise**2 * math.log((math.expm1(-epsilon) + q) / q) + 0.5
        return norm.cdf(x / noise) - math.exp(epsilon) * (
            q * norm.cdf((x - 1) / noise) + (1 - q) * norm.cdf(x / noise)
        )

    def root(delta_of) -> float:
        return (
            0.0
            if delta_of(0.0) <= delta
            else brentq(lambda epsilon: delta_of(epsilon) - delta, 0.0, 300.0, xtol=1e-10)
        )

    return max(root(removed), root(added))


# --- against dp-accounting ------------------------------------------------------------------------

CASES = [
    ([Mechanism(1.0, 0.01, 1000)], 1e-5),
    ([Mechanism(0.6, 0.1, 100)], 1e-3),
    ([Mechanism(2.0, 0.25, 50)], 1e-6),
    ([Mechanism(5.0, 0.5, 20)], 1e-2),
    ([Mechanism(0.8, 0.02, 100), Mechanism(1.5, 0.1, 50), Mechanism(20.0, 1.0, 1)], 1e-4),
]


@pytest.mark.parametrize(("multiplier", "expected"), [(0.667, 4.91), (1.0, 1.90)])
def test_rdp_of_millions_of_steps_matches_known_values(multiplier: float, expected: float) -> None:
    part = Mechanism(multiplier, 1 / N, 2_400_000)
    other = RdpAccountant().compose(event([part])).get_epsilon(1 / N)
    assert epsilon_rdp([part], 1 / N) == pytest.approx(expected, rel=0.01)
    assert epsilon_rdp([part], 1 / N) == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize(
    ("parts", "delta"), [case for case in CASES if case[0][0].noise_multiplier != 0.6]
)  # the library fails there
def test_rdp_agrees_with_dp_accounting(parts: list[Mechanism], delta: float) -> None:
    assert epsilon_rdp(parts, delta) == pytest.approx(
        RdpAccountant().compose(event(parts)).get_epsilon(delta), rel=0.01
    )


@pytest.mark.parametrize(("parts", "delta"), CASES)
def test_prv_is_within_a_percent_of_dp_accounting(parts: list[Mechanism], delta: float) -> None:
    ours = epsilon_prv(parts, delta)
    assert ours == epsilon_of(parts, delta), "PRV is the tighter of the two"
    assert pld_epsilon(parts, delta, 1e-3, pessimistic=False) <= ours
    assert ours == pytest.approx(pld_epsilon(parts, delta, 1e-3, pessimistic=True), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [0.667, 1.0])
def test_prv_of_millions_of_steps_agrees_with_dp_accounting(multiplier: float) -> None:
    """The library's rounding error is about 0.5 %: a finer mesh may give a larger upper bound."""
    part = Mechanism(multiplier, 1 / N, 2_400_000)
    assert epsilon_prv([part], 1 / N) == pytest.approx(
        pld_epsilon([part], 1 / N, 2e-5, pessimistic=True), rel=0.01
    )


@QUICK
@given(st.floats(1.0, 8.0), rates, st.integers(1, 60), deltas)
def test_prv_is_above_a_lower_bound_of_epsilon(
    noise: float, q: float, steps: int, delta: float
) -> None:
    part = Mechanism(noise, q, steps)
    try:
        ours = epsilon_prv([part], delta)
    except ArithmeticError:
        ours = epsilon_of([part], delta)
    assert ours >= pld_epsilon([part], delta, 2e-3, pessimistic=False)


# --- against an integral --------------------------------------------------------------------------


def integral_epsilon(parts: list[Mechanism], delta: float, removed: bool) -> float:
    """ε of many steps by a contour integral of δ(ε), exact but for the sums.

    δ(ε) = 1/2πi ∫ exp(Σ T K(z) - zε) / (z (z+1)) dz along Re z = c > 0, with K(z) = ln E[exp(z
    loss)] for a unit that is removed or added. 1 / (z (z+1)) is the transform of (1 - exp(ε - s))+
    over ε. The integrand decays like a normal density, so that a sum over it is exact.
    """

    def exponent(z: np.ndarray) -> np.ndarray:
        total = np.zeros(z.shape, complex)
        for part in parts:
            noise, q = part.noise_multiplier, part.sample_rate
            x = np.arange(-10 * noise, 14 * noise + 2, noise / 12)
            zero, one = (np.exp(-((x - mean) ** 2) / (2 * noise**2)) for mean in (0.0, 1.0))
            weights = (1 - q) * zero + q * one if removed else zero
            slope = (2 * x - 1) / (2 * noise**2)
            loss = np.log1p(q * np.expm1(slope)) if q < 1 else slope
            change = np.expm1(z[:, None] * (loss if removed else -loss)) @ (weights / weights.sum())
            total += part.steps * np.log1p(change)
        return total

    along = np.geomspace(0.02, 30, 120)
    real = exponent(along.astype(complex)).real

    def delta_of(epsilon: float) -> float:
        c = along[np.argmin(real - along * epsilon - np.log(along * (along + 1)))]  # the saddle
        far = 1.0
        while (
            exponent(np.array([c + 1j * far]))[0].real > exponent(np.array([c + 0j]))[0].real - 45
        ):
            far *= 1.3
        u = np.linspace(0, far, 1500)
        z = c + 1j * u
        terms = (np.exp(exponent(z) - z * epsilon) / (z * (z + 1))).real
        return float((terms.sum() - terms[0] / 2) * u[1] / np.pi)

    return float(
        brentq(
            lambda epsilon: math.log(max(delta_of(epsilon), 1e-300) / delta), 0.05, 30, xtol=1e-6
        )
    )


MANY = [
    ([Mechanism(0.667, 1 / N, 2_400_000)], 1 / N),
    ([Mechanism(1.0, 1 / N, 2_400_000)], 1 / N),
    ([Mechanism(1.46, 0.1, 1000)], 1e-3),
    ([Mechanism(2.0, 0.25, 300), Mechanism(1.2, 0.05, 500), Mechanism(20.0, 1.0, 4)], 1e-5),
]


@pytest.mark.parametrize(("parts", "delta"), MANY)
def test_prv_is_at_most_a_percent_above_exact_epsilon(parts: list[Mechanism], delta: float) -> None:
    truth = max(integral_epsilon(parts, delta, removed) for removed in (True, False))
    assert truth <= epsilon_prv(parts, delta) <= 1.01 * truth


def test_contour_integral_matches_the_closed_form() -> None:
    parts = [Mechanism(9.0, 1.0, 30)]
    for removed in (True, False):
        assert integral_epsilon(parts, 1e-4, removed) == pytest.approx(
            epsilon_of(parts, 1e-4), rel=1e-5
        )


# --- against closed forms -------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True, phases=PHASES)
@given(noises, rates, deltas)
@example(0.5, 0.001, 1e-6)  # nearly all of the loss is slightly below 0
@example(8.0, 0.001, 1e-2)  # ε is 0
def test_epsilon_of_one_sampled_step_matches_its_densities(
    noise: float, q: float, delta: float
) -> None:
    truth, ours = exact_epsilon(noise, q, delta), epsilon_of([Mechanism(noise, q, 1)], delta)
    assert truth <= ours <= truth + 0.01 * epsilon_rdp([Mechanism(noise, q, 1)], delta)


@settings(max_examples=15, deadline=None, derandomize=True, phases=PHASES)
@given(st.floats(0.3, 30.0), st.integers(1, 1000), deltas)
def test_unsampled_mechanism_has_the_closed_form(noise: float, steps: int, delta: float) -> None:
    epsilon = epsilon_of([Mechanism(noise, 1.0, steps)], delta)
    sigma = noise / math.sqrt(steps)
    spent = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(
        epsilon + norm.logcdf(-0.5 / sigma - epsilon * sigma)
    )
    assert spent == pytest.approx(delta, rel=1e-4) if epsilon else spent <= delta


@pytest.mark.parametrize(("noise", "delta"), [(1.0, 1e-5), (5.0, 1e-3), (0.8, 1e-6)])
def test_prv_of_a_plain_gaussian_is_the_closed_form(noise: float, delta: float) -> None:
    truth = epsilon_of([Mechanism(noise, 1.0, 4)], delta)
    assert truth <= epsilon_prv([Mechanism(noise, 1.0, 4)], delta) <= 1.01 * truth


@pytest.mark.parametrize(
    ("noise", "q"), [(0.6, 0.1), (0.667, 1 / N), (0.5, 0.9), (4.0, 0.3), (1.0, 1.0)]
)
def test_renyi_divergences_match_their_integrals(noise: float, q: float) -> None:
    """E[(density ratio)^α] over x ~ N(0, σ²), in logarithms."""
    orders = np.array([order for order in accountants.ORDERS if order < 64])
    x = np.arange(-12 * noise, orders.max() + 12 * noise, noise / 16)
    with np.errstate(divide="ignore"):
        ratio = np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * noise**2))
    terms = (
        orders[:, None] * ratio - x**2 / (2 * noise**2) + math.log(1 / 16 / math.sqrt(2 * math.pi))
    )
    truth = logsumexp(terms, axis=1) / (orders - 1)
    found = accountants._divergences(noise, q, tuple(orders))
    finite = np.isfinite(found)
    assert finite.sum() > len(orders) / 2, (
        "an order that does not converge is infinite and so does not count"
    )
    assert found[finite] == pytest.approx(truth[finite], rel=1e-4, abs=1e-12)


# --- algebra --------------------------------------------------------------------------------------


@QUICK
@given(parts_, st.builds(Mechanism, noises, rates, st.integers(1, 200)), deltas)
def test_epsilon_increases_with_every_release(
    parts: list[Mechanism], more: Mechanism, delta: float
) -> None:
    assert epsilon_rdp([*parts, more], delta) >= epsilon_rdp(parts, delta) * (1 - 1e-9)
    slack = accountants.TOLERANCE * epsilon_rdp([*parts, more], delta)
    assert epsilon_of([*parts, more], delta) >= epsilon_of(parts, delta) - slack


@QUICK
@given(parts_, deltas)
def test_epsilon_is_independent_of_order_and_grouping(parts: list[Mechanism], delta: float) -> None:
    halves = [
        Mechanism(part.noise_multiplier, part.sample_rate, count)
        for part in reversed(parts)
        for count in (part.steps // 2, part.steps - part.steps // 2)
    ]
    assert epsilon_of(halves, delta) == pytest.approx(epsilon_of(parts, delta), rel=1e-6)


def test_merge_joins_gaussians_and_drops_empty_entries() -> None:
    (only,) = merge(
        [
            Mechanism(3.0, 1.0, 1),
            Mechanism(4.0, 1.0, 1),
            Mechanism(1.0, 0.5, 0),
            Mechanism(1.0, 0.0, 9),
        ]
    )
    assert only.noise_multiplier == pytest.approx(2.4)
    assert only.steps == 1
    assert joint_noise(3.0, 4.0) == pytest.approx(2.4)
    assert joint_noise(3.0, 0.0) == 0.0
    assert merge([Mechanism(1.0, 0.5, 2), Mechanism(1.0, 0.5, 3)]) == (Mechanism(1.0, 0.5, 5),)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan])
def test_without_noise_epsilon_is_infinite(noise: float) -> None:
    assert epsilon_of([Mechanism(noise, 0.1, 1), Mechanism(1.0, 0.1, 1)], 1e-5) == math.inf


def test_no_release_costs_nothing_and_delta_is_checked() -> None:
    assert epsilon_of([], 1e-5) == 0.0
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="0 < delta < 1"):
            epsilon_of([LONG], delta)


def test_epsilon_falls_back_to_rdp_where_prv_fails() -> None:
    part = Mechanism(0.05, 0.5, 50)
    with pytest.raises(ArithmeticError):
        epsilon_prv([part], 1e-5)
    assert epsilon_of([part], 1e-5) == epsilon_rdp([part], 1e-5) < math.inf


def test_prv_of_many_mechanisms_is_a_bound() -> None:
    parts = [Mechanism(1.5 + number / 50, 0.02, 40) for number in range(12)]
    single = [Mechanism(1.5 + 11 / 50, 0.02, 480)]  # all at the cost of the least noise
    assert epsilon_of(single, 1e-4) <= epsilon_of(parts, 1e-4) <= epsilon_rdp(parts, 1e-4)


# --- searches for noise and steps -----------------------------------------------------------------


@settings(max_examples=4, deadline=None, derandomize=True, phases=PHASES)
@given(st.floats(0.5, 20.0), deltas, st.floats(0.002, 0.3), steps_)
def test_noise_for_and_steps_within_are_inverse(
    epsilon: float, delta: float, q: float, steps: int
) -> None:
    noise = noise_for(epsilon, delta, q, steps)
    assume(noise > 0.4)
    assert epsilon_of([Mechanism(noise, q, steps)], delta) <= epsilon
    assert epsilon_of([Mechanism(noise * 0.98, q, steps)], delta) > epsilon, (
        "a smaller multiplier would have done"
    )
    assert steps_within(epsilon, delta, [], Mechanism(noise, q), 2 * steps) >= steps * 0.995 - 1
    assert steps_within(epsilon, delta, [], Mechanism(noise, q), steps) == steps


@QUICK
@given(
    parts_, st.builds(Mechanism, noises, rates), st.integers(0, 400), st.floats(0.1, 12.0), deltas
)
def test_steps_within_is_the_largest_number_that_fits(
    spent: list[Mechanism], step: Mechanism, most: int, epsilon: float, delta: float
) -> None:
    count = steps_within(epsilon, delta, spent, step, most)

    def cost(steps: int) -> float:
        return epsilon_of(
            [*spent, Mechanism(step.noise_multiplier, step.sample_rate, steps)], delta
        )

    assert 0 <= count <= most
    assert count == 0 or cost(count) <= epsilon
    assert count == most or cost(count + max(1, count // 100)) > epsilon * (
        1 - accountants.TOLERANCE
    )


def test_noise_for_accounts_for_other_releases() -> None:
    labels = (Mechanism(5.0, 1.0, 1),)
    alone, beside = noise_for(8.0, 1e-3, 0.05, 300), noise_for(8.0, 1e-3, 0.05, 300, labels)
    assert beside > alone
    assert epsilon_of([*labels, Mechanism(beside, 0.05, 300)], 1e-3) <= 8.0


def test_noise_for_supports_millions_of_steps() -> None:
    noise = noise_for(4.5, 1 / N, 1 / N, 2_400_000)
    assert epsilon_of([Mechanism(noise, 1 / N, 2_400_000)], 1 / N) <= 4.5
    assert noise == pytest.approx(0.664, rel=0.01)


def test_noise_for_a_hospital_takes_seconds() -> None:
    """CPU time of this thread, independent of the load; generous by a factor of about five."""
    noise_for.__wrapped__(9.0, 1e-3, 0.1, 900)  # imports
    before = time.thread_time()
    noise_for.__wrapped__(10.0, 1e-3, 0.1, 1000)
    assert time.thread_time() - before < 8


def test_noise_for_refuses_too_expensive_label_counts() -> None:
    with pytest.raises(ConfigError, match="no noise keeps 10 steps"):
        noise_for(1.0, 1e-5, 0.1, 10, (Mechanism(0.5, 1.0, 1),))


def test_no_step_fits_into_a_spent_budget() -> None:
    spent = [Mechanism(1.0, 1.0, 5)]
    assert steps_within(1.0, 1e-5, spent, Mechanism(1.0, 0.1), 10) == 0
    assert steps_within(1.0, 1e-5, [], Mechanism(0.0, 0.1), 10) == 0, (
        "a step without noise never fits"
    )
    assert steps_within(100.0, 1e-5, [], Mechanism(1.0, 0.1), 0) == 0
