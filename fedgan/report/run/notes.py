"""Missing figures, and notes of the evaluator."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.facts import null_paths
from fedgan.report.html.section import Section
from fedgan.report.html.templating import render
from fedgan.report.run.data import RunData, sentences, tree

MOST = 30


def _render(run: RunData) -> Markup:
    evaluation = run.evaluation
    notes = [
        text
        for holder in (evaluation, *(tree(evaluation.get(key)) for key in sorted(evaluation)))
        for text in sentences(holder.get("notes"))
    ]
    missing = [
        sentence
        for is_present, sentence in (
            (run.rounds, "metrics.jsonl has no round yet."),
            (run.hospitals, "hospitals.json is missing."),
            (
                run.environment,
                "environment.json is missing: versions, machine and licences are unknown.",
            ),
            (evaluation, "evaluation.json is missing: utility and fidelity are unknown."),
        )
        if not is_present
    ]
    done, planned = len(run.rounds), run.settings.federation.rounds
    if 0 < done < planned:
        missing.append(f"The run had {done} of {planned} rounds when this report was written.")
    if not run.audit and "privacy" not in evaluation:
        missing.append(
            "No privacy attack and no search for copies was run: this report is no evidence that "
            "the images are safe to release."
        )
    empty = list(dict.fromkeys(null_paths(evaluation)))
    return render(
        "notes.html.j2",
        notes=list(dict.fromkeys(notes)),
        missing=[*run.problems, *missing],
        nulls=empty[:MOST],
        more=len(empty) - MOST,
    )


SECTION = Section("notes", "Notes", _render)
