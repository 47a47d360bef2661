"""Cards of a comparison: the model card of its federated generator, with a row per arm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fedgan.errors import FedganError
from fedgan.report.cards.collect import CardData, collect
from fedgan.report.cards.subjects import dataset_facts, model_facts
from fedgan.report.cards.writing import write_both
from fedgan.report.html import format as text
from fedgan.report.html.format import number
from fedgan.report.run.data import Tree, clean, sentences, tree, trees
from fedgan.run_folder import RunFolder


def write_comparison_cards(folder: Path) -> list[Path]:
    """Write model_card and dataset_card (.md and .json) into `folder`/cards; return their paths.

    The model is that of the first finished federated arm (any arm if there is none), lowest seed;
    its card has a row for each arm. Raises `ConfigError` if `folder` has no config.toml,
    `StorageError` if a card cannot be written.
    """
    whole = RunFolder.at(folder)
    card = collect(whole)
    problems = list(card.data.problems)
    try:
        found = tree(clean(whole.read_json(whole.path / "comparison.json")))
        if not found:
            problems.append("comparison.json is missing: the comparison is not finished.")
    except (FedganError, OSError, ValueError, RecursionError):
        found = {}
        problems.append("comparison.json is damaged and could not be read.")
    chosen = _choose(trees(found.get("arms")))
    arm = card
    if chosen:
        try:
            arm = _arm_data(collect(_arm_folder(whole, chosen)), chosen, card)
        except (FedganError, OSError):
            problems.append(
                f"The run folder of {_name(chosen)} could not be read: the model is not known."
            )
    else:
        problems.append("No arm is finished: there is no model to describe.")
    # The folder of a comparison has no rounds, so its problems as a run are irrelevant.
    card = dataclasses.replace(card, checkpoint=arm.checkpoint, problems=tuple(problems))
    if arm is not card:
        arm = dataclasses.replace(
            arm, problems=(*problems, *(() if arm.data is card.data else arm.problems))
        )
    model = model_facts(arm) | card.redact(
        {"name": card.data.settings.name, "comparison": _comparison(found, chosen)}
    )
    return write_both(whole.path / "cards", model, dataset_facts(card))


def _choose(arms: list[Tree]) -> Tree | None:
    """The arm of the model card: federated first, then in the given order, lowest seed."""
    done = [arm for arm in arms if _is_done(arm)]
    federated = [arm for arm in done if arm.get("arm") == "federated"] or done
    if not federated:
        return None
    return min(
        (arm for arm in federated if arm.get("name") == federated[0].get("name")),
        key=lambda arm: number(arm.get("seed")) or 0,
    )


def _arm_folder(whole: RunFolder, arm: Tree) -> RunFolder:
    """The run folder of an arm, which must be inside the folder of the comparison."""
    named = (whole.path / str(arm.get("folder") or "")).resolve()
    if named != whole.path and named.is_relative_to(whole.path):
        return RunFolder(named)
    return RunFolder(whole.path / "arms" / Path(f"{arm.get('name')}-seed{arm.get('seed')}").name)


def _arm_data(found: CardData, arm: Tree, whole: CardData) -> CardData:
    """The run of an arm, completed from comparison.json and from the comparison folder."""
    data = found.data
    evaluation = data.evaluation or tree(arm.get("evaluation"))
    evaluation = evaluation | {"arm": evaluation.get("arm") or arm.get("arm")}
    return dataclasses.replace(
        found,
        data=dataclasses.replace(
            data,
            evaluation=evaluation,
            environment=data.environment or whole.data.environment,
            hospitals=data.hospitals or whole.data.hospitals,
        ),
    )


def _comparison(found: Tree, chosen: Tree | None) -> Tree:
    """The arms in comparison.json, and the cells of the tables of the card."""
    rows = trees(found.get("summary"))
    comparisons = trees(found.get("comparisons"))
    failed = [
        f"{_name(arm)}: {arm.get('failure') or arm.get('status')}"
        for arm in trees(found.get("arms"))
        if not _is_done(arm)
    ]
    keys = (
        "arm",
        "name",
        "hospital",
        "seeds",
        "images_seen",
        "macro_auc",
        "macro_auc_ci",
        "frechet",
        "recall",
        "coverage",
    )
    this_card = (
        "No model is described."
        if chosen is None
        else f"This card describes the generator of {_name(chosen)}."
    )
    return {
        "answer": found.get("answer"),
        "this_card": this_card,
        "arms": [{key: row.get(key) for key in keys} for row in rows],
        "table": [_arm_cells(row) for row in rows],
        "comparisons": comparisons,
        "differences": [_difference_cells(row) for row in comparisons],
        "not_measured": [*failed, *sentences(found.get("not_measured"))],
    }


def _arm_cells(row: Tree) -> list[Any]:
    seeds = row.get("seeds")
    ends = row.get("macro_auc_ci")
    auc = text.decimal(row.get("macro_auc")) + (
        f" ({text.interval(ends)})" if text.bounds(ends) else ""
    )
    return [
        str(row.get("name") or row.get("arm")),
        ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds,
        text.whole(row.get("images_seen")),
        auc,
        text.significant(row.get("frechet")),
        text.decimal(row.get("recall")),
    ]


def _difference_cells(row: Tree) -> list[Any]:
    answer = row.get("non_inferior")
    return [
        str(row.get("a")),
        str(row.get("b")),
        text.signed(row.get("difference")),
        text.spread(row.get("ci")),
        text.significant(row.get("p_holm")),
        text.decimal(row.get("margin")),
        "not known" if answer is None else "yes" if answer else "not shown",
    ]


def _is_done(arm: Tree) -> bool:
    return arm.get("status", "done") == "done"


def _name(arm: Tree) -> str:
    return f"{arm.get('name') or arm.get('arm')}, seed {arm.get('seed')}"
