"""Assemble comparison.json from the folders of the arms: every number of the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedgan.comparison_folder import FORMAT
from fedgan.config import to_dict
from fedgan.data.federation import Hospital
from fedgan.errors import ConfigError, DataError, FederationError
from fedgan.evaluation.arms import ablation
from fedgan.evaluation.arms import summary as rows
from fedgan.evaluation.arms.contribution import contribution
from fedgan.evaluation.arms.paired import bootstrap_auc, compare_arms, standard_families
from fedgan.privacy.accounting import epsilon_of
from fedgan.privacy.register import ledger_of
from fedgan.run_folder import RunFolder, read_lines
from fedgan.runs.preparation import experiment_of
from simulations.comparison.ablation import overrides_as_dict
from simulations.comparison.arm import Arm, Job, Outcome
from simulations.comparison.evaluate import EvaluationContext, read_scores
from simulations.comparison.notes import (
    differences_of_arms,
    evaluation_notes,
    not_measured,
    provenance,
)

KEPT_ELSEWHERE = ("arm", "name", "round")  # keys of evaluation.json that an entry has already
LOSSES = ("loss_g", "loss_d", "r_t", "p")
PLAIN_FEDERATED = "federated"
Entry = dict[str, Any]
Lines = Sequence[Sequence[Mapping[str, Any]]]  # of metrics.jsonl, per job


def assemble(context: EvaluationContext, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of comparison.json.

    Raises `ConfigError` when finished arms were not trained and evaluated alike.
    """
    settings, folder, reference = context.settings, context.folder, context.reference
    done = [outcome.arm for outcome in outcomes if outcome.is_done]
    entries = {outcome.arm.folder: _entry(context, outcome) for outcome in outcomes}
    rows.check_comparable([_comparable_facts(context, arm, entries[arm.folder]) for arm in done])
    _check_same_test_images(context, entries)
    curves = [entries[arm.folder]["curve"] for arm in done if arm.kind != "coalition"]
    threshold = settings.comparison.frechet or rows.frechet_threshold(curves)
    for entry in entries.values():
        entry["cost"]["kimg_to_frechet"] = (
            rows.kimg_to_frechet(entry["curve"], threshold) if entry["status"] == "done" else None
        )
    budgets = [sum(outcome.arm.hospital_images.values()) for outcome in outcomes]
    found = _statistics(context, outcomes, entries)
    findings = ablation.findings(found["ablation"]) if found["ablation"] else []
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
        "hospitals": folder.hospital_rows(),
        "margin": settings.comparison.margin,
        "images_seen_budget": max(budgets, default=0),
        **found,
        "arms": list(entries.values()),
        "extractor": reference.extractor.name if reference.can_extract else None,
        "fid": reference.can_extract and reference.extractor.is_fid,
        "classifier": reference.classifier_name,
        "suite": settings.evaluation.suite,
        "frechet_threshold": threshold,
        "not_measured": not_measured(settings, outcomes),
        "notes": [
            *findings,
            *differences_of_arms(outcomes, entries),
            *evaluation_notes(entries),
        ],
        "provenance": provenance(settings, folder),
    }


# --- one arm -------------------------------------------------------------------------------------


def _entry(context: EvaluationContext, outcome: Outcome) -> Entry:
    """The entry of an arm with one seed; a failed one has its reason and no figures."""
    arm, run, is_done = outcome.arm, outcome.arm.run, outcome.is_done
    lines = [read_lines(job.run) for job in arm.jobs]
    evaluation = run.read_json(run.evaluation) if is_done else None
    return {
        "arm": arm.kind,
        "name": arm.name,
        "seed": arm.seed,
        "folder": str(arm.folder.relative_to(context.folder.path)),
        "status": "done" if is_done else "failed",
        "failure": outcome.failure or None,
        "images_seen": sum(job[-1]["images_seen"] for job in lines) if all(lines) else None,
        "hospital_images": dict(arm.hospital_images),
        "hospitals": list(arm.members),
        "overrides": overrides_as_dict(arm.overrides),
        "parent": arm.parent or None,
        "changes": overrides_as_dict(arm.changes),
        "public_pretraining": _public_pretraining(arm),
        "privacy": privacy_cost(arm, context.hospitals) if is_done else None,
        "exhausted": _exhausted(lines),
        "cost": _cost(arm, lines),
        "curve": (run.read_json(run.path / "curve.json") or []) if is_done else [],
        "losses": _losses(lines),
        "evaluation": evaluation
        and {key: value for key, value in evaluation.items() if key not in KEPT_ELSEWHERE},
        "hospital_models": [_hospital_model(context, job) for job in arm.jobs]
        if is_done and arm.is_per_hospital
        else [],
    }


def _public_pretraining(arm: Arm) -> Entry | None:
    """Images and seconds of the training on public phantoms; no figure of the arm has them."""
    lines = read_lines(arm.pretraining.run) if arm.pretraining else []
    if not lines:
        return None
    last = lines[-1]
    return {"images": last.get("images_seen"), "wall_seconds": last.get("wall_seconds")}


