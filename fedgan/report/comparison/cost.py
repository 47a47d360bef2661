"""Cost of each training: images, time, bytes, memory, and images until a given Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.report.comparison.communication_cost import communication_cost
from fedgan.report.comparison.data import ArmRun, Comparison, failure_note
from fedgan.report.facts import flatten
from fedgan.report.html import format as text
from fedgan.report.html.format import DASH, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import dig, tree

COLUMNS = (
    Column("Arm", numeric=False),
    Column("Images seen", title="Real images shown to the discriminators, summed over hospitals"),
    Column("Wall time"),
    Column("Core time"),
    Column("Bytes exchanged", title="Both ways, all hospitals"),
    Column("Peak memory"),
    Column("Rounds"),
    Column("kimg to the distance", title="Thousand images until the Fréchet distance was reached"),
)
DEFINITIONS = (
    "Core time: processor time of the training in the hospitals, without server and transport. "
    "Wall time: for an arm with one generator per hospital the sum over its hospitals; other "
    "trainings may have run on the same machine at that time. "
    "Peak memory: of the largest single process, libraries included."
)


def _render(comparison: Comparison) -> Markup:
    runs = comparison.runs
    if not runs:
        return absent("The cost is not known: comparison.json lists no arm.")
    threshold = number(comparison.content.get("frechet_threshold"))
    unreached = [
        run.label
        for run in runs
        if run.status == "done" and number(run.cost.get("kimg_to_frechet")) is None
    ]
    budgets = {
        n
        for run in comparison.arm_runs
        if not run.failure_reason and (n := number(run.content.get("images_seen"))) is not None
    }
    chosen = dig(comparison.content, "provenance", "settings", "comparison", "frechet")
    return render(
        "comparison_cost.html.j2",
        table=table(
            "Cost of each training",
            COLUMNS,
            [_cells(run) for run in runs],
            "cost",
            more=failure_note(runs),
        ),
        definitions=f"{_threads(runs)}{DEFINITIONS}",
        communication_cost=communication_cost(comparison),
        threshold=text.significant(threshold) if threshold is not None else None,
        is_largest_final=number(chosen) == 0,
        unreached=unreached,
        budgets=[text.whole(n) for n in sorted(budgets)],
        images=_images(comparison),
        overrides={run.name: changes for run in runs if (changes := _overrides(run))},
    )


def _threads(runs: Sequence[ArmRun]) -> str:
    """Sentence with the processor threads of each hospital's training; empty if not known."""
    threads = sorted({n for run in runs if (n := number(run.cost.get("threads"))) is not None})
    if not threads:
        return ""
    counts = " or ".join(text.whole(n) for n in threads)
    noun = "thread" if threads[-1] == 1 else "threads"
    return f"The training of each hospital had {counts} processor {noun}. "


def _cells(run: ArmRun) -> list[str]:
    cost, sent = run.cost, run.cost.get("bytes_exchanged")
    return [
        run.row_label,
        text.whole(run.content.get("images_seen")),
        text.duration(cost.get("wall_seconds")),
        text.duration(cost.get("core_seconds")),
        "none" if number(sent) == 0 else text.size(sent),
        text.size(cost.get("peak_memory_bytes")),
        text.whole(cost.get("rounds")),
        text.decimal(cost.get("kimg_to_frechet"), 1),
    ]


def _images(comparison: Comparison) -> Markup:
    """Images seen per hospital; one row per training."""
    images = [tree(run.content.get("hospital_images")) for run in comparison.runs]
    names = list(dict.fromkeys(name for row in images for name in row))
    if not names:
        return absent("The images seen per hospital are not known.")
    rows = [
        [run.row_label, *(text.whole(row.get(name)) for name in names)]
        for run, row in zip(comparison.runs, images, strict=True)
    ]
    columns = [Column("Arm", numeric=False), *(Column(name) for name in names)]
    return table("Images seen per hospital", columns, rows, "images-seen")


def _overrides(run: ArmRun) -> str:
    """Settings of the arm that differ from the scenario, from a dict or a list of key=value."""
    value = run.content.get("overrides")
    if isinstance(value, list):
        return "; ".join(str(item) for item in value)
    changes = flatten(value) if value else []
    return "; ".join(f"{key} = {new}" for key, new in changes if new != DASH)


SECTION = Section("cost", "Cost", _render)
