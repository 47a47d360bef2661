"""Facts of the three cards: model, training images, and a released synthetic set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgan import __version__
from fedgan.config import to_dict
from fedgan.report.cards import statements
from fedgan.report.cards.collect import (
    CardData,
    hospital_rows,
    licences,
    provenance,
    source_rows,
    totals,
)
from fedgan.report.cards.figures import FEW_IMAGES, data_limits, figures, limits, without_small
from fedgan.report.cards.privacy import privacy_facts
from fedgan.report.html.format import number, plural
from fedgan.report.run.data import Tree, tree

FEDERATED = ("federated", "finetuned", "coalition")  # arms that exchange parameters


def model_facts(card: CardData) -> Tree:
    """The model card as JSON (Mitchell et al. 2019)."""
    data, hospitals, sources = card.data, hospital_rows(card.data), source_rows(card.data)
    metrics = figures(data.evaluation)
    blank_fields = [
        statements.CONTACT,
        statements.MODEL_LICENCE,
        statements.CITATION,
        statements.VALIDATION,
        statements.MAINTENANCE,
    ]
    return card.redact(
        {
            "format": "fedgan-model-card-2",
            "name": data.settings.name,
            "description": data.settings.description,
            "details": _details(card),
            "training": _training(card),
            "data": {
                "hospitals": hospitals,
                "totals": totals(hospitals),
                "sources": sources,
                "licences": licences(sources),
            },
            "intended_use": list(statements.INTENDED),
            "out_of_scope_use": list(statements.OUT_OF_SCOPE),
            "metrics": metrics,
            "limits": [*_run_limits(card), *limits(metrics), *data_limits(hospitals)],
            "privacy": privacy_facts(card, _is_federated(card)),
            "blanks": statements.blanks(blank_fields),
            "problems": list(card.problems),
            "provenance": provenance(card),
        }
    )


def dataset_facts(card: CardData) -> Tree:
    """The card of the training images as JSON (Datasheets for Datasets)."""
    data, hospitals, sources = card.data, hospital_rows(card.data), source_rows(card.data)
    settings = data.settings
    blank_fields = [
        statements.CONTACT,
        *(() if card.has_only_phantoms else statements.PATIENT_BLANKS),
        statements.MAINTENANCE,
    ]
    return card.redact(
        {
            "format": "fedgan-dataset-card-1",
            "name": settings.name,
            "description": settings.description,
            "phantoms": card.has_only_phantoms,
            "resolution": card.checkpoint.get("resolution") or settings.data.resolution,
            "channels": card.checkpoint.get("channels"),
            "label_names": card.label_names,
            "exclusive": card.checkpoint.get("exclusive"),
            "hospitals": hospitals,
            "totals": totals(hospitals),
            "sources": sources,
            "licences": licences(sources),
            "without_licence": [row["hospital"] for row in sources if row["licence"] is None],
            "partition": settings.data.partition,
            "label_map": settings.data.label_map,
            "out_of_scope_use": [
                "Anything that the approvals of the hospitals or the licences of the sources "
                "forbid."
            ],
            "limits": [*_phantom_limits(card), *data_limits(hospitals)],
            "blanks": [*statements.blanks(blank_fields), *_source_blanks(sources)],
            "problems": list(card.problems),
            "provenance": provenance(card),
        }
    )


@dataclass(frozen=True)
class Release:
    """A released set. `counts`: images per label; `label_mix`: the requested mix as text."""

    images: int
    counts: dict[str, int]
    unlabelled: int
    label_mix: str
    seed: int
    psi: float
    meta: Tree  # of the checkpoint
    created: str | None = None
    release_filter: Tree | None = None  # its report, if it was on


def release_facts(card: CardData, release: Release) -> Tree:
    """The card of a released synthetic set as JSON.

    It contains no time, path or machine: the same set gives the same card.
    """
    data, rows, metrics = card.data, hospital_rows(card.data), figures(card.data.evaluation)
    # The card is released with the images: no small counts and no content hashes of hospitals.
    sources = [
        {key: row[key] for key in ("hospital", "source", "licence")}
        for row in source_rows(card.data)
    ]
    blank_fields = [
        statements.RELEASE_LICENCE,
        statements.RELEASE_CONTACT,
        statements.RELEASE_APPROVAL,
        statements.VALIDATION,
        statements.RELEASE_MAINTENANCE,
    ]
    meta, whole = release.meta, totals(rows)
    return card.redact(
        {
            "format": "fedgan-release-card-2",
            "name": f"{data.settings.name}, synthetic",
            "description": data.settings.description,
            "statement": statements.STATEMENT,
            "synthetic": True,
            "images": release.images,
            "counts": release.counts,
            "unlabelled": release.unlabelled,
            "label_mix": release.label_mix,
            "label_names": list(meta["label_names"]),
            "exclusive": bool(meta["exclusive"]),
            "resolution": meta["resolution"],
            "channels": meta["channels"],
            "created": release.created,
            "release_filter": release.release_filter,
            "generator": {
                "checkpoint_sha256": meta["sha256"],
                "round": meta.get("round"),
                "images_seen": meta.get("images_seen"),
                "seed": release.seed,
                "psi": release.psi,
                "arm": card.arm,
                "written_by": f"fedgan {__version__}",
            },
            "sources": sources,
            "licences": licences(sources),
            "without_licence": [row["hospital"] for row in sources if row["licence"] is None],
            "totals": {
                "hospitals": whole["hospitals"],
                "images": {"train": whole["images"]["train"]},
            },
            "intended_use": list(statements.INTENDED),
            "out_of_scope_use": list(statements.OUT_OF_SCOPE),
            "metrics": without_small(metrics),
            "metrics_of": _measured_on(card, release),
            "limits": [
                *_absent_classes(release),
                *_phantom_limits(card),
                *limits(metrics, counts=False),
                *data_limits(rows, counts=False),
            ],
            "privacy": privacy_facts(card, _is_federated(card), counts=False),
            "blanks": statements.blanks(
                [*blank_fields, *(() if release.created else (statements.RELEASE_DATE,))]
            )
            + _source_blanks(sources),
            "problems": list(card.data.problems),
            "counts_withheld_below": FEW_IMAGES,
        }
    )


# --- parts of the cards --------------------------------------------------------------------------


def _details(card: CardData) -> Tree:
    settings, checkpoint = card.data.settings, card.checkpoint
    return {
        "architecture": "StyleGAN2 with adaptive discriminator augmentation "
        "(arXiv 1912.04958, 2006.06676)",
        "conditional": bool(card.label_names),
        "label_names": card.label_names,
        "exclusive": checkpoint.get("exclusive"),
        "resolution": checkpoint.get("resolution") or settings.data.resolution,
        "channels": checkpoint.get("channels"),
        "model": to_dict(settings)["model"],
        "round": checkpoint.get("round"),
        "file": checkpoint.get("file"),
        "sha256": checkpoint.get("sha256"),
    }


def _is_federated(card: CardData) -> bool:
    """Whether parameters were exchanged, as far as is known; a coalition of one trains alone."""
    return card.arm in FEDERATED and not (
        card.arm == "coalition" and len(card.data.settings.federation.members) == 1
    )


def _training(card: CardData) -> Tree:
    data, federated = card.data, _is_federated(card)
    federation, planned = data.settings.federation, data.settings.training.kimg * 1000
    is_alone = card.arm == "coalition" and not federated
    return {
        "arm": card.arm,
        "arm_description": statements.ARMS["local" if is_alone else card.arm]
        if is_alone or card.arm in statements.ARMS
        else card.arm,
        "federated": federated,
        "strategy": federation.strategy if federated else None,
        "exchange": list(federation.exchange) if federated else [],
        "rounds": card.checkpoint.get("round") or data.last_round.get("round"),
        "rounds_planned": None if card.is_member else federation.rounds,
        "images_seen": _total(card, "images_seen"),
        "images_planned": None if card.is_member else planned,
        "wall_seconds": _total(card, "wall_seconds"),
        "bytes_exchanged": _total(card, "bytes_exchanged"),
        "members": data.hospital_names if card.is_member else list(federation.members),
        "note": statements.MEMBER_NOTES[card.arm]
        if card.is_member and card.arm in statements.MEMBER_NOTES
        else None,
    }


def _total(card: CardData, key: str) -> float | None:
    """A cumulative count at the checkpoint, or else of the run."""
    found = number(card.checkpoint.get(key))
    return found if found is not None else card.data.total(key)


def _run_limits(card: CardData) -> list[str]:
    settings, found = card.data.settings, _phantom_limits(card)
    side = card.checkpoint.get("resolution") or settings.data.resolution
    found.append(
        f"Images have {side}×{side} pixels: findings smaller than one pixel are not visible."
    )
    found.append(
        "The figures are of one training with one seed: the variation over seeds is not known."
    )
    done = card.checkpoint.get("round")
    if done is not None and done < settings.federation.rounds and not card.is_member:
        found.append(
            f"The training is not finished: {done} of {settings.federation.rounds} rounds."
        )
    measured = number(card.data.evaluation.get("round"))
    if done is not None and measured is not None and measured != done:
        found.append(f"The figures are of round {measured:g}, the model is of round {done}.")
    return found


def _phantom_limits(card: CardData) -> list[str]:
    if not card.has_only_phantoms:
        return []
    return ["The training images are phantoms: the figures do not describe real patients."]


def _absent_classes(release: Release) -> list[str]:
    absent = [label for label, count in release.counts.items() if count == 0]
    return (
        [f"This set contains no image of {', '.join(absent)}: the requested label mix has none."]
        if absent
        else []
    )


def _measured_on(card: CardData, release: Release) -> str:
    """A sentence that names the images on which the figures were measured."""
    evaluation, meta = card.data.evaluation, release.meta
    if not evaluation:
        return (
            "Nothing was measured on this generator: evaluation.json is missing or could not be "
            "read."
        )
    count = number(tree(evaluation.get("utility")).get("synthetic_images"))
    psi, turn = number(evaluation.get("psi")), number(evaluation.get("round"))
    images = "other images" if count is None else f"{plural(round(count), 'other image')}"
    parts = [f"The figures were measured on {images} of the generator of the run, not on this set"]
    if psi is not None and psi != release.psi:
        parts.append(f"psi was {psi:g} there and is {release.psi:g} here")
    if turn is not None and turn != number(meta.get("round")):
        parts.append(
            f"the generator was of round {turn:g} there and is of round {meta.get('round')} here"
        )
    return "; ".join([*parts, "the label mix may differ"]) + "."


def _source_blanks(sources: list[Tree]) -> list[dict[str, Any]]:
    """Blanks for sources and licences that environment.json does not state."""
    if not sources:
        return statements.blanks(
            [
                (
                    "sources and licences",
                    statements.HOSPITAL,
                    "where its images come from, and their licence",
                )
            ]
        )
    return statements.blanks(
        [
            (f"licence of {row['hospital']}", row["hospital"], "the licence of its images")
            for row in sources
            if row["licence"] is None
        ]
        + [
            (f"source of {row['hospital']}", row["hospital"], "where its images come from")
            for row in sources
            if row["source"] is None
        ]
    )