def _exhausted(lines: Lines) -> list[str]:
    """Hospitals whose privacy budget ended before their images."""
    hospitals = [row for job in lines for line in job for row in line["hospitals"]]
    return list(dict.fromkeys(row["name"] for row in hospitals if row.get("exhausted")))


def _hospital_model(context: EvaluationContext, job: Job) -> Entry:
    """The figures of one hospital's own generator."""
    name = job.members[0]
    train = next(hospital for hospital in context.hospitals if hospital.name == name).train
    found = job.run.read_json(job.run.evaluation) or {}
    lines = read_lines(job.run)
    counts = zip(train.label_names, train.labels.sum(0), strict=True)
    return {
        "hospital": name,
        "images_seen": lines[-1]["images_seen"] if lines else 0,
        "classes": [label for label, count in counts if count],
        "utility": found.get("utility"),
        "fidelity": found.get("fidelity"),
    }


def _cost(arm: Arm, lines: Lines) -> Entry:
    """Time, memory and traffic of an arm, including the federated rounds that it continues.

    None for core seconds and memory of a private arm: they depend on its secret samples.
    """
    runs = [list(job) for job in lines]
    for folder, number in {(job.start.folder, job.start.round) for job in arm.jobs if job.start}:
        before = read_lines(RunFolder(folder))
        runs.append([line for line in before if line["round"] <= number])
    hospitals = [row for run in runs for line in run for row in line["hospitals"]]
    last = [run[-1] for run in runs if run]

    def measured(key: str) -> list[float]:  # empty where a private run withholds it
        found = [row[key] for row in hospitals if row.get(key) is not None]
        return found if len(found) == len(hospitals) else []

    return {
        "wall_seconds": sum(line["wall_seconds"] for line in last) if last else None,
        "core_seconds": sum(measured("core_seconds")) or None,
        "bytes_exchanged": sum(line["bytes_exchanged"] for line in last) if last else None,
        "peak_memory_bytes": max(measured("peak_memory_bytes"), default=None),
        "rounds": max((line["round"] for line in last), default=None),
        "threads": arm.jobs[0].settings.federation.threads,
    }


