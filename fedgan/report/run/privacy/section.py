"""The privacy section: audit verdict and controls, guarantee, evidence, limits."""

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
from fedgan.report.run.privacy.canaries import canary_table
from fedgan.report.run.privacy.evidence import CI, evidence
from fedgan.report.run.privacy.findings import (
    CONTROLS,
    SPACES,
    Audit,
    controls,
    insensitive_spaces,
    name_of,
    passed,
)
from fedgan.report.run.privacy.guarantee import (
    SCOPE,
    PrivacyCost,
    client_level_statement,
    meaning,
    percent,
    privacy_costs,
    statement,
    terms,
)
from fedgan.report.run.privacy.statements import (
    COMMAND,
    CRITERIA,
    NO_AUDIT,
    UNREADABLE,
    not_protected,
)

MOST_LINES = 6  # hospitals in the curve that remain distinguishable
NAME = Column("Hospital", numeric=False)
LEGEND = [
    ("synthetic images, or members", "synthetic"),
    ("the same figure for held-out real images", "real"),
]


def _render(run: RunData) -> Markup:
    audit, costs = Audit(run.audit), privacy_costs(run)
    return render(
        "privacy.html.j2",
        statement=statement(run),
        verdict=audit.verdict() if audit.exists else UNREADABLE if _is_damaged(run) else NO_AUDIT,
        command="" if audit.exists else COMMAND,
        valid=audit.is_valid,
        exists=audit.exists,
        scope=_scope(run, audit),
        controls=_controls(audit),
        control_parts=_control_parts(audit),
        guarantee=_guarantee(run, costs),
        canaries=canary_table(audit),
        meaning=meaning(costs),
        client_level=client_level_statement(run),
        curve=_curve(run, costs),
        not_shown=max(0, len(costs) - MOST_LINES),
        terms=terms(run),
        private=run.settings.privacy.on,
        criteria=[(key, *CRITERIA[key], *evidence(key, audit)) for key in CRITERIA],
        legend=legend(LEGEND, "dot"),
        notes=audit.notes,
        not_protected=not_protected(run),
    )


def _is_damaged(run: RunData) -> bool:
    return any(problem.startswith("audit.json ") for problem in run.problems)


# --- what is guaranteed --------------------------------------------------------------------------


def _guarantee(run: RunData, costs: list[PrivacyCost]) -> Markup:
    if not costs:
        return Markup("")
    columns = [
        NAME,
        Column("ε", title=f"Covers {SCOPE}"),
        Column("δ"),
        Column(
            "Noise multiplier",
            title="Standard deviation of the noise divided by the clipping norm",
        ),
        Column("Sampling rate", title="Probability that a step takes a unit"),
        Column(
            "Maximum found at 1 % false positives",
            title="Bound on the share of members that any attack finds",
        ),
        Column("Trained", numeric=False),
    ]
    rows = [
        [
            cost.name,
            cost.epsilon_text,
            text.significant(cost.delta, 3),
            text.significant(cost.noise_multiplier, 3),
            text.significant(cost.sample_rate, 3),
            "no bound" if cost.is_infinite else percent(cost.max_true_positive_rate),
            f"to round {cost.last_round:,}"
            if cost.stopped is None
            else f"to round {cost.stopped:,}: its budget allowed no further step",
        ]
        for cost in costs
    ]
    more = f"ε covers {SCOPE}. Noise multiplier and sampling rate are of this run."
    return table("Privacy cost per hospital", columns, rows, "privacy-epsilon", more=more)


def _curve(run: RunData, costs: list[PrivacyCost]) -> Markup:
    """ε over rounds, one line per hospital; empty if no round has a finite ε."""
    lines = [
        Line(cost.name, cost.curve, f"h{i + 1}")
        for i, cost in enumerate(costs[:MOST_LINES])
        if cost.curve
    ]
    if not lines:
        return Markup("")
    privacy = run.settings.privacy
    limits = [("limit", privacy.max_epsilon)] if privacy.max_epsilon else []
    limits = limits or ([("target", privacy.epsilon)] if privacy.epsilon else [])
    desc = "Epsilon of each hospital's ledger after each round: " + "; ".join(
        f"{line.name} {text.significant(line.points[-1][1], 3)} after round {line.points[-1][0]:g}"
        for line in lines
    )
    chart = line_chart("privacy-epsilon", "ε over the rounds", f"{desc}.", lines, "round", limits)
    marks = legend([(line.name, line.style) for line in lines], "line")
    return Markup(
        '{}<div class="charts single"><figure><figcaption>ε over the rounds<small>From the ledger, '
        "at the δ in the table; it never decreases.</small></figcaption>{}</figure></div>"
    ).format(marks, chart)


