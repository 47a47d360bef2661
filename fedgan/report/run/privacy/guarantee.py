"""Differential privacy of a run: ε per hospital and round, and the terms an ε is stated with.

NIST SP 800-226 requires δ, unit, neighbouring relation, mechanism, accountant, composition, trust
model and randomness beside an ε; `terms` lists them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedgan.config import Settings
from fedgan.privacy.client_level import noise_statement
from fedgan.privacy.step import releases_labels
from fedgan.report.html.format import DASH, number, plural, significant
from fedgan.report.run.data import RunData, Tree, tree, trees

# What the ledger and the register hold (fedgan/privacy/register.py).
SCOPE = "all private runs on the images of that hospital that its register of ledgers knows"
INFINITE = "infinite"
FALSE_POSITIVE_RATE = 0.01  # at which the bound on an attack is stated


@dataclass(frozen=True)
class PrivacyCost:
    """Privacy cost of one hospital after its last round.

    `epsilon` is None if not reported, or if `is_infinite`. `curve`: (round, finite ε).
    `last_round`: its last round. `stopped`: the round in which its budget was used up, or None.
    """

    name: str
    epsilon: float | None
    is_infinite: bool
    delta: float | None
    noise_multiplier: float | None
    sample_rate: float | None
    curve: tuple[tuple[float, float], ...]
    last_round: int
    stopped: int | None

    @property
    def epsilon_text(self) -> str:
        """ε as text: 9.87, infinite, or a dash."""
        return INFINITE if self.is_infinite else significant(self.epsilon, 3)

    @property
    def max_true_positive_rate(self) -> float | None:
        """Bound on the members that any attack finds at 1 % false positives; None: no bound."""
        if self.epsilon is None or self.delta is None:
            return None
        return attack_bound(self.epsilon, self.delta, FALSE_POSITIVE_RATE)


def attack_bound(epsilon: float, delta: float, fpr: float) -> float:
    """Bound on the true-positive rate of any membership attack at the false-positive rate `fpr`.

    Best test between two neighbouring data sets under (ε, δ)-differential privacy (arXiv 1311.0776,
    theorem 2.1). All rates are in [0, 1].
    """
    by_false_positives = math.inf if epsilon > 700 else math.exp(epsilon) * fpr + delta
    by_false_negatives = 1.0 - math.exp(-epsilon) * (1.0 - delta - fpr)
    return min(1.0, by_false_positives, max(by_false_negatives, 0.0))


def privacy_costs(run: RunData) -> list[PrivacyCost]:
    """Privacy cost per hospital, in order of appearance; empty without private rounds."""
    rows: dict[str, list[tuple[float, Tree]]] = {}
    for line in run.rounds:
        turn = number(line.get("round")) or 0.0
        for row in trees(line.get("hospitals")):
            rows.setdefault(str(row.get("name", "unnamed")), []).append((turn, row))
    if not run.settings.privacy.on:
        return []
    return [_privacy_cost(name, own) for name, own in rows.items()]


def _privacy_cost(name: str, rows: list[tuple[float, Tree]]) -> PrivacyCost:
    reported = [(turn, row) for turn, row in rows if "epsilon" in row]
    last: Tree = reported[-1][1] if reported else {}
    epsilon = number(last.get("epsilon"))
    # JSON has no infinity: a null epsilon is infinite.
    is_infinite = bool(reported) and (epsilon is None or number(last.get("noise_multiplier")) == 0)
    exhausted = [turn for turn, row in rows if row.get("exhausted")]
    return PrivacyCost(
        name=name,
        epsilon=None if is_infinite else epsilon,
        is_infinite=is_infinite,
        delta=number(last.get("delta")),
        noise_multiplier=number(last.get("noise_multiplier")),
        sample_rate=number(last.get("sample_rate")),
        curve=tuple(
            (turn, value)
            for turn, row in reported
            if (value := number(row.get("epsilon"))) is not None
        ),
        last_round=round(rows[-1][0]),
        stopped=round(exhausted[-1]) if exhausted else None,
    )


def unit_text(settings: Settings) -> str:
    """The unit of privacy as text."""
    if settings.privacy.unit == "image":
        return "one image"
    return (
        "one patient with all their images, of which a step uses at most "
        f"{settings.privacy.images_per_patient}"
    )


def statement(run: RunData) -> str:
    """The guarantee of the run in plain English."""
    privacy, costs = run.settings.privacy, privacy_costs(run)
    if not privacy.on and client_level_statement(run):
        return (
            "There is no guarantee for an image or a patient: hospitals did not clip gradients and "
            "did not add noise. Only whole hospitals are protected, as stated below."
        )
    if not privacy.on:
        return (
            "There is no guarantee: this run was trained without differential privacy. Gradients "
            "were not clipped and no noise was added. Nothing bounds what the generator reveals "
            "about its training images."
        )
    if privacy.noise_multiplier == 0:
        return (
            "Clipping without noise: no guarantee. Gradients were clipped as for differential "
            "privacy, but no noise was added (privacy.noise_multiplier = 0). ε is infinite, and "
            "nothing bounds what the generator reveals about its training images."
        )
    if not costs:
        return "Differential privacy is on, but no round has finished: no privacy cost is known."
    if any(cost.is_infinite for cost in costs):
        names = ", ".join(cost.name for cost in costs if cost.is_infinite)
        return (
            f"There is no guarantee for {names}: its ledger contains steps without noise, of this "
            "run or an earlier one, so ε is infinite. The table lists the other hospitals."
        )
    known = [cost.epsilon for cost in costs if cost.epsilon is not None]
    if not known:
        return "Differential privacy is on, but no round reports an ε: no guarantee can be stated."
    low, high = significant(min(known), 3), significant(max(known), 3)
    reach = f"ε = {high}" if low == high else f"ε from {low} to {high}"
    unknown = [cost.name for cost in costs if cost.epsilon is None]
    return (
        f"The training of each hospital is differentially private with {reach} for "
        f"{unit_text(run.settings)}, at the δ in the table. ε covers {SCOPE}."
        + (f" The ε of {', '.join(unknown)} is not known." if unknown else "")
    )


def client_level_cost(run: RunData) -> Tree:
    """Privacy cost of client-level DP after the last round (metrics.jsonl); empty without it."""
    return tree(run.last_round.get("client_level_dp"))


def has_client_level_guarantee(run: RunData) -> bool:
    """Whether client-level DP holds with a finite ε."""
    return number(client_level_cost(run).get("epsilon")) is not None


def client_level_statement(run: RunData) -> str:
    """The client-level guarantee (privacy.client_level) in plain English; empty without one."""
    cost = client_level_cost(run)
    if not cost and run.settings.privacy.client_level != "none" and not run.rounds:
        return "Client-level DP is on, but no round has finished: nothing was released yet."
    if not cost:
        return ""
    epsilon, noise = number(cost.get("epsilon")), number(cost.get("noise_multiplier"))
    hospitals = round(number(cost.get("hospitals")) or 0)
    releases = plural(round(number(cost.get("releases")) or 0), "release")
    guarantee = (
        f"ε = {significant(epsilon, 3)}"
        if epsilon is not None
        else f"an {INFINITE} ε, which is no guarantee"
    )
    return (
        "Client-level DP (whole hospitals): each round released the mean of the clipped updates of "
        f"the hospitals with noise (noise multiplier {significant(noise, 3)}), "
        f"at {guarantee} and δ = {significant(cost.get('delta'), 3)} over {releases}. The unit is "
        "a whole hospital, absent or replaced by an empty one, without sampling: divisor and noise "
        f"are those of {hospitals} hospitals in every round. It protects a hospital against "
        "everybody who sees the model, but not against the server."
        + (f" {noise_statement(hospitals, noise)}" if hospitals and noise else "")
    )


def meaning(costs: list[PrivacyCost]) -> str:
    """The bound that the largest finite ε puts on any attack; empty if none is finite."""
    known = [cost for cost in costs if cost.max_true_positive_rate is not None]
    if not known:
        return ""
    worst = max(known, key=lambda cost: cost.max_true_positive_rate or 0.0)
    bound = worst.max_true_positive_rate or 0.0
    text = (
        "Whatever an attacker knows and tries: at 1 false positive in 100, no attack finds more "
        f"than {percent(bound)} of the members ({worst.name}, ε = {worst.epsilon_text})."
    )
    if bound > 0.99:
        text += (
            " This bound excludes almost nothing: at such an ε the evidence is what attacks find, "
            "not the guarantee."
        )
    return text


def percent(value: Any) -> str:
    """A share in per cent that is never rounded up to 100 %: 3.2 %, 99.99 %."""
    n = number(value)
    if n is None:
        return DASH
    hundredths = 100 * n
    if hundredths < 99.9 or hundredths == 100:
        return f"{hundredths:.1f} %"
    return f"{math.floor(hundredths * 1000) / 1000:g} %"


def terms(run: RunData) -> list[tuple[str, str]]:
    """(term, meaning) for all that an ε is stated with; empty without privacy or without noise."""
    settings, privacy = run.settings, run.settings.privacy
    if not privacy.on or privacy.noise_multiplier == 0:
        return []
    if privacy.delta:
        delta = f"δ = {significant(privacy.delta, 3)}."
    else:
        delta = (
            "δ is in the table; the default is the smaller of 1e-5 and 1 / (10 n), n the number of "
            f"{privacy.unit}s of the hospital. 1 / n would allow the full disclosure of one."
        )
    unit = unit_text(settings)
    return [
        (
            "Kind",
            "(ε, δ)-differential privacy: the contribution of one unit changes the probability of "
            "any outcome by a factor of at most exp(ε), except for a probability of δ. "
            f"Here {delta}",
        ),
        ("Unit", f"{unit[0].upper()}{unit[1:]}: it may be present or absent."),
        (
            "Neighbouring relation",
            "Two data sets of one size that differ by one unit, which contributes nothing in one "
            "of them (zero-out: added or removed, while the number of units is public). Replacing "
            "one unit by another is two changes: about two and a half times the ε at the same δ. "
            "The bound for two changes that follows from ε and δ alone, 2ε at (1 + exp(ε)) δ, "
            "promises nothing at ε = 10 if δ is above 1/22,000.",
        ),
        (
            "Mechanism",
            "DP-SGD: the gradient of the discriminator of each unit is clipped to norm "
            f"{privacy.max_grad_norm:g}; the gradients are summed and Gaussian noise is added. The "
            "generator sees real images only through this discriminator, so checkpoints and any "
            "number of synthetic images have no further privacy cost (post-processing).",
        ),
        (
            "Sampling",
            "Poisson: each step takes each unit independently with the same probability, and "
            "nobody learns which ones. The table states the probability.",
        ),
        (
            "Accountant",
            "Opacus, PRV (numerical composition, arXiv 2106.02848), checked against RDP (arXiv "
            "1908.10530). Both are upper bounds; if PRV fails or is larger, RDP is stated.",
        ),
        (
            "What is composed",
            f"{_composition(run)} The ledger of the hospital records entries before the steps are "
            "taken.",
        ),
        (
            "Trust",
            "The hospital adds noise before anything leaves it. The guarantee holds against the "
            "server, the other hospitals and everybody who receives the model. It requires trust "
            "in the machine of the hospital and in this program.",
        ),
        (
            "Noise generator",
            "ChaCha20 (RFC 8439) with 256 bits of the operating system's entropy, for noise and "
            "samples. Sum and noise are float64 and rounded to a grid that depends on the noise "
            "alone, so that the low bits of a result show nothing of its terms.",
        ),
    ]


def _composition(run: RunData) -> str:
    settings, privacy = run.settings, run.settings.privacy
    released = releases_labels(settings, len(run.data_labels) if run.hospitals else 1)
    parts = [f"All steps of the discriminator in {SCOPE}"]
    if released:
        parts.append(
            f"the label counts, released with a noise multiplier of {privacy.label_noise:g}"
        )
    if privacy.r_t_noise:
        parts.append(
            "the signs of the discriminator on real images, released with a noise multiplier of "
            f"{privacy.r_t_noise:g}"
        )
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    labels = "" if released else " Label counts were not released."
    return f"{listed}.{labels}"
