"""The section: what is guaranteed with all that an epsilon has to be read with, and the audit's controls before its figures."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from fedgan.report.html import format as text
from fedgan.report.html.charts import Line, legend, line_chart
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import render
from fedgan.report.run.data import RunData, Tree, dig, tree
from fedgan.report.run.privacy.evidence import CI, evidence
from fedgan.report.run.privacy.findings import (
    CONTROLS,
    SPACES,
    Audit,
    blind_spaces,
    controls,
    name_of,
    passed,
)
from fedgan.report.run.privacy.guarantee import (
    Spent,
    counted_over,
    hospital_level,
    is_dealt,
    meaning,
    share,
    spent,
    statement,
    terms,
)
from fedgan.report.run.privacy.words import COMMAND, HEADS, NO_AUDIT, UNREADABLE, not_protected

MOST_LINES = 6  # hospitals in the curve that can still be told apart
NAME = Column("Hospital", numeric=False)
MARKS = [
    ("synthetic images, or members", "synthetic"),
    ("the same figure for held-out real images", "real"),
]


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
        control_parts=_control_parts(audit),
        guarantee=_guarantee(run, found),
        meaning=meaning(found),
        hospital_level=hospital_level(run),
        curve=_curve(run, found),
        left_out=max(0, len(found) - MOST_LINES),
        terms=terms(run),
        private=run.settings.privacy.on,
        heads=[(key, *HEADS[key], *evidence(key, audit)) for key in HEADS],
        legend=legend(MARKS, "dot"),
        notes=audit.notes,
        open=not_protected(run),
    )


def _is_damaged(run: RunData) -> bool:
    return any(problem.startswith("audit.json ") for problem in run.problems)


# --- what is guaranteed --------------------------------------------------------------------------


def _guarantee(run: RunData, found: list[Spent]) -> Markup:
    if not found:
        return Markup("")
    columns = [
        NAME,
        Column("ε", title=f"Over {counted_over(run.settings)}"),
        Column("δ"),
        Column(
            "Noise multiplier",
            title="Standard deviation of the noise over the norm to which gradients are clipped",
        ),
        Column("Sampling rate", title="Probability of a unit to be in a step"),
        Column(
            "Found at 1 % false alarms, at most",
            title="Bound on the share of members that any attack finds",
        ),
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
            f"to round {row.last:,}"
            if row.stopped is None
            else f"to round {row.stopped:,}: its budget allowed no further step",
        ]
        for row in found
    ]
    earlier = "" if is_dealt(run.settings) else ", earlier private runs included"
    more = f"ε of everything in the hospital's ledger{earlier}; noise multiplier and sampling rate of this run."
    return table("What each hospital has spent", columns, rows, "privacy-epsilon", more=more)


def _curve(run: RunData, found: list[Spent]) -> Markup:
    """ε over rounds, a line a hospital; empty where no round tells a finite ε."""
    lines = [
        Line(row.name, row.curve, f"h{i + 1}")
        for i, row in enumerate(found[:MOST_LINES])
        if row.curve
    ]
    if not lines:
        return Markup("")
    privacy = run.settings.privacy
    limits = [("most allowed", privacy.max_epsilon)] if privacy.max_epsilon else []
    limits = limits or ([("asked for", privacy.epsilon)] if privacy.epsilon else [])
    desc = "Epsilon of each hospital's ledger after each round: " + "; ".join(
        f"{line.name} {text.significant(line.points[-1][1], 3)} after round {line.points[-1][0]:g}"
        for line in lines
    )
    chart = line_chart("privacy-epsilon", "ε over the rounds", f"{desc}.", lines, "round", limits)
    marks = legend([(line.name, line.style) for line in lines], "line")
    return Markup(
        '{}<div class="charts single"><figure><figcaption>ε over the rounds<small>Of the ledger, at the δ of the table: it '
        "never falls.</small></figcaption>{}</figure></div>"
    ).format(marks, chart)


# --- whether the audit counts --------------------------------------------------------------------


def _scope(run: RunData, audit: Audit) -> str:
    """Which model was audited, on how many images, and which hospitals were not."""
    if not audit.there:
        return ""
    parts = []
    if audit.round is not None:
        drawn = max(
            (number(hospital.get("synthetic")) or 0 for hospital in audit.hospitals), default=0
        )
        parts.append(
            f"Audited: the model of round {audit.round:,}{f', by {drawn:,.0f} synthetic images a hospital' if drawn else ''}."
        )
        last = number(run.last_round.get("round"))
        if last is not None and last != audit.round:
            parts.append(
                f"The run's last round is {last:,.0f}: the audit says nothing of that model."
            )
    seen = {name_of(hospital) for hospital in audit.hospitals}
    missing = [name for name in run.hospital_names if name not in seen]
    if missing:
        parts.append(f"Not audited: {', '.join(missing)}.")
    if run.drawn:
        parts.append("All images were drawn by a program: no patient's image could leak.")
    return " ".join(parts)


def _controls(audit: Audit) -> Markup:
    """A row a hospital; empty where no control was run."""
    rows = []
    for hospital in audit.hospitals:
        held = dict(controls(hospital))
        verdicts = [_verdict(name, held) for name in CONTROLS]
        searches = [tree(part) for part in tree(dig(held.get("positive"), "copies")).values()]
        best: Tree = max(searches, key=lambda part: number(part.get("auc")) or 0.0, default={})
        members = dig(held.get("positive"), "membership", "attacks", "distance", "auc")
        sizes = " / ".join(text.whole(hospital.get(key)) for key in ("members", "held_out"))
        blind = ", ".join(blind_spaces(hospital)) or text.DASH
        shares = " / ".join(text.decimal(best.get(key)) for key in ("found_share", "planted_share"))
        areas = (text.decimal(best.get("auc")), shares, blind, text.decimal(members))
        rows.append(
            [
                name_of(hospital),
                *verdicts,
                *areas,
                sizes,
                text.whole(hospital.get("held_out_patients")),
            ]
        )
    columns = [
        NAME,
        Column("Positive", numeric=False, title="Positive control: a planted leak has to be found"),
        Column(
            "Negative",
            numeric=False,
            title="Negative control: nothing may be found among held-out images",
        ),
        Column("Planted copies, AUC", title="Of the space that finds them best"),
        Column(
            "Found / planted",
            title="Share of images that were found to be copies, and that were planted, in that space",
        ),
        Column(
            "Blind to them", numeric=False, title="Spaces in which planted copies are not found"
        ),
        Column("Planted members, AUC", title="Of the attack by distance"),
        Column("Images", title="Training and held-out images"),
        Column("Patients", title="Held-out patients"),
    ]
    more = (
        "Positive control: copies of training images are planted and have to be found, by one space and by the distance attack "
        "at least. Negative control: held-out images play the synthetic ones, and nothing may be found. Images: training / "
        "held-out. Patients: held-out ones."
    )
    return (
        table("Would this audit have noticed a leak?", columns, rows, "privacy-controls", more=more)
        if rows
        else Markup("")
    )


def _verdict(name: str, held: dict[str, Tree]) -> str:
    return "not run" if name not in held else "passed" if passed(name, held[name]) else "NOT passed"


def _control_parts(audit: Audit) -> Markup:
    """A row each space and attack of each control, with what it measured; empty where the file does not tell."""
    rows = [
        [f"{name_of(hospital)}, {name}: {part}", *measured]
        for hospital in audit.hospitals
        for name, control in controls(hospital)
        for part, *measured in _parts(control)
    ]
    columns = [
        Column("Hospital, control", numeric=False),
        Column("AUC"),
        Column("Interval"),
        Column("Planted"),
        Column("Found"),
        Column(CI),
    ]
    columns += [
        Column("Excess", title="Mean over random halves of the held-out images"),
        Column(
            "Intervals with 0",
            title="Share of the random halvings whose interval of the excess holds 0",
        ),
    ]
    levels = {
        number(dig(tree(hospital.get("controls")), "negative", "membership", "level"))
        for hospital in audit.hospitals
    }
    wider = [share(level) for level in sorted(level for level in levels if level is not None)]
    judged = (
        f", of membership in the negative control of {' and '.join(wider)}, as all of those are judged together"
        if wider
        else ""
    )
    more = (
        "Planted and found: shares of images. Excess: what is called a copy among real images that cannot be one: 0 is right. "
        f"Intervals are of 95 %{judged}."
    )
    return (
        table("Every control", columns, rows, "privacy-control-parts", more=more)
        if rows
        else Markup("")
    )


def _holding(part: Tree) -> str:
    """In what share of how many halvings the excess may be 0: what the negative control of copies is judged by."""
    covered = number(dig(part, "covered"))
    return text.DASH if covered is None else f"{covered:.0%} of {text.whole(dig(part, 'splits'))}"


def _parts(control: Tree) -> Iterator[list[str]]:
    for space, part in tree(control.get("copies")).items():
        yield [
            f"copies by {SPACES.get(space, space)}",
            text.decimal(dig(part, "auc")),
            text.interval(dig(part, "auc_ci")),
            text.decimal(dig(part, "planted_share")),
            text.decimal(dig(part, "found_share")),
            text.interval(dig(part, "found_ci")),
            text.signed(dig(part, "mean_excess")),
            _holding(part),
        ]
    for attack, part in tree(dig(control, "membership", "attacks")).items():
        yield [
            f"membership by {attack}",
            text.decimal(dig(part, "auc")),
            text.interval(dig(part, "auc_ci")),
            *[text.DASH] * 5,
        ]


SECTION = Section("privacy", "Privacy", _render)
