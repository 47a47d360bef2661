"""Charts and tables of an audit by criterion, with the figures for held-out real images."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.audit.rules import CHANCE
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, dot_chart
from fedgan.report.html.format import bounds, number
from fedgan.report.html.tables import Column, table
from fedgan.report.run.data import Tree, dig, tree
from fedgan.report.run.privacy.findings import (
    SPACES,
    Audit,
    attacks,
    copies,
    insensitive_spaces,
    name_of,
)
from fedgan.report.run.privacy.guarantee import percent

MOST_ROWS = 12  # hospitals in one chart
CI = "95% interval"
HOSPITAL_SPACE = Column("Hospital, space", numeric=False)
MEMBERSHIP = (
    "AUC: how often a training image looks more like a member than a held-out image does; chance "
    "is 0.5. Held-out real: the same attack with held-out images as pseudo-members. Found at 1 %: "
    "share of members found at 1 % false positives; chance is 1 %. Images: members / non-members. "
    "A dash: too few images for that rate, or an attack that no planted leak can test."
)


def evidence(criterion: str, audit: Audit) -> tuple[list[Markup], list[Markup]]:
    """(charts, tables) of one criterion; both empty without figures."""
    if not audit.exists:
        return [], []
    if criterion == "singling-out":
        return _singling_out(audit)
    if criterion == "linkability":
        return _linkability(audit)
    return _membership(audit, "inference")


def _singling_out(audit: Audit) -> tuple[list[Markup], list[Markup]]:
    found = [
        (name_of(hospital), space, tree(row))
        for hospital in audit.hospitals
        for space, row in copies(hospital)
    ]
    spaces = list(dict.fromkeys(space for _, space, _ in found))
    charts = [
        _pairs_chart(
            audit,
            f"copies-{i}",
            f"Share of copies, {space}",
            [
                (name, row, "copying_share", "copying_ci", "held_out_share", "held_out_ci")
                for name, at, row in found
                if at == space
            ],
            "share within the threshold of a training image",
        )
        for i, space in enumerate(spaces)
    ]
    gaps = [
        (
            name_of(hospital),
            tree(hospital.get("projection")),
            "auc",
            "auc_ci",
            "null_auc",
            "null_auc_ci",
        )
        for hospital in audit.hospitals
    ]
    charts.append(
        _pairs_chart(
            audit,
            "projection",
            "Projection gap",
            gaps,
            "AUC: training images are reproduced more exactly",
            CHANCE,
        )
    )
    return [chart for chart in charts if chart], [
        part
        for part in (
            _copies(audit),
            _outliers(audit),
            _near(audit),
            _memorised(audit),
            _projection(audit),
        )
        if part
    ]


def _copies(audit: Audit) -> Markup:
    rows = [
        [
            f"{name_of(hospital)}, {space}",
            text.decimal(row.get("copying_share")),
            text.interval(row.get("copying_ci")),
            text.decimal(row.get("held_out_share")),
            text.interval(row.get("held_out_ci")),
            text.signed(row.get("excess")),
            text.spread(row.get("excess_ci")),
            text.significant(row.get("threshold"), 3),
            "no" if space in insensitive_spaces(hospital) else "yes",
        ]
        for hospital in audit.hospitals
        for space, row in copies(hospital)
    ]
    columns = [HOSPITAL_SPACE, Column("Synthetic"), Column(CI), Column("Held-out real"), Column(CI)]
    columns += [
        Column("Excess"),
        Column(CI),
        Column("Threshold"),
        Column("Detects planted copies", numeric=False),
    ]
    more = (
        "Share of images nearer to a training image than the threshold; 5 % of held-out real "
        "images are. Synthetic and held-out images are compared with the same training images. A "
        "share below that of the held-out images: the synthetic images resemble the images of "
        "this hospital less than its own held-out images do."
    )
    return _table(audit, "Copies among the synthetic images", columns, rows, "privacy-copies", more)


def _outliers(audit: Audit) -> Markup:
    """Single copies, and the chance to find one, 1 % and 5 % of copies."""
    rows = [
        [
            f"{name_of(hospital)}, {space}",
            text.whole(row.get("outliers")),
            text.whole(row.get("held_out_outliers")),
            *(
                text.DASH if value is None else percent(value)
                for value in (number(dig(row, "power", leak)) for leak in ("one", "1 %", "5 %"))
            ),
        ]
        for hospital in audit.hospitals
        for space, row in copies(hospital)
    ]
    columns = [HOSPITAL_SPACE, Column("Single copies"), Column("Held-out real")]
    columns += [
        Column("Finds one copy", title="Chance to find one copy among the synthetic images"),
        Column("Finds 1 %"),
        Column("Finds 5 %"),
    ]
    more = (
        "Synthetic images far nearer to one training patient than to any other: one is evidence. "
        "The last columns are the power: the chance that this audit finds one copy, or 1 % or 5 % "
        "of copies (moved by up to a pixel, mirrored, noised), by the rule of "
        "the verdict."
    )
    return _table(audit, "Single copies", columns, rows, "privacy-outliers", more)


def _near(audit: Audit) -> Markup:
    """Nearness to training and held-out images; only in spaces not fitted to training images."""
    rows = [
        [
            f"{name_of(hospital)}, {space}",
            text.decimal(row.get("near_training_share")),
            text.interval(row.get("near_training_ci")),
            text.decimal(row.get("near_held_out_share")),
            text.interval(row.get("near_held_out_ci")),
            text.whole(row.get("near_images")),
        ]
        for hospital in audit.hospitals
        for space, row in copies(hospital)
        if number(row.get("near_training_share")) is not None
    ]
    columns = [
        HOSPITAL_SPACE,
        Column("Near to training"),
        Column(CI),
        Column("Near to held-out real"),
        Column(CI),
    ]
    columns.append(Column("Images", title="Training images, and as many held-out images, compared"))
    more = (
        "Share of synthetic images within the threshold of a training image and of a held-out "
        "image, among equally many of each. A blurred or typical image is near to both: an excess "
        "of copies counts only if the first share is larger."
    )
    return _table(
        audit, "Near training images and near held-out images", columns, rows, "privacy-near", more
    )


def _memorised(audit: Audit) -> Markup:
    rows = []
    for hospital in audit.hospitals:
        for space, row in copies(hospital):
            key = (
                "memorised_matched"
                if number(row.get("memorised_matched")) is not None
                else "memorised_share"
            )
            rows.append(
                [
                    f"{name_of(hospital)}, {space}",
                    text.decimal(row.get(key)),
                    text.interval(row.get(f"{key}_ci", row.get("memorised_ci"))),
                    text.decimal(row.get("memorised_held_out")),
                    text.interval(row.get("memorised_held_out_ci")),
                    text.decimal(row.get("memorised_share")),
                    " / ".join(
                        text.whole(row.get(n))
                        for n in ("synthetic_images", "reference_images", "held_out_images")
                    ),
                ]
            )
    columns = [
        HOSPITAL_SPACE,
        Column("By synthetic"),
        Column(CI),
        Column("By held-out real"),
        Column(CI),
    ]
    columns += [
        Column("By all synthetic"),
        Column("Images", title="Synthetic, training and held-out images"),
    ]
    more = (
        "Share of training images that are nearest to a copy: for equally many synthetic and "
        "held-out images, because the share grows with their number, and for all synthetic "
        "images. Images: synthetic / training / held-out."
    )
    return _table(audit, "Memorised training images", columns, rows, "privacy-memorised", more)


def _projection(audit: Audit) -> Markup:
    rows = []
    for hospital in audit.hospitals:
        row = tree(hospital.get("projection"))
        if not row:
            continue
        images = row.get("images")
        counts = (
            " / ".join(map(text.whole, images)) if isinstance(images, list) else text.whole(images)
        )
        rows.append(
            [
                name_of(hospital),
                text.significant(row.get("train_mean")),
                text.significant(row.get("held_out_mean")),
                text.significant(row.get("gap"), 3),
                text.sized_interval(row.get("gap_ci")),
                text.decimal(row.get("auc")),
                text.interval(row.get("auc_ci")),
                text.decimal(row.get("null_auc")),
                text.interval(row.get("null_auc_ci")),
                counts,
            ]
        )
    columns = [
        Column("Hospital", numeric=False),
        Column("Training"),
        Column("Held-out real"),
        Column("Gap"),
        Column(CI),
    ]
    columns += [
        Column("AUC"),
        Column(CI),
        Column("AUC, held-out", title="The same between halves of the held-out images"),
    ]
    columns.append(Column(CI))
    columns.append(Column("Images", title="Training and held-out images"))
    more = (
        "Mean distance of real images to the nearest image that the generator can produce. A gap "
        "above 0, or an AUC above 0.5: it reproduces training images more exactly than images it "
        "never saw."
    )
    return _table(
        audit,
        "Distance of real images to their projections",
        columns,
        rows,
        "privacy-projection",
        more,
    )


def _linkability(audit: Audit) -> tuple[list[Markup], list[Markup]]:
    rows = [
        [
            f"{name_of(hospital)}, {space}",
            text.decimal(row.get("closer_share")),
            text.interval(row.get("closer_ci")),
            text.decimal(CHANCE),
        ]
        for hospital in audit.hospitals
        for space, row in copies(hospital)
        if number(row.get("closer_share")) is not None
    ]
    columns = [
        HOSPITAL_SPACE,
        Column("Nearer to training"),
        Column(CI),
        Column("Held-out real (chance)"),
    ]
    more = (
        "Share of synthetic images whose nearest real image is a training image, among equally "
        "many training and held-out images."
    )
    closer = _table(
        audit,
        "Nearest real image: training or held-out",
        columns,
        rows,
        "privacy-closer",
        more,
    )
    nearer = [
        (name_of(hospital), row, "closer_share", "closer_ci", "", "")
        for hospital in audit.hospitals
        for space, row in copies(hospital)
        if space == SPACES["pixels"]
    ]
    chart = _pairs_chart(
        audit,
        "closer",
        "Nearest to training images, pixels",
        nearer,
        "share of synthetic images",
        CHANCE,
    )
    charts, tables = _membership(audit, "linkability")
    charts = [*([chart] if chart else []), *charts]
    return charts, [*([closer] if closer else []), *tables]


def _membership(audit: Audit, criterion: str) -> tuple[list[Markup], list[Markup]]:
    """One chart per attack, and the table of the attacks, for "linkability" or "inference"."""
    found = [
        (name_of(hospital), row)
        for hospital in audit.hospitals
        for row in attacks(hospital, criterion)
    ]
    kinds = list(dict.fromkeys(str(row.get("attack", "unnamed attack")) for _, row in found))
    # The rate at 0.1 % false positives requires 1,000 non-members.
    has_01 = any(number(row.get("tpr_at_01")) is not None for _, row in found)
    charts = [
        _pairs_chart(
            audit,
            f"{criterion}-{i}",
            f"AUC, {kind}",
            [
                (name, row, "auc", "auc_ci", "null_auc", "null_auc_ci")
                for name, row in found
                if str(row.get("attack")) == kind
            ],
            "AUC of membership (0.5 is chance)",
            CHANCE,
        )
        for i, kind in enumerate(kinds)
    ]
    rows = [
        [
            f"{name}, {row.get('attack', 'unnamed attack')}",
            text.decimal(row.get("auc")),
            text.interval(row.get("auc_ci")),
            text.decimal(row.get("null_auc")),
            text.interval(row.get("null_auc_ci")),
            text.decimal(row.get("leak_auc")),
            _rate(row, "tpr_at_1"),
            _rate(row, "null_tpr_at_1"),
            *([_rate(row, "tpr_at_01")] if has_01 else []),
            f"{text.whole(row.get('members'))} / {text.whole(row.get('non_members'))}",
        ]
        for name, row in found
    ]
    columns = [
        Column("Hospital, attack", numeric=False),
        Column("AUC"),
        Column(CI),
        Column(
            "Held-out real", title="AUC of the same attack with held-out images as pseudo-members"
        ),
        Column(CI),
        Column(
            "Planted leak",
            title="AUC of the same attack on planted members: its sensitivity",
        ),
        Column(
            "Found at 1 %", title="Share of members found at 1 % false positives; chance is 1 %"
        ),
        Column(
            "Held-out real",
            title="Share of pseudo-members found at 1 % false positives",
        ),
        *(
            [
                Column(
                    "Found at 0.1 %",
                    title="Share of members found at 0.1 % false positives; chance is 0.1 %",
                )
            ]
            if has_01
            else []
        ),
        Column("Images", title="Members and non-members"),
    ]
    by = "distance" if criterion == "linkability" else "other attacks"
    part = _table(
        audit, f"Membership by {by}", columns, rows, f"privacy-membership-{criterion}", MEMBERSHIP
    )
    return [chart for chart in charts if chart], [part] if part else []


def _rate(row: Tree, key: str) -> str:
    value, ci = number(row.get(key)), bounds(row.get(f"{key}_ci"))
    return (
        text.DASH
        if value is None
        else percent(value) + (f" ({100 * ci[0]:.1f}–{100 * ci[1]:.1f})" if ci else "")
    )


def _table(
    audit: Audit,
    caption: str,
    columns: list[Column],
    rows: list[list[str]],
    download: str,
    more: str,
) -> Markup:
    """A table whose caption and file name say if the audit is not valid; empty without rows."""
    if not rows:
        return Markup("")
    mark, name = ("", download) if audit.is_valid else (" (not valid)", f"{download}-not-valid")
    return table(caption + mark, columns, rows, name, more=more)


def _pairs_chart(
    audit: Audit,
    key: str,
    title: str,
    found: Sequence[tuple[str, Tree, str, str, str, str]],
    x_label: str,
    chance: float | None = None,
) -> Markup | None:
    """One row per hospital: figures of synthetic and held-out real images; None without figures."""
    rows = [
        Row(
            name,
            [
                Dot(label, value, bounds(row.get(ci)), style)
                for label, key_of, ci, style in (
                    ("held-out real", real, real_ci, "real"),
                    ("synthetic", one, one_ci, "synthetic"),
                )
                if (value := number(row.get(key_of))) is not None
            ],
        )
        for name, row, one, one_ci, real, real_ci in found[:MOST_ROWS]
    ]
    ends = [end for row in rows for dot in row.dots for end in (dot.value, *(dot.interval or ()))]
    if not ends:
        return None
    domain = (min(0.4, *ends), max(0.6, *ends)) if chance is not None else (0.0, max(0.1, *ends))
    references = [("chance", chance)] if chance is not None else []
    desc = "; ".join(
        f"{row.label}, {dot.name}: {dot.value:.3f}" for row in rows for dot in row.dots
    )
    mark = "" if audit.is_valid else " (not valid)"
    chart = dot_chart(f"privacy-{key}", title + mark, f"{desc}.", rows, x_label, domain, references)
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title + mark, chart)
