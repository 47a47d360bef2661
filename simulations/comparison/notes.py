"""Sentences of comparison.json: what was not measured, how arms differ, and the provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedgan
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, to_dict
from fedgan.evaluation.arms.paired import NOTE
from fedgan.runs.round_state import keeps_average
from simulations.comparison.ablation import KIND
from simulations.comparison.arm import FEDERATION, Arm, Outcome


def not_measured(settings: Settings, outcomes: Sequence[Outcome]) -> list[str]:
    """Sentences on what a reader might look for and does not find."""
    sentences = [
        f"{outcome.arm.label} failed and has no figures: {outcome.failure}."
        for outcome in outcomes
        if not outcome.is_done
    ]
    kinds = {outcome.arm.kind for outcome in outcomes}
    # an ablation is about the parts of the training, not about the hospitals
    if settings.comparison.kind != KIND:
        if "coalition" not in kinds:
            sentences.append(
                "What each hospital contributes (leave-one-out, Shapley values): comparison.arms "
                "has no 'coalitions'."
            )
        for kind in ("centralized", "federated", "local"):
            if kind not in kinds:
                sentences.append(f"comparison.arms has no '{kind}'.")
    if settings.evaluation.suite == "quick":
        sentences.append(
            "Mixed training sets, training on real and testing on synthetic images, label "
            "fidelity, figures by class and by hospital, MS-SSIM and path length: evaluation.suite "
            "is 'quick'."
        )
    if settings.comparison.seeds < 3:
        count = settings.comparison.seeds
        sentences.append(
            "The spread over trainings is estimated from "
            f"{count} {'seed' if count == 1 else 'seeds'} per arm only."
        )
    privacies = [(outcome.arm.kind, outcome.arm.jobs[0].settings.privacy) for outcome in outcomes]
    training = "none was trained with differential privacy"
    if any(privacy.on for _, privacy in privacies):
        training = "their ε is in the table"
    elif any(
        privacy.client_level != "none" and kind not in ("centralized", "local")
        for kind, privacy in privacies
    ):
        training = (
            "none was trained with differential privacy for images or patients; the federated ones "
            "have client-level DP, which protects whole hospitals"
        )
    sentences.append(f"Privacy: no attack was run on these generators and {training}.")
    return sentences


def differences_of_arms(
    outcomes: Sequence[Outcome], entries: Mapping[Path, Mapping[str, Any]]
) -> list[str]:
    """Sentences on what arms do not share."""
    sentences = []
    done = [entry for entry in entries.values() if entry["images_seen"] is not None]
    if len({entry["images_seen"] for entry in done if not entry["exhausted"]}) > 1:
        seen = dict.fromkeys(f"{entry['name']} {entry['images_seen']:,}" for entry in done)
        sentences.append(
            "Arms have batches of several sizes, so each sees the budget rounded up to its own "
            f"whole batches (images seen: {', '.join(seen)})."
        )
    for entry in done:
        if entry["exhausted"]:
            sentences.append(
                f"In {entry['name']}, seed {entry['seed']} the privacy budget ended before the "
                f"images: {', '.join(entry['exhausted'])} stopped early."
            )
    if pretrained := dict.fromkeys(
        f"{entry['name']} {entry['public_pretraining']['images']:,}"
        for entry in done
        if entry["public_pretraining"]
    ):
        sentences.append(
            "Some arms start from a training on public phantoms, whose images are not in the "
            f"budget (public images: {', '.join(pretrained)})."
        )
    by_server = [outcome.arm.name for outcome in outcomes if _is_averaged_by_server(outcome.arm)]
    if by_server and len(by_server) < len(outcomes):
        names = ", ".join(dict.fromkeys(by_server))
        sentences.append(
            "The evaluated generator is a moving average: over rounds, by the server, in "
            f"{names}; over steps elsewhere."
        )
    if arm := next((outcome.arm for outcome in outcomes if outcome.arm.kind == "local"), None):
        own = ", ".join(f"{name} {images:,}" for name, images in arm.hospital_images.items())
        sentences.append(
            "Each hospital alone sees its own share of the budget, as many images as in the "
            f"federation ({own}); the arm 'coalitions' gives each hospital alone the whole budget."
        )
    return sentences


def _is_averaged_by_server(arm: Arm) -> bool:
    return any(job.kind == FEDERATION and keeps_average(job.settings) for job in arm.jobs)


def evaluation_notes(entries: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """The notes of the evaluations, each once, with its arms where these are not all of them."""
    arms_of: dict[str, list[str]] = {}
    evaluated = [entry for entry in entries.values() if entry["evaluation"]]
    for entry in evaluated:
        for note in entry["evaluation"].get("notes", []):
            arms_of.setdefault(note, []).append(f"{entry['name']}, seed {entry['seed']}")
    notes = [
        note if len(arms) == len(evaluated) else f"{note} ({'; '.join(arms)})"
        for note, arms in arms_of.items()
    ]
    return [NOTE, *notes]


def provenance(settings: Settings, folder: ComparisonFolder) -> dict[str, Any]:
    """Environment, data sources and settings of the comparison, without paths of this machine."""
    environment = dict(folder.read_json(folder.environment) or {})
    sources = environment.pop("sources", [])
    tree = to_dict(settings)
    for section in ("data", "evaluation"):
        root = tree[section]["root"]
        tree[section]["root"] = Path(root).name if root else ""
    if "/" in tree["evaluation"]["features"]:
        tree["evaluation"]["features"] = Path(tree["evaluation"]["features"]).name
    return {
        "environment": environment,
        "settings": tree,
        "sources": sources,
        "settings_hash": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest(),
        "code_version": fedgan.__version__,
    }
