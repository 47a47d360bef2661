"""Privacy facts of a card: data exchanged, guarantee, audit, what is not known or protected."""

from __future__ import annotations

from typing import Any

from fedgan.config import Settings
from fedgan.report.cards.collect import CardData
from fedgan.report.run.data import Tree, tree
from fedgan.report.run.privacy.findings import Audit, Figure
from fedgan.report.run.privacy.guarantee import (
    client_level_cost,
    client_level_statement,
    meaning,
    privacy_costs,
    statement,
    terms,
)
from fedgan.report.run.privacy.statements import COMMAND, not_protected

ATTACKS_NOT_RUN = (
    "Membership inference: no attack was run. Not measured.",
    "Copies of training images among the synthetic ones: no search was run. Not measured.",
)
OTHER_ATTACKS = "Attribute inference and linkage with other data: not measured."
EXCHANGE_NOT_ATTACKED = (
    "Reconstruction of images or label counts from the exchanged data: no attack was run. Not "
    "measured."
)
NO_PRIVACY = (
    "No differential privacy: gradients were not clipped and no noise was added, so no epsilon "
    "can be stated."
)
ONLY_CLIENT_LEVEL = (
    "No differential privacy for an image or a patient: hospitals did not clip gradients and did "
    "not add noise."
)
NO_NOISE = "No guarantee: gradients were clipped, but no noise was added, so epsilon is infinite."


def privacy_facts(card: CardData, federated: bool, counts: bool = True) -> Tree:
    """What is known and not known, in sentences, with the figures; `counts`: the card has counts.

    A `privacy` part of evaluation.json is copied unchanged.
    """
    data = card.data
    audit, measured = Audit(data.audit), tree(data.evaluation.get("privacy"))
    is_separate = card.arm in ("centralized", "local", "coalition") and not federated
    unknown = (
        []
        if measured
        else [
            *_not_attacked(audit),
            OTHER_ATTACKS,
            *(() if is_separate else (EXCHANGE_NOT_ATTACKED,)),
        ]
    )
    if not federated and not is_separate:
        unknown.insert(
            0,
            "How the model was trained (federated, on pooled images, or by one hospital alone), "
            "and so which data was exchanged.",
        )
    privacy = data.settings.privacy
    if not privacy.on:
        unknown.insert(0, ONLY_CLIENT_LEVEL if client_level_statement(data) else NO_PRIVACY)
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
    """Data exchanged and access to real images, by how the model was trained."""
    settings = card.data.settings
    if federated:
        parts = ", ".join(settings.federation.exchange)
        known = [
            f"No image left a hospital for training. Exchanged: parameters ({parts}), counts of "
            f"images{_reported(settings)}.",
            "The server received only the sum of the updates (SecAgg+), if it followed the "
            "protocol."
            if settings.federation.secure
            else "The server received the parameters of each hospital, without secure aggregation.",
        ]
        if settings.model.hospitals:
            known.append(
                "The networks are conditioned on the hospital: whoever has the generator can "
                "generate images of one hospital."
            )
        if "discriminator" in settings.federation.exchange:
            known.append(
                "The discriminator, which is trained on real images, was exchanged as well."
            )
        if card.arm == "finetuned":
            known.append("Each hospital then fine-tuned alone, without any exchange.")
    elif card.arm == "centralized":
        known = ["The images of all hospitals were pooled in one place for training."]
    elif card.arm in ("local", "coalition"):
        known = ["Each hospital trained alone: nothing was exchanged during training."]
    else:
        known = []
    if card.data.evaluation:
        known.append(
            "The evaluation read real images of the hospitals, or of evaluation.root, in one place."
        )
    if card.has_only_phantoms:
        known.append("The training images are phantoms: there is no patient to protect.")
    return known


def _reported(settings: Settings) -> str:
    """What a hospital reports beside parameters and counts of images (client allow-list)."""
    counts = ", label counts" if settings.federation.share_label_counts else ""
    ledger = ", and epsilon with its delta, noise and sampling rate" if settings.privacy.on else ""
    if settings.privacy.client_level != "none":
        return ledger
    return f", losses of the generator{ledger}" if settings.privacy.on else f"{counts}, and losses"


def _not_attacked(audit: Audit) -> list[str]:
    """What is not known without a valid audit."""
    if not audit.exists:
        return list(ATTACKS_NOT_RUN)
    if not audit.is_valid:
        return [
            "Membership inference, and copies of training images: the audit that was run is not "
            "valid."
        ]
    return []


def _guarantee(card: CardData) -> Tree:
    """Differential privacy: statement, terms and cost per hospital (`infinite`: no bound)."""
    costs = privacy_costs(card.data)
    return {
        "on": card.data.settings.privacy.on,
        "client_level": {
            "statement": client_level_statement(card.data),
            **client_level_cost(card.data),
        },
        "statement": statement(card.data),
        "meaning": meaning(costs),
        "hospitals": [
            {
                "name": cost.name,
                "epsilon": cost.epsilon,
                "infinite": cost.is_infinite,
                "delta": cost.delta,
                "noise_multiplier": cost.noise_multiplier,
                "sample_rate": cost.sample_rate,
                "stopped_in_round": cost.stopped,
            }
            for cost in costs
        ],
        "terms": [{"term": term, "text": text} for term, text in terms(card.data)],
    }


def _audit(audit: Audit) -> Tree:
    """The verdict and, if the audit is valid, the worst figure of each measure."""
    if not audit.exists:
        return {
            "exists": False,
            "verdict": f"No audit was run. Command: {COMMAND}.",
            "round": None,
            "figures": [],
        }
    worst: dict[str, Figure] = {}
    for figure in audit.figures if audit.is_valid else []:
        other = worst.get(figure.measure)
        if figure.value is not None and (other is None or _excess(figure) > _excess(other)):
            worst[figure.measure] = figure
    return {
        "exists": True,
        "valid": audit.is_valid,
        "round": audit.round,
        "verdict": audit.verdict(),
        "figures": [_row(figure) for figure in worst.values()],
    }


def _excess(figure: Figure) -> float:
    return (figure.value or 0.0) - (figure.real or 0.0)


def _row(figure: Figure) -> dict[str, Any]:
    return {
        "criterion": figure.criterion,
        "measure": figure.measure,
        "hospital": figure.hospital,
        "value": figure.value,
        "value_ci": figure.ci,
        "held_out": figure.real,
        "held_out_ci": figure.real_ci,
        "stands_out": figure.stands_out,
    }
