"""Differential privacy as a run reports it: epsilon by hospital and round, and what has to stand beside an epsilon.

NIST SP 800-226 asks that a stated epsilon comes with its delta, the unit of privacy, the neighbouring relation, the
mechanism, the accountant and all that is composed, the trust model and the randomness. `terms` answers in that order.
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

INFINITE = "infinite"
FALSE_ALARMS = 0.01  # rate at which the bound on an attack is told


@dataclass(frozen=True)
class Spent:
    """What one hospital had spent after its last round. `epsilon` None: not told, or infinite where `infinite` is set.

    `curve`: (round, finite ε) of the rounds that tell one. `last`: its last round. `stopped`: the round in which its budget
    allowed no further step, or None.
    """

    name: str
    epsilon: float | None
    infinite: bool
    delta: float | None
    noise_multiplier: float | None
    sample_rate: float | None
    curve: tuple[tuple[float, float], ...]
    last: int
    stopped: int | None

    @property
    def words(self) -> str:
        """ε as a reader sees it: 9.87, infinite, or a dash."""
        return (
            INFINITE
            if self.infinite
            else DASH
            if self.epsilon is None
            else significant(self.epsilon, 3)
        )

    @property
    def most_found(self) -> float | None:
        """Bound on the share of members that any attack can find at 1 % false alarms; None where nothing bounds it."""
        if self.epsilon is None or self.delta is None:
            return None
        return attack_bound(self.epsilon, self.delta, FALSE_ALARMS)


def attack_bound(epsilon: float, delta: float, false_alarms: float) -> float:
    """The most that an attack on one unit can find at a false-positive rate in [0, 1] (arXiv 1311.0776, theorem 2.1).

    True-positive rate of the best test between two neighbouring data sets under (ε, δ)-differential privacy; in [0, 1].
    """
    by_alarms = math.inf if epsilon > 700 else math.exp(epsilon) * false_alarms + delta
    by_misses = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_alarms)
    return min(1.0, by_alarms, max(by_misses, 0.0))


def spent(run: RunData) -> list[Spent]:
    """What each hospital spent, in the order in which the rounds name them; empty where no private round was done."""
    rows: dict[str, list[tuple[float, Tree]]] = {}
    for line in run.rounds:
        turn = number(line.get("round")) or 0.0
        for row in trees(line.get("hospitals")):
            rows.setdefault(str(row.get("name", "unnamed")), []).append((turn, row))
    if not run.settings.privacy.on:
        return []
    return [_spent(name, own) for name, own in rows.items()]


def _spent(name: str, rows: list[tuple[float, Tree]]) -> Spent:
    told = [(turn, row) for turn, row in rows if "epsilon" in row]
    last: Tree = told[-1][1] if told else {}
    epsilon = number(last.get("epsilon"))
    # JSON knows no infinity: an epsilon that is there and null is one (docs/federation.md).
    infinite = bool(told) and (epsilon is None or number(last.get("noise_multiplier")) == 0)
    ended = [turn for turn, row in rows if row.get("exhausted")]
    return Spent(
        name=name,
        epsilon=None if infinite else epsilon,
        infinite=infinite,
        delta=number(last.get("delta")),
        noise_multiplier=number(last.get("noise_multiplier")),
        sample_rate=number(last.get("sample_rate")),
        curve=tuple(
            (turn, value) for turn, row in told if (value := number(row.get("epsilon"))) is not None
        ),
        last=round(rows[-1][0]),
        stopped=round(ended[-1]) if ended else None,
    )


def unit_words(settings: Settings) -> str:
    """The unit of privacy in words."""
    if settings.privacy.unit == "image":
        return "one image"
    most = settings.privacy.images_per_patient
    return "one patient with all their images" + (
        f", of which a step looks at {most} at most" if most else ""
    )


def statement(run: RunData) -> str:
    """What is guaranteed, in plain words."""
    privacy, found = run.settings.privacy, spent(run)
    if not privacy.on and hospital_level(run):
        return (
            "There is no guarantee for an image or a patient: no gradient was clipped and no noise was added in the hospitals. "
            "Only whole hospitals were hidden, as stated below."
        )
    if not privacy.on:
        return (
            "There is no guarantee: this run was trained without differential privacy. No gradient was clipped, no noise was "
            "added, and nothing bounds what the generator gives away of its training images."
        )
    if privacy.noise_multiplier == 0:
        return (
            "Clipping without noise: no guarantee. Gradients were clipped as for differential privacy, but no noise was added "
            "(privacy.noise_multiplier = 0), so ε is infinite and nothing bounds what the generator gives away."
        )
    if not found:
        return "Differential privacy is on, but no round has finished: nothing has been spent that this page knows of."
    if any(row.infinite for row in found):
        names = ", ".join(row.name for row in found if row.infinite)
        return (
            f"There is no guarantee for {names}: its ledger holds steps without noise, of this run or of an earlier one, "
            "and ε is infinite. What the others spent stands in the table."
        )
    known = [row.epsilon for row in found if row.epsilon is not None]
    if not known:
        return "Differential privacy is on, but no round tells an ε: nothing can be stated as a guarantee."
    low, high = significant(min(known), 3), significant(max(known), 3)
    reach = f"ε = {high}" if low == high else f"ε from {low} to {high}"
    untold = [row.name for row in found if row.epsilon is None]
    return (
        f"Each hospital's training is differentially private with {reach} for {unit_words(run.settings)}, at the δ of the table, "
        f"counted over {counted_over(run.settings)}."
        + (f" No ε is known of {', '.join(untold)}." if untold else "")
    )


def is_dealt(settings: Settings) -> bool:
    """Whether the images were dealt anew to hospitals of the run's own making, so that their ledgers lie in its folder."""
    return settings.data.partition != "institution"


