"""The facts of the three cards: the model, the images that it learned from, and a synthetic set drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgan import __version__
from fedgan.config import to_dict
from fedgan.report.cards import words
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

FEDERATED = (
    "federated",
    "finetuned",
    "coalition",
)  # arms in which something travels from hospital to server


def model_facts(card: CardData) -> Tree:
    """The model card as JSON (Mitchell et al. 2019): details, use, training, metrics, limits, privacy, blanks."""
    data, hospitals, sources = card.data, hospital_rows(card.data), source_rows(card.data)
    metrics = figures(data.evaluation)
    open_fields = [
        words.CONTACT,
        words.MODEL_LICENCE,
        words.CITATION,
        words.VALIDATION,
        words.MAINTENANCE,
    ]
    return card.publish(
        {
            "format": "fedgan-model-card-1",
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
            "intended_use": list(words.INTENDED),
            "out_of_scope_use": list(words.OUT_OF_SCOPE),
            "metrics": metrics,
            "limits": [*_run_limits(card), *limits(metrics), *data_limits(hospitals)],
            "privacy": privacy_facts(card, _is_federated(card)),
            "blanks": words.blanks(open_fields),
            "problems": list(card.problems),
            "provenance": provenance(card),
        }
    )


def dataset_facts(card: CardData) -> Tree:
    """The card of the training images as JSON (Datasheets for Datasets): composition, sources, use, limits, blanks."""
    data, hospitals, sources = card.data, hospital_rows(card.data), source_rows(card.data)
    settings = data.settings
    open_fields = [words.CONTACT, *(() if card.phantoms else words.OF_PATIENTS), words.MAINTENANCE]
    return card.publish(
        {
            "format": "fedgan-dataset-card-1",
            "name": settings.name,
            "description": settings.description,
            "phantoms": card.phantoms,
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
                "Anything that the hospitals' approvals and the licences of the sources do not allow."
            ],
            "limits": [*_phantom_limits(card), *data_limits(hospitals)],
            "blanks": [*words.blanks(open_fields), *_source_blanks(sources)],
            "problems": list(card.problems),
            "provenance": provenance(card),
        }
    )


@dataclass(frozen=True)
class Release:
    """What was drawn for a released set. `counts`: images that have each label; `asked`: the label mix in words."""

    images: int
    counts: dict[str, int]
    unlabelled: int
    asked: str
    seed: int
    psi: float
    meta: Tree  # of the checkpoint that drew it
    created: str | None = None
    release_filter: Tree | None = None  # what the release filter did, where it was on


def release_facts(card: CardData, release: Release) -> Tree:
    """The card of a released synthetic set as JSON. No time, path or machine enters it: the same draw gives the same card."""
    data, rows, metrics = card.data, hospital_rows(card.data), figures(card.data.evaluation)
    # Handed on with the images: no count so small that it may tell of a person, and no hash of a hospital's images.
    sources = [
        {key: row[key] for key in ("hospital", "source", "licence")}
        for row in source_rows(card.data)
    ]
    open_fields = [
        words.RELEASE_LICENCE,
        words.RELEASE_CONTACT,
        words.RELEASE_APPROVAL,
        words.VALIDATION,
        words.RELEASE_MAINTENANCE,
    ]
    meta, whole = release.meta, totals(rows)
    return card.publish(
        {
            "format": "fedgan-release-card-1",
            "name": f"{data.settings.name}, synthetic",
            "description": data.settings.description,
            "statement": words.STATEMENT,
            "synthetic": True,
            "images": release.images,
            "counts": release.counts,
            "unlabelled": release.unlabelled,
            "label_mix_asked": release.asked,
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
            "intended_use": list(words.INTENDED),
            "out_of_scope_use": list(words.OUT_OF_SCOPE),
            "metrics": without_small(metrics),
            "metrics_of": _measured_on(card, release),
            "limits": [
                *_absent_classes(release),
                *_phantom_limits(card),
                *limits(metrics, counts=False),
                *data_limits(rows, counts=False),
            ],
            "privacy": privacy_facts(card, _is_federated(card), counts=False),
            "blanks": words.blanks(
                [*open_fields, *(() if release.created else (words.RELEASE_DATE,))]
            )
            + _source_blanks(sources),
            "problems": list(card.data.problems),
            "counts_withheld_below": FEW_IMAGES,
        }
    )


# --- parts of the cards --------------------------------------------------------------------------


def _details(card: CardData) -> Tree:
    settings, held = card.data.settings, card.checkpoint
    return {
        "architecture": "StyleGAN2 with adaptive discriminator augmentation (arXiv 1912.04958, 2006.06676)",
        "conditional": bool(card.label_names),
        "label_names": card.label_names,
        "exclusive": held.get("exclusive"),
        "resolution": held.get("resolution") or settings.data.resolution,
        "channels": held.get("channels"),
        "model": to_dict(settings)["model"],
        "round": held.get("round"),
        "file": held.get("file"),
        "sha256": held.get("sha256"),
    }


def _is_federated(card: CardData) -> bool:
    """Whether parameters are known to have travelled; a coalition of one hospital trains at home."""
    return card.arm in FEDERATED and not (
        card.arm == "coalition" and len(card.data.settings.federation.members) == 1
    )


def _training(card: CardData) -> Tree:
    data, federated = card.data, _is_federated(card)
    federation, planned = data.settings.federation, data.settings.training.kimg * 1000
    alone = card.arm == "coalition" and not federated
    return {
        "arm": card.arm,
        "arm_in_words": words.ARMS["local"] if alone else words.ARMS.get(card.arm, card.arm),
        "federated": federated,
        "strategy": federation.strategy if federated else None,
        "exchange": list(federation.exchange) if federated else [],
        "rounds": card.checkpoint.get("round") or data.last_round.get("round"),
        "rounds_planned": None if card.is_member else federation.rounds,
        "images_seen": _known(card, "images_seen"),
        "images_planned": None if card.is_member else planned,
        "wall_seconds": _known(card, "wall_seconds"),
        "bytes_exchanged": _known(card, "bytes_exchanged"),
        "members": data.hospital_names if card.is_member else list(federation.members),
        "note": words.OF_A_MEMBER[card.arm]
        if card.is_member and card.arm in words.OF_A_MEMBER
        else None,
    }


def _known(card: CardData, key: str) -> float | None:
    """A cumulative count at the model that the card describes, or else of the run."""
    held = number(card.checkpoint.get(key))
    return held if held is not None else card.data.total(key)


def _run_limits(card: CardData) -> list[str]:
    settings, found = card.data.settings, _phantom_limits(card)
    side = card.checkpoint.get("resolution") or settings.data.resolution
    found.append(
        f"Images have {side}×{side} pixels: a finding smaller than a pixel of that grid is not shown."
    )
    found.append(
        "The figures are of one training with one seed: they do not say how much another seed would change them."
    )
    done = card.checkpoint.get("round")
    if done is not None and done < settings.federation.rounds and not card.is_member:
        found.append(
            f"The training is not finished: {done} of {settings.federation.rounds} rounds."
        )
    measured = number(card.data.evaluation.get("round"))
    if done is not None and measured is not None and measured != done:
        found.append(f"The figures are of round {measured:g}, the model is that of round {done}.")
    return found


def _phantom_limits(card: CardData) -> list[str]:
    if not card.phantoms:
        return []
    return [
        "The training images are phantoms, drawn by a program: the figures say nothing of real patients."
    ]


def _absent_classes(release: Release) -> list[str]:
    absent = [label for label, count in release.counts.items() if count == 0]
    return (
        [
            f"No image of {', '.join(absent)} is in this set: the label mix that was asked for has none."
        ]
        if absent
        else []
    )


def _measured_on(card: CardData, release: Release) -> str:
    """One sentence: which images the figures were measured on, so that nobody takes them for figures of this set."""
    evaluation, meta = card.data.evaluation, release.meta
    if not evaluation:
        return "Nothing was measured on this generator: evaluation.json is not there or could not be read."
    count = number(tree(evaluation.get("utility")).get("synthetic_images"))
    psi, turn = number(evaluation.get("psi")), number(evaluation.get("round"))
    images = "other images" if count is None else f"{plural(round(count), 'other image')}"
    parts = [f"The figures were measured on {images} of the run's generator, not on this set"]
    if psi is not None and psi != release.psi:
        parts.append(f"psi was {psi:g} there and is {release.psi:g} here")
    if turn is not None and turn != number(meta.get("round")):
        parts.append(
            f"the generator was that of round {turn:g} there and is that of round {meta.get('round')} here"
        )
    return "; ".join([*parts, "the label mix may differ"]) + "."


def _source_blanks(sources: list[Tree]) -> list[dict[str, Any]]:
    """Blanks for what environment.json does not say of the sources."""
    if not sources:
        return words.blanks(
            [
                (
                    "sources and licences",
                    words.HOSPITAL,
                    "where its images come from, and under which licence",
                )
            ]
        )
    return words.blanks(
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