# --- whether the audit counts --------------------------------------------------------------------


def _scope(run: RunData, audit: Audit) -> str:
    """The audited model, the number of images, and the hospitals without an audit."""
    if not audit.exists:
        return ""
    parts = []
    if audit.round is not None:
        images = max((number(row.get("synthetic")) or 0 for row in audit.hospitals), default=0)
        on = f", on {images:,.0f} synthetic images per hospital" if images else ""
        parts.append(f"Audited: the model of round {audit.round:,}{on}.")
        last = number(run.last_round.get("round"))
        if last is not None and last != audit.round:
            parts.append(f"The last round is {last:,.0f}: the audit does not cover that model.")
    audited = {name_of(hospital) for hospital in audit.hospitals}
    missing = [name for name in run.hospital_names if name not in audited]
    if missing:
        parts.append(f"Not audited: {', '.join(missing)}.")
    if run.has_only_phantoms:
        parts.append("All images are phantoms: no image of a patient could leak.")
    return " ".join(parts)


def _controls(audit: Audit) -> Markup:
    """One row per hospital; empty if no control was run."""
    rows = []
    for hospital in audit.hospitals:
        found = dict(controls(hospital))
        verdicts = [_control_verdict(name, found) for name in CONTROLS]
        searches = [tree(part) for part in tree(dig(found.get("positive"), "copies")).values()]
        best: Tree = max(searches, key=lambda part: number(part.get("auc")) or 0.0, default={})
        members = dig(found.get("positive"), "membership", "attacks", "distance", "auc")
        sizes = " / ".join(text.whole(hospital.get(key)) for key in ("members", "held_out"))
        insensitive = ", ".join(insensitive_spaces(hospital)) or text.DASH
        shares = " / ".join(text.decimal(best.get(key)) for key in ("found_share", "planted_share"))
        aucs = (text.decimal(best.get("auc")), shares, insensitive, text.decimal(members))
        rows.append(
            [
                name_of(hospital),
                *verdicts,
                *aucs,
                sizes,
                text.whole(hospital.get("held_out_patients")),
            ]
        )
    columns = [
        NAME,
        Column(
            "Positive", numeric=False, title="Positive control: planted copies must be detected"
        ),
        Column(
            "Negative",
            numeric=False,
            title="Negative control: nothing may be found among held-out images",
        ),
        Column("Planted copies, AUC", title="Best space"),
        Column(
            "Found / planted",
            title="Shares of images detected as copies and planted, in that space",
        ),
        Column(
            "Insensitive spaces", numeric=False, title="Spaces that do not detect planted copies"
        ),
        Column("Planted members, AUC", title="Distance attack"),
        Column("Images", title="Training and held-out images"),
        Column("Patients", title="Held-out patients"),
    ]
    more = (
        "Positive control: copies of training images are planted; at least one space and the "
        "distance attack must detect them. Negative control: held-out images take the place of "
        "synthetic images, and nothing may be found. Images: training / held-out. Patients: "
        "held-out."
    )
    return (
        table("Controls per hospital", columns, rows, "privacy-controls", more=more)
        if rows
        else Markup("")
    )


def _control_verdict(name: str, found: dict[str, Tree]) -> str:
    if name not in found:
        return "not run"
    return "passed" if passed(name, found[name]) else "NOT passed"


def _control_parts(audit: Audit) -> Markup:
    """One row per control and space or attack; empty without such entries."""
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
            title="Share of the random splits whose interval of the excess contains 0",
        ),
    ]
    levels = {
        number(dig(tree(hospital.get("controls")), "negative", "membership", "level"))
        for hospital in audit.hospitals
    }
    wider = [percent(level) for level in sorted(level for level in levels if level is not None)]
    corrected = (
        f"; for membership in the negative control {' and '.join(wider)}, because all of these are "
        "tested together"
        if wider
        else ""
    )
    more = (
        "Planted and found: shares of images. Excess: copies found among real images that cannot "
        f"be copies; the correct value is 0. Confidence level: 95 %{corrected}."
    )
    return (
        table("All controls", columns, rows, "privacy-control-parts", more=more)
        if rows
        else Markup("")
    )


def _coverage(part: Tree) -> str:
    """Share of the random splits whose excess may be 0: criterion of the negative control."""
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
            _coverage(part),
        ]
    for attack, part in tree(dig(control, "membership", "attacks")).items():
        yield [
            f"membership by {attack}",
            text.decimal(dig(part, "auc")),
            text.interval(dig(part, "auc_ci")),
            *[text.DASH] * 5,
        ]


SECTION = Section("privacy", "Privacy", _render)