def counted_over(settings: Settings) -> str:
    """What an ε of a ledger counts, in words that follow "counted over"."""
    if is_dealt(settings):
        return (
            "this run alone: dealt hospitals exist in this run only, and other runs on the same images are not counted "
            f"(data.partition = '{settings.data.partition}')"
        )
    return "all private runs on that hospital's images"


def hospitals_spent(run: RunData) -> Tree:
    """What hiding whole hospitals cost after the last round (of metrics.jsonl); empty where nothing was hidden."""
    return tree(run.last_round.get("client_level_dp"))


def hides_hospitals(run: RunData) -> bool:
    """Whether an ε of whole hospitals holds, and is finite."""
    return number(hospitals_spent(run).get("epsilon")) is not None


def hospital_level(run: RunData) -> str:
    """What hides whole hospitals from one another (privacy.client_level), in words; empty where nothing does."""
    found = hospitals_spent(run)
    if not found and run.settings.privacy.client_level != "none" and not run.rounds:
        return "Whole hospitals are to be hidden, but no round has finished: nothing was released that this page knows of."
    if not found:
        return ""
    epsilon, noise = number(found.get("epsilon")), number(found.get("noise_multiplier"))
    hospitals = round(number(found.get("hospitals")) or 0)
    cost = (
        f"ε = {significant(epsilon, 3)}"
        if epsilon is not None
        else f"an {INFINITE} ε, which is no guarantee"
    )
    return (
        f"Whole hospitals: in each round the mean of the hospitals' clipped updates was released with noise (Flower's "
        f"wrappers, noise multiplier {significant(noise, 3)}), at {cost} and δ = {significant(found.get('delta'), 3)} over "
        f"{plural(round(number(found.get('releases')) or 0), 'release')}. The unit is a whole hospital, replaced by none, "
        "without sampling. It hides a hospital from whoever sees the model, not from the server."
        + (f" {noise_statement(hospitals, noise)}" if hospitals and noise else "")
    )


def meaning(found: list[Spent]) -> str:
    """What the largest finite ε means for the best attack there can be; empty where none is finite."""
    known = [row for row in found if row.most_found is not None]
    if not known:
        return ""
    worst = max(known, key=lambda row: row.most_found or 0.0)
    bound = worst.most_found or 0.0
    head = (
        "Whatever an attacker knows and tries: at 1 false alarm in 100, no attack finds more than "
        f"{share(bound)} of the members ({worst.name}, ε = {worst.words})."
    )
    if bound > 0.99:
        head += " That bound excludes next to nothing: at such an ε what attacks find is the evidence, not the guarantee."
    return head