def _losses(lines: Lines) -> list[Entry]:
    """Losses by images seen, about a hundred points; the mean over jobs, weighted by images."""
    if not all(lines):
        return []
    points = []
    for number in range(min(len(job) for job in lines)):
        at = [job[number] for job in lines]
        seen = [sum(row["images"] for row in line["hospitals"]) for line in at]
        point: Entry = {"images_seen": sum(line["images_seen"] for line in at)}
        for key in LOSSES:
            known = [
                (line["mean"][key], weight)
                for line, weight in zip(at, seen, strict=True)
                if key in line["mean"] and weight
            ]
            total = sum(weight for _, weight in known)
            point[key] = sum(value * weight for value, weight in known) / total if known else None
        points.append(point)
    step = max(1, len(points) // 100)
    return points[::-1][::step][::-1]


def privacy_cost(arm: Arm, hospitals: Sequence[Hospital]) -> Entry | None:
    """Spent ε of each hospital, from its ledger; None without privacy.

    {"hospitals": [{name, epsilon, delta, noise_multiplier, sample_rate, steps, ledger_epsilon,
    unknown}]}. All arms train on the same shards, so their ledgers add up. `epsilon` is of this run
    alone, `ledger_epsilon` of all runs on the shard until now, which is the guarantee of its
    patients; None is infinite. `unknown`: the ledger has no entry of this run, or cannot be read.
    """
    if not any(job.settings.privacy.on for job in arm.jobs):
        return None
    return {
        "hospitals": [
            _privacy_of(job, hospital)
            for job in arm.jobs
            for hospital in hospitals
            if hospital.name in (job.members or arm.members)
        ]
    }


def _privacy_of(job: Job, hospital: Hospital) -> Entry:
    keys = ("epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "ledger_epsilon")
    unknown: Entry = {"name": hospital.name, "unknown": True, **dict.fromkeys(keys)}
    try:
        ledger = ledger_of(job.settings, [hospital])
        entries = ledger.ledgers[0].entries()
        experiment = experiment_of(job.run)
    except (DataError, FederationError):
        return unknown
    own = [
        entry for entry in entries if entry.run == experiment and entry.part in ("", ledger.part)
    ]
    if not own:
        return unknown
    last = own[-1]
    return {
        "name": hospital.name,
        "unknown": False,
        "epsilon": _finite(epsilon_of([entry.mechanism for entry in own], last.delta)),
        "delta": last.delta,
        "noise_multiplier": last.noise_multiplier,
        "sample_rate": last.sample_rate,
        "steps": sum(entry.steps for entry in own if entry.kind == last.kind),
        "ledger_epsilon": _finite(ledger.epsilon(last.delta, experiment)),
    }


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None


# --- checks --------------------------------------------------------------------------------------


def _comparable_facts(context: EvaluationContext, arm: Arm, entry: Entry) -> Entry:
    """Facts for `check_comparable`, from the folders, not from the plan."""
    settings = to_dict(arm.jobs[0].run.settings())
    if arm.is_per_hospital and arm.jobs[0].settings.federation.batch == "shared":
        # each hospital trained with its part of one step
        batches = [job.settings.training.batch_size for job in arm.jobs]
        settings["training"]["batch_size"] = sum(batches)
    evaluator = entry["evaluation"]["evaluator"]
    return {
        "name": arm.name,
        "seed": arm.seed,
        "images_seen": entry["images_seen"],
        "may_differ": entry["overrides"] if arm.parent else {},
        "exhausted": entry["exhausted"],
        "settings": settings | {"evaluation": to_dict(context.settings)["evaluation"]},
        "resolution": settings["data"]["resolution"],
        "label_names": entry["evaluation"]["label_names"],
        "evaluator": evaluator | {"extractor": evaluator["extractor"] or "none"},
    }


def _check_same_test_images(context: EvaluationContext, entries: Mapping[Path, Entry]) -> None:
    """Raise `ConfigError` when an arm was evaluated on other test images than those opened now."""
    for entry in entries.values():
        evaluation = entry["evaluation"]
        if evaluation and evaluation["evaluator"]["test_hash"] != context.reference.test_hash:
            raise ConfigError(
                f"arm '{entry['name']}' (seed {entry['seed']}) was evaluated on other test images "
                "than the data hold now: the data have changed, give another --output"
            )


# --- all arms ------------------------------------------------------------------------------------


def _statistics(
    context: EvaluationContext, outcomes: Sequence[Outcome], entries: Mapping[Path, Entry]
) -> dict[str, Any]:
    """Answer, tables and statistics over arms; empty where the images have no classes."""
    reference, settings = context.reference, context.settings
    if not reference.has_classes or len(reference.test) < 2:
        return {
            "answer": "Cost and gain of federation are unknown: the images have no classes that a "
            "classifier could discriminate.",
            "ablation": None,
            "summary": [],
            "comparisons": [],
            "cross_hospital": None,
            "contribution": None,
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
    summary = [rows.real_row(reference.scores, test)]
    scores, seeds = {"real": reference.scores}, dict[str, list[int]]()
    for (kind, name, hospital), runs in _runs_by_row(outcomes, entries).items():
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
    order = {name: number for number, name in enumerate(names)}
    institutions = sorted(
        {str(name) for name in test.institutions},
        key=lambda name: (order.get(name, len(names)), name),
    )
    variants = ablation.table(list(entries.values()), summary, comparisons)
    return {
        "answer": ablation.answer(variants)
        if variants
        else rows.answer(summary, comparisons, names, _first_federated(summary)),
        "ablation": variants,
        "summary": summary,
        "comparisons": comparisons,
        "cross_hospital": rows.cross_hospital(
            [row for row in summary if row["arm"] != "coalition"], institutions
        ),
        "contribution": _contribution(outcomes, scores, test, names),
    }


def _runs_by_row(
    outcomes: Sequence[Outcome], entries: Mapping[Path, Entry]
) -> dict[tuple[str, str, str | None], list[rows.Run]]:
    """Trainings per row of the summary (kind, name, hospital): arms, then hospitals alone."""
    found: dict[tuple[str, str, str | None], list[rows.Run]] = {}

    def add(key: tuple[str, str, str | None], run: RunFolder, seed: int, entry: Entry) -> None:
        scores = read_scores(run)
        if scores is not None:
            fidelity = (entry.get("evaluation") or entry).get("fidelity") or {}
            found[key].append(rows.Run(seed, entry["images_seen"], scores, fidelity))

    for outcome in outcomes:
        arm = outcome.arm
        key = (arm.kind, arm.name, None)
        found.setdefault(key, [])
        if outcome.is_done:
            add(key, arm.run, arm.seed, entries[arm.folder])
    for outcome in outcomes:
        arm = outcome.arm
        for number, job in enumerate(arm.jobs if arm.is_per_hospital else ()):
            hospital = job.members[0]
            own = (arm.kind, f"{arm.name}: {hospital}", hospital)
            found.setdefault(own, [])
            if outcome.is_done:
                add(own, job.run, arm.seed, entries[arm.folder]["hospital_models"][number])
    return found


def _first_federated(summary: Sequence[Mapping[str, Any]]) -> str | None:
    """The arm of the answer: the one called 'federated', else the first measured federated one."""
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
    """The contribution of each hospital; None without coalitions in comparison.arms."""
    arms = [outcome.arm for outcome in outcomes if outcome.arm.kind == "coalition"]
    if not arms:
        return None
    coalitions = {arm.name: arm.members for arm in arms} | {PLAIN_FEDERATED: tuple(names)}
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
