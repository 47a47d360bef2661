"""Missing figures, failed trainings and notes of the evaluator."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import REAL, Comparison
from fedgan.report.facts import null_paths
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import sentences, tree

MAX_NULLS = 40  # paths of null figures
PRIVACY = (
    "This comparison has no privacy attack and no search for copies: "
    "it gives no evidence that the images are safe to release."
)


def _render(comparison: Comparison) -> Markup:
    empty = list(dict.fromkeys(_nulls(comparison)))
    # The table of failures lists these.
    failed = tuple(f"{run.label} failed" for run in comparison.runs if run.failure_reason)
    missing = [
        sentence
        for sentence in sentences(comparison.content.get("not_measured"))
        if not sentence.startswith(failed)
    ]
    if not any(sentence.startswith("Privacy:") for sentence in missing):
        missing.append(PRIVACY)
    return render(
        "comparison_not_measured.html.j2",
        failures=_failures(comparison),
        missing=list(dict.fromkeys([*comparison.problems, *missing])),
        notes=_notes(comparison),
        nulls=empty[:MAX_NULLS],
        more=len(empty) - MAX_NULLS,
    )


def _failures(comparison: Comparison) -> Markup:
    if not comparison.runs:
        return absent("comparison.json lists no training.")
    rows = [[run.label, f"{run.failure_reason}."] for run in comparison.runs if run.failure_reason]
    if not rows:
        return absent("Every training was finished and evaluated.")
    columns = [Column("Arm", numeric=False), Column("Reason", numeric=False)]
    return table("Trainings without figures", columns, rows)


def _notes(comparison: Comparison) -> list[str]:
    """Notes of the comparison, then other notes of the arms; a note of all arms appears once."""
    notes = sentences(comparison.content.get("notes"))
    general = tuple(notes)
    runs_by_note: dict[str, list[str]] = {}
    for run in comparison.runs:
        evaluation = run.evaluation
        for holder in (evaluation, *(tree(evaluation.get(key)) for key in sorted(evaluation))):
            for note in sentences(holder.get("notes")):
                runs_by_note.setdefault(note, []).append(run.label)
    evaluated = sum(bool(run.evaluation) for run in comparison.runs)
    for note, labels in runs_by_note.items():
        if any(other.startswith(note) for other in general):
            continue
        labels = list(dict.fromkeys(labels))
        notes.append(note if len(labels) == evaluated else f"{'; '.join(labels)}: {note}")
    return list(dict.fromkeys(notes))


def _nulls(comparison: Comparison) -> list[str]:
    """Paths of null figures in the summary and in each evaluated training."""
    found = []
    for entry in comparison.entries:
        unused = {"hospital", "images_seen", "name"}
        unused |= {"frechet", "recall", "coverage"} if entry.kind == REAL else set()
        figures = {key: value for key, value in entry.figures.items() if key not in unused}
        found += [f"{entry.label} › {path}" for path in null_paths(figures)]
    return found + [
        f"{run.label} › {path}"
        for run in comparison.runs
        for key in ("utility", "fidelity", "label_fidelity")
        for path in null_paths(run.evaluation.get(key), key)
    ]


SECTION = Section("not-measured", "Not measured", _render)
