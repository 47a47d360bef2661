"""What was not measured, what failed and why, and what the evaluator had to say."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.facts import nulls
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import sentences, tree

MOST = 40
PRIVACY = (
    "No privacy attack and no search for copies is part of this comparison: "
    "it is no evidence that the images are safe to release."
)


def _render(comparison: Comparison) -> Markup:
    failures = comparison.failures
    empty = list(dict.fromkeys(_nulls(comparison)))
    failed = tuple(f"{label} failed" for label, _ in failures)  # these stand in the table
    measured = [
        words
        for words in sentences(comparison.content.get("not_measured"))
        if not words.startswith(failed)
    ]
    if not any(words.startswith("Privacy:") for words in measured):
        measured.append(PRIVACY)
    return render(
        "comparison_missing.html.j2",
        failures=table(
            "Trainings without figures",
            [Column("Arm", numeric=False), Column("What happened", numeric=False)],
            [[label, f"{failure_reason}."] for label, failure_reason in failures],
        )
        if failures
        else absent("Every training was finished and evaluated.")
        if comparison.runs
        else absent("comparison.json lists no training."),
        missing=list(dict.fromkeys([*comparison.problems, *measured])),
        notes=_notes(comparison),
        nulls=empty[:MOST],
        more=len(empty) - MOST,
    )


def _notes(comparison: Comparison) -> list[str]:
    """Notes of the comparison, then those of the arms that it does not repeat: one that all share once, another with its arm."""
    notes = sentences(comparison.content.get("notes"))
    known = tuple(notes)
    said: dict[str, list[str]] = {}
    for run in comparison.runs:
        evaluation = run.evaluation
        for holder in (evaluation, *(tree(evaluation.get(key)) for key in sorted(evaluation))):
            for sentence in sentences(holder.get("notes")):
                said.setdefault(sentence, []).append(run.label)
    evaluated = sum(bool(run.evaluation) for run in comparison.runs)
    for sentence, labels in said.items():
        if any(note.startswith(sentence) for note in known):
            continue
        labels = list(dict.fromkeys(labels))
        notes.append(sentence if len(labels) == evaluated else f"{'; '.join(labels)}: {sentence}")
    return list(dict.fromkeys(notes))


def _nulls(comparison: Comparison) -> list[str]:
    """Paths of the figures that are null, of the summary and of each evaluated training."""
    found = [
        f"{entry.label} › {path}"
        for entry in comparison.entries
        if entry.figures
        for path in nulls(
            {
                key: value
                for key, value in entry.figures.items()
                if key not in ("hospital", "images_seen", "name")
            }
        )
        if not (entry.kind == "real" and path in ("frechet", "recall", "coverage"))
    ]
    return found + [
        f"{run.label} › {path}"
        for run in comparison.runs
        for key in ("utility", "fidelity", "label_fidelity")
        for path in nulls(run.evaluation.get(key), key)
    ]


SECTION = Section("missing", "Not measured", _render)
