"""What the audit found, as tables and small charts: under each head every figure beside the one for held-out real images."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.audit.rules import CHANCE
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, dot_chart
from fedgan.report.html.format import bounds, number
from fedgan.report.html.tables import Column, table
from fedgan.report.run.data import Tree, tree
from fedgan.report.run.privacy.findings import SPACES, Audit, attacks, blind_spaces, copies, name_of
from fedgan.report.run.privacy.guarantee import share

MOST_ROWS = 12  # hospitals in one chart
CI = "95% interval"
HOSPITAL_SPACE = Column("Hospital, space", numeric=False)
MEMBERSHIP = (
    "AUC: how often a training image looks more like a member than an image that was held out; chance is 0.5. Beside it, the "
    "same attack where held-out images pose as members. Found at 1 %: share of members at 1 % false alarms; chance is 1 %. "
    "Images: members / non-members. A dash: too few images for that rate, or an attack that no planted leak can test."
)


def evidence(head: str, audit: Audit) -> tuple[list[Markup], list[Markup]]:
    """(charts, tables) of one head; both empty where nothing was measured under it."""
    maker = {"singling-out": _singling_out, "linkability": _linkability, "inference": _inference}[
        head
    ]
    return maker(audit) if audit.there else ([], [])


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
            "AUC: training images are drawn more exactly",
            CHANCE,
        )
    )
    return [chart for chart in charts if chart], [
        part
        for part in (_copies(audit), _near(audit), _memorised(audit), _projection(audit))
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
            "no" if space in blind_spaces(hospital) else "yes",
        ]
        for hospital in audit.hospitals
        for space, row in copies(hospital)
    ]
    columns = [HOSPITAL_SPACE, Column("Synthetic"), Column(CI), Column("Held-out real"), Column(CI)]
    columns += [
        Column("Excess"),
        Column(CI),
        Column("Threshold"),
        Column("Sees planted copies", numeric=False),
    ]
    more = (
        "Share of images that lie nearer to a training image than the threshold, which only the nearest twentieth of the "
        "held-out real images do. Synthetic and held-out images are looked up among the same training images. A share below that "
        "of the held-out images: the synthetic ones look less like this hospital's images than its own others do."
    )
    return _table(audit, "Copies among the synthetic images", columns, rows, "privacy-copies", more)


def _near(audit: Audit) -> Markup:
    """What decides whether an excess of copies counts: only measured where the space was not fitted to the training images."""
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
    columns.append(
        Column("Images", title="Training images, and as many held-out ones, that were looked up")
    )
    more = (
        "Share of synthetic images within the threshold of a training image, and of a held-out one, among as many of each. A "
        "blurred or typical image is near to both: an excess of copies counts only where the first share is the larger."
    )
    return _table(
        audit, "Near to training images, or to everybody's", columns, rows, "privacy-near", more
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
        "Share of training images that are the nearest one of a copy: by equally many synthetic and held-out images, as the "
        "share grows with their number, and by all synthetic ones. Images: synthetic / training / held-out."
    )
    return _table(
        audit, "Training images that a copy repeats", columns, rows, "privacy-memorised", more
    )


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
        "Mean distance of real images to the nearest image that the generator can draw. A gap above 0, or an AUC above 0.5: it "
        "draws training images more exactly than images that it never saw."
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
    more = "Share of synthetic images whose nearest real image is a training and not a held-out one, among equally many of both."
    closer = _table(
        audit,
        "Whose images the synthetic ones lie nearer to",
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
        "Nearer to training images, pixels",
        nearer,
        "share of synthetic images",
        CHANCE,
    )
    charts, tables = _membership(audit, True)
    charts = [*([chart] if chart else []), *charts]
    return charts, [*([closer] if closer else []), *tables]


def _inference(audit: Audit) -> tuple[list[Markup], list[Markup]]:
    return _membership(audit, False)


def _membership(audit: Audit, linking: bool) -> tuple[list[Markup], list[Markup]]:
    """Charts (one an attack) and the table of the attacks under one head."""
    found = [
        (name_of(hospital), row)
        for hospital in audit.hospitals
        for row in attacks(hospital, linking)
    ]
    kinds = list(dict.fromkeys(str(row.get("attack", "unnamed attack")) for _, row in found))
    rare = any(
        number(row.get("tpr_at_01")) is not None for _, row in found
    )  # it takes 1,000 non-members
    key = "linkability" if linking else "inference"
    charts = [
        _pairs_chart(
            audit,
            f"{key}-{i}",
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
            *([_rate(row, "tpr_at_01")] if rare else []),
            f"{text.whole(row.get('members'))} / {text.whole(row.get('non_members'))}",
        ]
        for name, row in found
    ]
    columns = [
        Column("Hospital, attack", numeric=False),
        Column("AUC"),
        Column(CI),
        Column(
            "Held-out real", title="AUC of the same attack where held-out images pose as members"
        ),
        Column(CI),
        Column(
            "Planted leak",
            title="AUC of the same attack on members that were planted: what it would have noticed",
        ),
        Column("Found at 1 %", title="Share of members found at 1 % false alarms; chance is 1 %"),
        Column(
            "Held-out real",
            title="Share of held-out images in their place that are found at 1 % false alarms",
        ),
        *(
            [
                Column(
                    "Found at 0.1 %",
                    title="Share of members found at 0.1 % false alarms; chance is 0.1 %",
                )
            ]
            if rare
            else []
        ),
        Column("Images", title="Members and non-members"),
    ]
    title = "Membership by distance" if linking else "Membership by other attacks"
    part = _table(audit, title, columns, rows, f"privacy-membership-{key}", MEMBERSHIP)
    return [chart for chart in charts if chart], [part] if part else []


def _rate(row: Tree, key: str) -> str:
    value, ci = number(row.get(key)), bounds(row.get(f"{key}_ci"))
    return (
        text.DASH
        if value is None
        else share(value) + (f" ({100 * ci[0]:.1f}–{100 * ci[1]:.1f})" if ci else "")
    )


def _table(
    audit: Audit,
    caption: str,
    columns: list[Column],
    rows: list[list[str]],
    download: str,
    more: str,
) -> Markup:
    """A table whose caption and file name say where the audit is not valid; empty without rows."""
    if not rows:
        return Markup("")
    mark, name = ("", download) if audit.valid else (" (not valid)", f"{download}-not-valid")
    return table(caption + mark, columns, rows, name, more=more)


def _pairs_chart(
    audit: Audit,
    key: str,
    title: str,
    found: Sequence[tuple[str, Tree, str, str, str, str]],
    x_label: str,
    chance: float | None = None,
) -> Markup | None:
    """A row a hospital: the figure of the synthetic images beside that of held-out real ones; None without any figure."""
    rows = [
        Row(
            name,
            [
                Dot(words, value, bounds(row.get(ci)), style)
                for words, at, ci, style in (
                    ("held-out real", real, real_ci, "real"),
                    ("synthetic", one, one_ci, "synthetic"),
                )
                if (value := number(row.get(at))) is not None
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
    mark = "" if audit.valid else " (not valid)"
    chart = dot_chart(f"privacy-{key}", title + mark, f"{desc}.", rows, x_label, domain, references)
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title + mark, chart)
