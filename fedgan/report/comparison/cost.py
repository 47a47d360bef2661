"""What each training cost: images, time, bytes, memory, and how soon it reached a given Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.report.comparison.communication_cost import communication_cost
from fedgan.report.comparison.data import ArmRun, Comparison
from fedgan.report.comparison.parts import failure_note, run_label
from fedgan.report.facts import leaves
from fedgan.report.html import format as text
from fedgan.report.html.format import DASH, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import dig, tree


def _render(comparison: Comparison) -> Markup:
    runs = comparison.runs
    if not runs:
        return absent("The cost is not known: comparison.json lists no arm.")
    threshold = number(comparison.content.get("frechet_threshold"))
    columns = [
        Column("Arm", numeric=False),
        Column(
            "Images seen", title="Real images shown to the discriminators, summed over hospitals"
        ),
        Column("Wall time"),
        Column("Core time"),
        Column("Bytes exchanged", title="Both ways, all hospitals"),
        Column("Peak memory"),
        Column("Rounds"),
        Column(
            "kimg to the distance", title="Thousand images until the Fréchet distance was reached"
        ),
    ]
    unreached = [
        run.label
        for run in runs
        if run.status == "done" and number(_cost(run).get("kimg_to_frechet")) is None
    ]
    budgets = sorted(
        {
            n
            for run in comparison.arm_runs
            if not run.failure_reason and (n := number(run.content.get("images_seen"))) is not None
        }
    )
    return render(
        "comparison_cost.html.j2",
        table=table(
            "Cost of each training",
            columns,
            [_cells(run) for run in runs],
            "cost",
            more=failure_note(runs),
        ),
        how=_how(runs),
        communication_cost=communication_cost(comparison),
        threshold=text.significant(threshold) if threshold is not None else None,
        worst=number(dig(comparison.content, "provenance", "settings", "comparison", "frechet"))
        == 0,
        unreached=unreached,
        budgets=[text.whole(n) for n in budgets],
        images=_images(comparison),
        overrides={_arm(run): words for run in runs if (words := _overrides(run))},
    )


def _how(runs: Sequence[ArmRun]) -> str:
    """What the times and the memory are of."""
    threads = sorted({n for run in runs if (n := number(_cost(run).get("threads"))) is not None})
    words = (
        f"Each hospital's training had {' or '.join(text.whole(n) for n in threads)} processor threads. "
        if threads
        else ""
    )
    words = words.replace(" 1 processor threads", " 1 processor thread")
    return (
        f"{words}Core time: processor time of the hospitals' training, without server and transport. Wall time: of an arm with a "
        "generator for each hospital the sum over its hospitals; it was taken while other trainings may have run on the same "
        "machine. Peak memory: of the largest single process, libraries included."
    )


def _cost(run: ArmRun) -> dict[str, object]:
    return tree(run.content.get("cost"))


def _cells(run: ArmRun) -> list[str]:
    cost = _cost(run)
    return [
        run_label(run),
        text.whole(run.content.get("images_seen")),
        text.duration(cost.get("wall_seconds")),
        text.duration(cost.get("core_seconds")),
        "none"
        if number(cost.get("bytes_exchanged")) == 0
        else text.size(cost.get("bytes_exchanged")),
        text.size(cost.get("peak_memory_bytes")),
        text.whole(cost.get("rounds")),
        text.decimal(cost.get("kimg_to_frechet"), 1),
    ]


def _images(comparison: Comparison) -> Markup:
    """How the images seen divide over the hospitals, a row a training."""
    names = list(
        dict.fromkeys(
            name for run in comparison.runs for name in tree(run.content.get("hospital_images"))
        )
    )
    if not names:
        return absent("How the images seen divide over the hospitals is not known.")
    rows = [
        [
            run_label(run),
            *(text.whole(tree(run.content.get("hospital_images")).get(name)) for name in names),
        ]
        for run in comparison.runs
    ]
    return table(
        "Images seen, by the hospital that showed them",
        [Column("Arm", numeric=False), *(Column(name) for name in names)],
        rows,
        "images-seen",
    )


def _arm(run: ArmRun) -> str:
    return run.label.rpartition(", seed ")[0]


def _overrides(run: ArmRun) -> str:
    """What the arm's settings change of the scenario's, whether it is a dict or a list of key=value."""
    value = run.content.get("overrides")
    if isinstance(value, list):
        return "; ".join(str(item) for item in value)
    return (
        "; ".join(f"{key} = {words}" for key, words in leaves(value) if words != DASH)
        if value
        else ""
    )


SECTION = Section("cost", "Cost", _render)
