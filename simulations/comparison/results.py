"""From the arms' folders to comparison.json: every number of the page, and what could not be measured, in words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedgan import files
from fedgan.config import Settings, to_dict
from fedgan.errors import ConfigError
from fedgan.evaluation.arms import ablation
from fedgan.evaluation.arms import summary as rows
from fedgan.evaluation.arms.contribution import contribution
from fedgan.evaluation.arms.paired import bootstrap_auc, compare_arms, standard_families
from fedgan.run_folder import RunFolder
from simulations.comparison.ablation import keys_of
from simulations.comparison.arm import Arm, Job, Outcome
from simulations.comparison.evaluate import EvaluationContext, read_scores
from simulations.comparison.notes import fairness, not_measured, notes, provenance
from simulations.comparison.privacy_cost import spent

__all__ = ["Outcome", "assemble"]

FORMAT = 1
KEPT_ELSEWHERE = ("arm", "name", "round")
LOSSES = ("loss_g", "loss_d", "r_t", "p")
PLAIN_FEDERATED = "federated"


def assemble(context: EvaluationContext, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that comparison.json says. Raises `ConfigError` when finished arms were not trained and judged alike."""
    settings, folder, reference = context.settings, context.folder, context.reference
    done = [outcome for outcome in outcomes if outcome.done]
    entries = {outcome.arm.folder: _entry(context, outcome) for outcome in outcomes}
    rows.check_comparable(
        [_alike(settings, outcome.arm, entries[outcome.arm.folder]) for outcome in done]
    )
    _check_evaluated_here(context, entries)
    curves = [
        entries[outcome.arm.folder]["curve"] for outcome in done if outcome.arm.kind != "coalition"
    ]
    threshold = settings.comparison.frechet or rows.frechet_threshold(curves)
    for entry in entries.values():
        entry["cost"]["kimg_to_frechet"] = (
            rows.kimg_to_frechet(entry["curve"], threshold) if entry["status"] == "done" else None
        )

    found = _statistics(context, outcomes, entries)
    return {
        "format": FORMAT,
        "name": settings.name,
        "description": settings.description,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seeds": sorted({outcome.arm.seed for outcome in outcomes}),
        "label_names": list(reference.train.label_names),
        "exclusive": reference.train.exclusive,
        "resolution": settings.data.resolution,
        "channels": reference.train.channels,
        "hospitals": folder.read_json(folder.hospitals),
        "margin": settings.comparison.margin,
        "images_seen_budget": max(
            (sum(outcome.arm.hospital_images.values()) for outcome in outcomes), default=0
        ),
        **found,
        "arms": list(entries.values()),
        "extractor": reference.extractor.name if reference.can_extract else None,
        "fid": reference.can_extract and reference.extractor.is_fid,
        "classifier": reference.classifier_name,
        "suite": settings.evaluation.suite,
        "frechet_threshold": threshold,
        "not_measured": not_measured(settings, outcomes),
        "notes": [*fairness(outcomes, entries), *notes(entries)],
        "provenance": provenance(settings, folder),
    }


# --- one arm ---------------------------------------------------------------------------------------


def _entry(context: EvaluationContext, outcome: Outcome) -> dict[str, Any]:
    """An arm with one seed, whatever became of it: a failed one keeps its row, with its reason."""
    arm = outcome.arm
    lines = [files.read_json_lines(job.run.metrics) for job in arm.jobs]
    entry: dict[str, Any] = {
        "arm": arm.kind,
        "name": arm.name,
        "seed": arm.seed,
        "folder": str(arm.folder.relative_to(context.folder.path)),
        "status": "done" if outcome.done else "failed",
        "failure": outcome.failure or None,
        "images_seen": sum(job[-1]["images_seen"] for job in lines) if all(lines) else None,
        "hospital_images": dict(arm.hospital_images),
        "members_names": list(arm.members),
        "overrides": keys_of(arm.overrides),
        "parent": arm.parent or None,
        "changes": keys_of(arm.changes),
        "public": _public(arm),
        "privacy": spent(arm, context.hospitals) if outcome.done else None,
        "stopped": _stopped(lines),
        "cost": _cost(arm, lines),
        "curve": [],
        "losses": _losses(lines),
        "evaluation": None,
        "members": [],
    }
    if outcome.done:
        entry["curve"] = arm.run.read_json(arm.run.path / "curve.json") or []
        entry["evaluation"] = {
            key: value
            for key, value in (arm.run.read_json(arm.run.evaluation) or {}).items()
            if key not in KEPT_ELSEWHERE
        }
        if arm.by_hospital:
            entry["members"] = [_member(context, job) for job in arm.jobs]
    return entry


