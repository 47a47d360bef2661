"""Summary: the main result and the cost of the run."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.facts import PHANTOM_NOTE
from fedgan.report.html import format as text
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.templating import render
from fedgan.report.run.data import RunData, dig

GENERATORS = {
    "federated": "this federated generator",
    "centralised": "this centrally trained generator",
    "centralized": "this centrally trained generator",
    "local": "this generator of one hospital",
}


def answer(run: RunData) -> str:
    """The main result: macro AUC of a classifier trained on synthetic images only."""
    synthetic, real = auc(run, "synthetic"), auc(run, "real")
    generator = GENERATORS.get(str(run.evaluation.get("arm") or ""), "this generator")
    trained = f"A classifier trained only on images of {generator}"
    if synthetic and real:
        return (
            f"{trained} reaches a macro AUC of {synthetic} on real test images; "
            f"trained on the real images it reaches {real}."
        )
    if synthetic:
        return (
            f"{trained} reaches a macro AUC of {synthetic} on real test images; "
            "the same classifier trained on real images has not been measured."
        )
    if real:
        return (
            f"{trained} has not been measured; "
            f"trained on the real images it reaches a macro AUC of {real} on real test images."
        )
    return f"{trained} has not been measured yet on real test images."


def auc(run: RunData, source: str) -> str:
    """A macro AUC with its interval, 0.91 (0.89–0.93); empty if not measured."""
    result = dig(run.evaluation, "utility", source)
    value, interval = number(dig(result, "macro_auc")), bounds(dig(result, "macro_auc_ci"))
    if value is None:
        return ""
    return text.decimal(value, 2) + (f" ({text.interval(interval, 2)})" if interval else "")


def figures(run: RunData) -> list[tuple[str, str, str]]:
    """Key figures as (name, value, footnote)."""
    seen, planned = run.total("images_seen"), run.settings.training.kimg * 1000
    done, rounds = len(run.rounds), run.settings.federation.rounds
    hospitals = len(run.hospital_names)
    return [
        (
            "Images seen",
            text.whole(seen),
            "" if seen is None else f"{seen / planned:.0%} of {planned:,.0f} planned",
        ),
        ("Rounds", f"{done:,}" if done else text.DASH, f"of {rounds:,} planned"),
        (
            "Hospitals",
            f"{hospitals}" if hospitals else text.DASH,
            f"aggregated by {run.settings.federation.strategy}",
        ),
        ("Wall time", text.duration(run.total("wall_seconds")), ""),
        ("Bytes exchanged", text.size(run.total("bytes_exchanged")), "both ways, all hospitals"),
    ]


def _render(run: RunData) -> Markup:
    return render(
        "summary.html.j2",
        answer=answer(run),
        phantom_note=PHANTOM_NOTE if run.has_only_phantoms else "",
        description=run.settings.description,
        figures=figures(run),
    )


SECTION = Section("summary", "Summary", _render)
