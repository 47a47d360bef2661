"""The section: what is guaranteed with all that an epsilon has to be read with, and the audit's controls before its figures."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report import format as text
from fedgan.report.charts import Line, legend, line_chart
from fedgan.report.facts import leaves
from fedgan.report.format import number
from fedgan.report.privacy.findings import Audit, controls, name_of, passed
from fedgan.report.privacy.guarantee import Spent, meaning, share, spent, statement, terms
from fedgan.report.privacy.words import COMMAND, HEADS, NO_AUDIT, UNREADABLE, not_protected
from fedgan.report.run_data import RunData
from fedgan.report.sections.base import Section
from fedgan.report.sections.privacy.evidence import evidence
from fedgan.report.tables import Column, table
from fedgan.report.templating import render

MOST_LINES = 6  # hospitals in the curve that can still be told apart
NAME = Column("Hospital", numeric=False)
MARKS = [("synthetic images, or members", "synthetic"), ("the same figure for held-out real images", "real")]


def _render(run: RunData) -> Markup:
    audit, found = Audit(run.audit), spent(run)
    return render(
        "privacy.html.j2",
        statement=statement(run),
        headline=audit.headline() if audit.there else UNREADABLE if _is_damaged(run) else NO_AUDIT,
        command="" if audit.there else COMMAND,
        valid=audit.valid,
        there=audit.there,
        scope=_scope(run, audit),
        controls=_controls(audit),
        guarantee=_guarantee(found),
        meaning=meaning(found),
        curve=_curve(run, found),
        left_out=max(0, len(found) - MOST_LINES),
        terms=terms(run.settings),
        private=run.settings.privacy.on,
        heads=[(key, *HEADS[key], *evidence(key, audit)) for key in HEADS],
        legend=legend(MARKS, "dot"),
        notes=audit.notes,
        open=not_protected(run),
    )


def _is_damaged(run: RunData) -> bool:
    return any(problem.startswith("audit.json ") for problem in run.problems)


# --- what is guaranteed --------------------------------------------------------------------------


def _guarantee(found: list[Spent]) -> Markup:
    if not found:
        return Markup("")
    columns = [
        NAME,
        Column("ε", title="Over all runs on this hospital's images"),
        Column("δ"),
        Column("Noise multiplier", title="Standard deviation of the noise over the norm to which gradients are clipped"),
        Column("Sampling rate", title="Probability of a unit to be in a step"),
        Column("Most that 1 false alarm in 100 finds", title="Bound on the share of members that any attack finds"),
        Column("Trained", numeric=False),
    ]
    rows = [
        [
            row.name,
            row.words,
            text.significant(row.delta, 3),
            text.significant(row.noise_multiplier, 3),
            text.significant(row.sample_rate, 3),
            "no bound" if row.infinite else share(row.most_found),
            f"to round {row.last:,}" if row.stopped is None else f"to round {row.stopped:,}: its budget allowed no further step",
        ]
        for row in found
    ]
    more = "ε of everything in the hospital's ledger, earlier runs included; noise multiplier and sampling rate of this run."
    return table("What each hospital has spent", columns, rows, "privacy-epsilon", more=more)


def _curve(run: RunData, found: list[Spent]) -> Markup:
    """ε over rounds, a line a hospital; empty where no round tells a finite ε."""
    lines = [Line(row.name, row.curve, f"h{i + 1}") for i, row in enumerate(found[:MOST_LINES]) if row.curve]
    if not lines:
        return Markup("")
    privacy = run.settings.privacy
    limits = [("asked for", privacy.epsilon)] if privacy.epsilon else []
    limits += [("most allowed", privacy.max_epsilon)] if privacy.max_epsilon else []
    desc = "Epsilon of each hospital's ledger after each round: " + "; ".join(
        f"{line.name} {text.significant(line.points[-1][1], 3)} after round {line.points[-1][0]:g}" for line in lines
    )
    chart = line_chart("privacy-epsilon", "ε over the rounds", f"{desc}.", lines, "round", limits)
    marks = legend([(line.name, line.style) for line in lines], "line")
    return Markup(
        '<div class="charts single"><figure><figcaption>ε over the rounds<small>Of the ledger, at the δ of the table: it never '
        "falls.</small></figcaption>{}{}</figure></div>"
    ).format(chart, marks)


# --- whether the audit counts --------------------------------------------------------------------


def _scope(run: RunData, audit: Audit) -> str:
    """Which model was audited, on how many images, and which hospitals were not."""
    if not audit.there:
        return ""
    parts = []
    if audit.round is not None:
        parts.append(f"Audited: the model of round {audit.round:,}.")
        last = number(run.last_round.get("round"))
        if last is not None and last != audit.round:
            parts.append(f"The run's last round is {last:,.0f}: the audit says nothing of that model.")
    seen = {name_of(hospital) for hospital in audit.hospitals}
    missing = [name for name in run.hospital_names if name not in seen]
    if missing:
        parts.append(f"Not audited: {', '.join(missing)}.")
    if run.drawn:
        parts.append("All images were drawn by a program: no patient's image could leak.")
    return " ".join(parts)


def _controls(audit: Audit) -> Markup:
    if not audit.there:
        return Markup("")
    rows = []
    for hospital in audit.hospitals:
        sizes = " / ".join(text.whole(hospital.get(key)) for key in ("members", "held_out", "synthetic"))
        for name, control in controls(hospital):
            told = [f"{key.replace('_', ' ')} {value}" for key, value in leaves(control) if key.split(".")[-1] != "passed"]
            verdict = "passed" if passed(name, control) else "NOT passed"
            rows.append([f"{name_of(hospital)}: {name}", verdict, sizes, "; ".join(_short(words) for words in told)])
    columns = [
        Column("Hospital: control", numeric=False),
        Column("Verdict", numeric=False),
        Column("Images", title="Training, held-out and synthetic images that were compared"),
        Column("What it measured", numeric=False),
    ]
    more = (
        "Positive control: copies of training images are planted among the synthetic ones and have to be found. Negative "
        "control: real images that nothing was trained on play the synthetic ones, and nothing may be found. Images: training / "
        "held-out / synthetic."
    )
    return table("Controls: would this audit have noticed?", columns, rows, "privacy-controls", more=more)


def _short(words: str) -> str:
    """A name and a number with three digits, which is enough for a control."""
    name, _, value = words.rpartition(" ")
    try:
        return f"{name} {text.significant(float(value), 3)}"
    except ValueError:
        return words


SECTION = Section("privacy", "Privacy: guarantee and evidence", _render)