def _public(arm: Arm) -> dict[str, Any] | None:
    """What the training on public phantoms showed and took that an arm begins from; none of it is in the arm's own figures."""
    if arm.public is None:
        return None
    lines = files.read_json_lines(arm.public.run.metrics)
    if not lines:
        return None
    return {
        key: lines[-1].get(kept)
        for key, kept in (("images", "images_seen"), ("wall_seconds", "wall_seconds"))
    }


def _stopped(lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Hospitals whose privacy budget ended before their images."""
    rows = [row for job in lines for line in job for row in line["hospitals"]]
    return list(dict.fromkeys(row["name"] for row in rows if row.get("exhausted")))


def _member(context: EvaluationContext, job: Job) -> dict[str, Any]:
    """One hospital's own generator."""
    name = job.members[0]
    hospital = next(hospital for hospital in context.hospitals if hospital.name == name)
    found = job.run.read_json(job.run.evaluation) or {}
    counts = hospital.train.labels.sum(0)
    lines = files.read_json_lines(job.run.metrics)
    return {
        "hospital": name,
        "images_seen": lines[-1]["images_seen"] if lines else 0,
        "classes_held": [
            label for label, count in zip(hospital.train.label_names, counts, strict=True) if count
        ],
        "utility": found.get("utility"),
        "fidelity": found.get("fidelity"),
    }


def _cost(arm: Arm, lines: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the trainings of an arm took. One that goes on from a federation's round has that federation's cost until then."""
    runs = [list(job) for job in lines]
    for folder, number in {(job.start.folder, job.start.round) for job in arm.jobs if job.start}:
        runs.append(
            [
                line
                for line in files.read_json_lines(RunFolder(folder).metrics)
                if line["round"] <= number
            ]
        )
    hospitals = [row for run in runs for line in run for row in line["hospitals"]]
    ends = [run[-1] for run in runs if run]
    return {
        "wall_seconds": sum(line["wall_seconds"] for line in ends) if ends else None,
        "core_seconds": sum(row.get("core_seconds", 0.0) for row in hospitals)
        if hospitals
        else None,
        "bytes_exchanged": sum(line["bytes_exchanged"] for line in ends) if ends else None,
        "peak_memory_bytes": max(
            (row.get("peak_memory_bytes", 0.0) for row in hospitals), default=None
        ),
        "rounds": max((line["round"] for line in ends), default=None),
        "threads": arm.jobs[0].settings.federation.threads,
    }


def _losses(lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Losses by images seen, at most about a hundred points; of an arm without a server their weighted mean."""
    if not all(lines):
        return []
    points = []
    for number in range(min(len(job) for job in lines)):
        at = [job[number] for job in lines]
        seen = [sum(row["images"] for row in line["hospitals"]) for line in at]
        point: dict[str, Any] = {"images_seen": sum(line["images_seen"] for line in at)}
        for key in LOSSES:
            known = [
                (line["mean"][key], weight)
                for line, weight in zip(at, seen, strict=True)
                if key in line["mean"] and weight
            ]
            point[key] = (
                sum(value * weight for value, weight in known) / sum(w for _, w in known)
                if known
                else None
            )
        points.append(point)
    step = max(1, len(points) // 100)
    return points[::-1][::step][::-1]


def _alike(settings: Settings, arm: Arm, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `check_comparable` compares: read from the folders, not from the plan."""
    job = arm.jobs[0]
    trained = to_dict(job.run.settings())
    if (
        arm.by_hospital and job.settings.federation.batch == "shared"
    ):  # each trained with its part of one step
        trained["training"]["batch_size"] = sum(
            job.settings.training.batch_size for job in arm.jobs
        )
    return {
        "name": arm.name,
        "seed": arm.seed,
        "images_seen": entry["images_seen"],
        "declared": entry["overrides"] if arm.parent else {},
        "stopped": entry["stopped"],
        "settings": trained | {"evaluation": to_dict(settings)["evaluation"]},
        "resolution": trained["data"]["resolution"],
        "label_names": entry["evaluation"]["label_names"],
        "evaluator": entry["evaluation"]["evaluator"]
        | {"extractor": entry["evaluation"]["evaluator"]["extractor"] or "none"},
    }


def _check_evaluated_here(
    context: EvaluationContext, entries: Mapping[Path, Mapping[str, Any]]
) -> None:
    """Raise `ConfigError` when an arm was judged on other test images than those that its scores are compared on."""
    for entry in entries.values():
        if (
            entry["evaluation"]
            and entry["evaluation"]["evaluator"]["test_hash"] != context.reference.test_hash
        ):
            raise ConfigError(
                f"arm '{entry['name']}' (seed {entry['seed']}) was judged on other test images than the data hold now: "
                "the data have changed, give another --output"
            )


# --- over all arms ---------------------------------------------------------------------------------


def _statistics(
    context: EvaluationContext,
    outcomes: Sequence[Outcome],
    entries: Mapping[Path, Mapping[str, Any]],
) -> dict[str, Any]:
    """summary, comparisons, cross_site, contribution and answer; empty where there are no classes to tell apart."""
    reference, settings = context.reference, context.settings
    if not reference.has_classes or len(reference.test) < 2:
        sentence = "What federation costs and gains is unknown: the images have no classes that a classifier could tell apart."
        return {
            "answer": sentence,
            "summary": [],
            "comparisons": [],
            "cross_site": None,
            "contribution": None,
            "ablation": None,
        }
    test = rows.RealTest(
        reference.test.labels,
        reference.test.label_names,
        reference.test.exclusive,
        reference.test_groups,
        reference.test_institutions,
        settings.evaluation.bootstrap,
        settings.seed,
    )
    groups = _rows_of(outcomes, entries)
    summary = [rows.real_row(reference.scores, test)]
    scores, seeds = {"real": reference.scores}, dict[str, list[int]]()
    for (kind, name, hospital), runs in groups.items():
        summary.append(rows.summary_row(kind, name, runs, test, hospital))
        if runs:
            scores[name] = np.concatenate([run.scores for run in runs])
            seeds[name] = [run.seed for run in runs for _ in range(len(run.scores))]
    comparisons = compare_arms(
        scores,
        standard_families(summary) | ablation.families(list(entries.values())),
        test.labels,
        test.exclusive,
        test.groups,
        settings.comparison.margin,
        settings.evaluation.bootstrap,
        settings.seed,
        seeds,
    )
    names = [hospital.name for hospital in context.hospitals]
    shown = [row for row in summary if row["arm"] != "coalition"]
    ladder = ablation.ladder(list(entries.values()), summary, comparisons)
    said = (
        ablation.answer(ladder)
        if ladder
        else rows.answer(summary, comparisons, names, _first_federated(summary))
    )
    return {
        "answer": said,
        "ablation": ladder,
        "summary": summary,
        "comparisons": comparisons,
        "cross_site": rows.cross_site(
            shown, sorted({str(place) for place in test.institutions}, key=_order(names))
        ),
        "contribution": _contribution(outcomes, scores, test, names),
    }


def _rows_of(
    outcomes: Sequence[Outcome], entries: Mapping[Path, Mapping[str, Any]]
) -> dict[tuple[str, str, str | None], list[rows.Run]]:
    """The trainings behind each row of the summary: an arm over its seeds, and each hospital alone over its seeds."""
    found: dict[tuple[str, str, str | None], list[rows.Run]] = {}
    for outcome in outcomes:
        arm, entry = outcome.arm, entries[outcome.arm.folder]
        whole = found.setdefault((arm.kind, arm.name, None), [])
        if outcome.done:
            _add(whole, arm.run, arm.seed, entry["images_seen"], entry["evaluation"])
    for outcome in outcomes:
        arm, entry = outcome.arm, entries[outcome.arm.folder]
        if not arm.by_hospital:
            continue
        for number, job in enumerate(arm.jobs):
            own = found.setdefault((arm.kind, f"{arm.name}: {job.members[0]}", job.members[0]), [])
            if outcome.done:
                member = entry["members"][number]
                _add(own, job.run, arm.seed, member["images_seen"], member)
    return found


def _add(
    runs: list[rows.Run], run: RunFolder, seed: int, images_seen: int, evaluation: Mapping[str, Any]
) -> None:
    scores = read_scores(run)
    if scores is not None:
        runs.append(rows.Run(seed, images_seen, scores, evaluation.get("fidelity") or {}))


def _first_federated(summary: Sequence[Mapping[str, Any]]) -> str | None:
    """The arm that the answer is about: the one called 'federated', else the first federated one that was measured."""
    measured = [
        row["name"]
        for row in summary
        if row["arm"] == "federated" and row.get("macro_auc") is not None
    ]
    return PLAIN_FEDERATED if PLAIN_FEDERATED in measured else next(iter(measured), None)


def _contribution(
    outcomes: Sequence[Outcome],
    scores: Mapping[str, np.ndarray],
    test: rows.RealTest,
    names: Sequence[str],
) -> dict[str, Any] | None:
    """What each hospital adds; None where the arm 'coalitions' was not asked for."""
    coalitions = {
        outcome.arm.name: outcome.arm.members
        for outcome in outcomes
        if outcome.arm.kind == "coalition"
    }
    if not coalitions:
        return None
    coalitions[PLAIN_FEDERATED] = tuple(names)
    aucs = {
        frozenset(members): bootstrap_auc(
            scores[name], test.labels, test.groups, test.bootstrap, test.seed
        )
        for name, members in coalitions.items()
        if name in scores
    }
    return contribution(
        {key: auc.value for key, auc in aucs.items()},
        {key: auc.draws for key, auc in aucs.items()},
        names,
    )


def _order(names: Sequence[str]) -> Any:
    return lambda place: (names.index(place) if place in names else len(names), place)
