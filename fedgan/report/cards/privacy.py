"""The privacy part of a card: what travelled, what is guaranteed, what an audit found, and what is not known or protected."""

from __future__ import annotations

from typing import Any

from fedgan.config import Settings
from fedgan.report.cards.collect import CardData
from fedgan.report.run.data import Tree, tree
from fedgan.report.run.privacy.findings import Audit, Figure
from fedgan.report.run.privacy.guarantee import (
    hospital_level,
    hospitals_spent,
    meaning,
    spent,
    statement,
    terms,
)
from fedgan.report.run.privacy.words import COMMAND, not_protected

ATTACKS_NOT_RUN = (
    "Membership inference: no attack was run. Not measured.",
    "Copies of training images among the synthetic ones: no search was run. Not measured.",
)
OTHER_ATTACKS = "Attribute inference and linkage with other data: not measured."
OF_TRAVEL = "Reconstruction of images or of label counts from what travelled: no attack was run. Not measured."
NO_PRIVACY = "No differential privacy: no gradient was clipped and no noise was added, so no epsilon can be stated."
ONLY_HOSPITALS = "No differential privacy of an image or a patient: in the hospitals no gradient was clipped, no noise added."
NO_NOISE = "No guarantee: gradients were clipped, but no noise was added, so epsilon is infinite."


def privacy_facts(card: CardData, federated: bool, counts: bool = True) -> Tree:
    """What is known and what is not, in sentences, with the figures behind them; `counts`: whether the card tells counts.

    A `privacy` part of evaluation.json is shown as it is.
    """
    data = card.data
    audit, measured = Audit(data.audit), tree(data.evaluation.get("privacy"))
    apart = card.arm in ("centralized", "local", "coalition") and not federated
    unknown = (
        [] if measured else [*_not_attacked(audit), OTHER_ATTACKS, *(() if apart else (OF_TRAVEL,))]
    )
    if not federated and not apart:
        unknown.insert(
            0,
            "How the model was trained (federated, on pooled images, or by one hospital alone), and so what travelled.",
        )
    privacy = data.settings.privacy
    if not privacy.on:
        unknown.insert(0, ONLY_HOSPITALS if hospital_level(data) else NO_PRIVACY)
    elif privacy.noise_multiplier == 0:
        unknown.insert(0, NO_NOISE)
    return {
        "known": _known(card, federated),
        "unknown": unknown,
        "measured": measured,
        "guarantee": _guarantee(card),
        "audit": _audit(audit),
        "not_protected": not_protected(data, counts),
    }


def _known(card: CardData, federated: bool) -> list[str]:
    """What travelled, and who read real images, by how the model was trained."""
    settings = card.data.settings
    if federated:
        parts = ", ".join(settings.federation.exchange)
        known = [
            f"No image travelled for the training. What travelled: parameters ({parts}), counts of images{_told(settings)}.",
            "The server saw a sum of what the hospitals changed (SecAgg+), if it kept to the protocol."
            if settings.federation.secure
            else "The server saw each hospital's parameters as they are: there was no secure aggregation.",
        ]
        if settings.model.hospitals:
            known.append(
                "The networks tell hospitals apart: whoever has the generator can ask it for the images of one."
            )
        if "discriminator" in settings.federation.exchange:
            known.append("The discriminator, which is fitted to real images, travelled as well.")
        if card.arm == "finetuned":
            known.append("Each hospital then trained further alone, and nothing travelled.")
    elif card.arm == "centralized":
        known = [
            "The images of all hospitals were pooled: they lay in one place for the training, and nothing was kept apart."
        ]
    elif card.arm in ("local", "coalition"):
        known = ["Each hospital trained alone: nothing travelled during training."]
    else:
        known = []
    if card.data.evaluation:
        known.append(
            "The evaluation read real images of the hospitals, or of evaluation.root, in one place."
        )
    if card.phantoms:
        known.append("The training images were drawn by a program: there is no patient to protect.")
    return known


def _told(settings: Settings) -> str:
    """What a hospital tells of its training beside parameters and counts of images (client/sent.py), in words."""
    counts = ", counts of images of each label" if settings.federation.share_label_counts else ""
    ledger = ", and epsilon with its delta, noise and sampling rate" if settings.privacy.on else ""
    if settings.privacy.client_level != "none":
        return ledger
    return f", losses of the generator{ledger}" if settings.privacy.on else f"{counts}, and losses"


def _not_attacked(audit: Audit) -> list[str]:
    """What is not known as long as no valid audit was run."""
    if not audit.there:
        return list(ATTACKS_NOT_RUN)
    if not audit.valid:
        return [
            "Membership inference, and copies of training images: the audit that was run is not valid."
        ]
    return []


def _guarantee(card: CardData) -> Tree:
    """Differential privacy: in words, by hospital (`epsilon` None and `infinite` true: no bound), and all that belongs to it."""
    found = spent(card.data)
    return {
        "on": card.data.settings.privacy.on,
        "hospital_level": {"statement": hospital_level(card.data), **hospitals_spent(card.data)},
        "statement": statement(card.data),
        "meaning": meaning(found),
        "hospitals": [
            {
                "name": row.name,
                "epsilon": row.epsilon,
                "infinite": row.infinite,
                "delta": row.delta,
                "noise_multiplier": row.noise_multiplier,
                "sample_rate": row.sample_rate,
                "stopped_in_round": row.stopped,
            }
            for row in found
        ],
        "terms": [{"term": term, "words": words} for term, words in terms(card.data)],
    }


def _audit(audit: Audit) -> Tree:
    """The verdict and, of a valid audit, the worst figure of each measure beside that of held-out real images."""
    if not audit.there:
        return {
            "there": False,
            "headline": f"No audit was run; the command for one: {COMMAND}.",
            "round": None,
            "figures": [],
        }
    worst: dict[str, Figure] = {}
    for figure in audit.figures if audit.valid else []:
        held = worst.get(figure.measure)
        if figure.value is not None and (held is None or _excess(figure) > _excess(held)):
            worst[figure.measure] = figure
    return {
        "there": True,
        "valid": audit.valid,
        "round": audit.round,
        "headline": audit.headline(),
        "figures": [_row(figure) for figure in worst.values()],
    }


def _excess(figure: Figure) -> float:
    return (figure.value or 0.0) - (figure.real or 0.0)


def _row(figure: Figure) -> dict[str, Any]:
    return {
        "head": figure.head,
        "measure": figure.measure,
        "hospital": figure.hospital,
        "value": figure.value,
        "value_ci": figure.ci,
        "held_out": figure.real,
        "held_out_ci": figure.real_ci,
        "stands_out": figure.stands_out,
    }