def share(value: Any) -> str:
    """A share in per cent, never rounded up to a whole that it is not: 3.2 %, 99.99 %."""
    n = number(value)
    if n is None:
        return DASH
    percent = 100 * n
    return (
        f"{percent:.1f} %"
        if percent < 99.9 or percent == 100
        else f"{math.floor(percent * 1000) / 1000:g} %"
    )


def terms(run: RunData) -> list[tuple[str, str]]:
    """(term, what holds here) for all that an ε has to be read with; empty where privacy is off or adds no noise."""
    settings, privacy = run.settings, run.settings.privacy
    if not privacy.on or privacy.noise_multiplier == 0:
        return []
    unit = privacy.unit
    delta = (
        f"δ = {significant(privacy.delta, 3)}"
        if privacy.delta
        else f"δ = 1 / (number of {unit}s of the hospital)"
    )
    return [
        (
            "Kind",
            "(ε, δ)-differential privacy: adding or removing one unit changes the probability of any outcome by a factor of "
            f"exp(ε) at most, but for a probability of δ. Here {delta}."
            + (
                " That is the largest δ that is in use: smaller ones promise more."
                if not privacy.delta
                else ""
            ),
        ),
        (
            "Unit",
            f"{unit_words(settings)[0].upper()}{unit_words(settings)[1:]}: what may be there or not.",
        ),
        (
            "Neighbouring relation",
            "Two data sets that differ by one unit, which was added or removed. Replacing one unit by another is two changes: "
            "roughly two and a half times the ε at the same δ. The bound for two changes that follows from ε and δ alone, 2ε at "
            "(1 + exp(ε)) δ, promises nothing at ε = 10 where δ is above 1/22,000.",
        ),
        (
            "Mechanism",
            f"DP-SGD: each unit's gradient of the discriminator is clipped to norm {privacy.max_grad_norm:g}, then summed, then "
            "Gaussian noise is added. The generator sees real images only through that discriminator, so that checkpoints and "
            "any number of synthetic images cost nothing more (post-processing).",
        ),
        (
            "Sampling",
            "Poisson: every step takes each unit with the same probability, by itself, and nobody learns which ones. The table "
            "has the probability.",
        ),
        (
            "Accountant",
            "Opacus, PRV (numerical composition, arXiv 2106.02848), with RDP (arXiv 1908.10530) as its check: both are upper "
            "bounds, and where PRV fails or is the larger one, RDP's is stated.",
        ),
        (
            "What is composed",
            f"{_composed(run)} Entries stand in the hospital's ledger before the steps are done.",
        ),
        (
            "Trust",
            "Noise is added in the hospital before anything leaves: the guarantee holds against the server, the other hospitals "
            "and whoever gets the model. It asks to trust the hospital's own machine and this program.",
        ),
        (
            "Noise generator",
            "PyTorch's and NumPy's generators, seeded from the operating system's entropy in each process. They are not "
            "cryptographic, and noise in floating point has gaps that the accounting does not know of.",
        ),
    ]


def _composed(run: RunData) -> str:
    settings, privacy = run.settings, run.settings.privacy
    released = releases_labels(settings, len(run.data_labels) if run.hospitals else 1)
    where = "in this run alone" if is_dealt(settings) else "in all private runs on the same images"
    parts = [f"all steps of the discriminator {where}"]
    if released:
        parts.append(
            f"the counts of labels, released with a noise multiplier of {privacy.label_noise:g}"
        )
    if privacy.r_t_noise:
        parts.append(
            f"the signs of the discriminator on real images, released with a noise multiplier of {privacy.r_t_noise:g}"
        )
    words = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    dealt = (
        " Dealt hospitals exist in this run only: other runs on the same images are not counted."
        if is_dealt(settings)
        else ""
    )
    labels = "" if released else " No counts of labels were released."
    return f"{words[0].upper()}{words[1:]}.{dealt}{labels}"
