"""What comparison.json says in words: what was not measured, what arms do not share, and where it all comes from."""

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
from simulations.comparison.arm import Outcome
from simulations.comparison.plan import FEDERATION, Arm


def not_measured(settings: Settings, outcomes: Sequence[Outcome]) -> list[str]:
    """Sentences for what a reader might look for and does not find."""
    said = [
        f"{outcome.arm.label} failed and has no figures: {outcome.failure}."
        for outcome in outcomes
        if not outcome.done
    ]
    kinds = {outcome.arm.kind for outcome in outcomes}
    whole = (
        settings.comparison.kind != KIND
    )  # an ablation asks what a training is made of, not who takes part
    if whole and "coalition" not in kinds:
        said.append(
            "What each hospital contributes (leave-one-out, Shapley values): the arm 'coalitions' was not asked for."
        )
    for kind in ("centralized", "federated", "local"):
        if whole and kind not in kinds:
            said.append(f"The arm '{kind}' was not asked for.")
    if settings.evaluation.suite == "quick":
        said.append(
            "Mixed training sets, training on real and testing on synthetic images, label fidelity, figures by class and by "
            "hospital, MS-SSIM and path length: evaluation.suite is 'quick'."
        )
    if settings.comparison.seeds < 3:
        count = settings.comparison.seeds
        said.append(
            f"The spread over trainings is known from {count} {'seed' if count == 1 else 'seeds'} of each arm alone."
        )
    privacies = [(outcome.arm.kind, outcome.arm.jobs[0].settings.privacy) for outcome in outcomes]
    trained = "none was trained with differential privacy"
    if any(privacy.on for _, privacy in privacies):
        trained = "what they cost in ε stands beside them"
    elif any(
        privacy.client_level != "none" and kind not in ("centralized", "local")
        for kind, privacy in privacies
    ):
        trained = "none hides an image or a patient by differential privacy, only whole hospitals, in what was federated"
    said.append(f"Privacy: no attack was run on these generators and {trained}.")
    return said


def fairness(outcomes: Sequence[Outcome], entries: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Sentences on what arms do not share, where they do not."""
    said = []
    done = [entry for entry in entries.values() if entry["images_seen"] is not None]
    if len({entry["images_seen"] for entry in done if not entry["stopped"]}) > 1:
        seen = dict.fromkeys(f"{entry['name']} {entry['images_seen']:,}" for entry in done)
        said.append(
            "Arms have batches of several sizes, so each shows the budget rounded up to whole batches of its own (images seen: "
            f"{', '.join(seen)})."
        )
    for entry in done:
        if entry["stopped"]:
            who = f"{entry['name']}, seed {entry['seed']}"
            said.append(
                f"In {who} the privacy budget ended before the images: {', '.join(entry['stopped'])} stopped early."
            )
    if public := dict.fromkeys(
        f"{entry['name']} {entry['public']['images']:,}" for entry in done if entry["public"]
    ):
        said.append(
            f"Begun from a training on public phantoms, whose images are not in the budget (public images: {', '.join(public)})."
        )
    by_rounds = [outcome.arm.name for outcome in outcomes if _averaged_by_the_server(outcome.arm)]
    if by_rounds and len(by_rounds) < len(outcomes):
        names = ", ".join(dict.fromkeys(by_rounds))
        said.append(
            f"Judged is an average of the generator: of its rounds, by the server, in {names}; of its steps elsewhere."
        )
    if any(outcome.arm.kind == "local" for outcome in outcomes):
        arm = next(outcome.arm for outcome in outcomes if outcome.arm.kind == "local")
        dealt = ", ".join(f"{name} {images:,}" for name, images in arm.hospital_images.items())
        said.append(
            f"Each hospital alone saw its own share of the budget, as many images as it shows in the federation ({dealt}); "
            "the arm 'coalitions' gives each hospital alone the whole budget."
        )
    return said


def _averaged_by_the_server(arm: Arm) -> bool:
    return any(job.kind == FEDERATION and keeps_average(job.settings) for job in arm.jobs)


def notes(entries: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Sentences of the evaluations, each once, with the arms that they are about where that is not all of them."""
    about: dict[str, list[str]] = {}
    judged = [entry for entry in entries.values() if entry["evaluation"]]
    for entry in judged:
        for note in entry["evaluation"].get("notes", []):
            about.setdefault(note, []).append(f"{entry['name']}, seed {entry['seed']}")
    said = [
        note if len(who) == len(judged) else f"{note} ({'; '.join(who)})"
        for note, who in about.items()
    ]
    return [NOTE, *said]


def provenance(settings: Settings, folder: ComparisonFolder) -> dict[str, Any]:
    environment = dict(folder.read_json(folder.environment) or {})
    sources = environment.pop("sources", [])
    tree = to_dict(settings)
    tree["data"] = {
        **tree["data"],
        "root": Path(settings.data.root).name if settings.data.root else "",
    }
    tree["evaluation"] = {
        **tree["evaluation"],
        "root": Path(settings.evaluation.root).name if settings.evaluation.root else "",
    }
    if "/" in tree["evaluation"]["features"]:
        tree["evaluation"]["features"] = Path(tree["evaluation"]["features"]).name
    return {
        "environment": environment,
        "settings": tree,
        "sources": sources,
        "settings_hash": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest(),
        "code_version": fedgan.__version__,
    }
