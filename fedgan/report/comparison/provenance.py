"""Provenance: settings, seeds, versions, machine, data hashes and licences."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.facts import content_hash, flatten, value_text
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import tree, trees
from fedgan.report.run.provenance import FACTS_COLUMNS, environment_table, sources_table

KEY_COLUMNS = (Column("Key", numeric=False), Column("Value", numeric=False))
FACTS = (
    ("Seeds of the generators", "seeds"),
    ("Classifier", "classifier"),
    ("Extractor", "extractor"),
    ("Suite", "suite"),
    ("Non-inferiority margin", "margin"),
    ("Images seen per arm", "images_seen_budget"),
    ("Resolution", "resolution"),
    ("Channels", "channels"),
    ("Classes exclude each other", "exclusive"),
    ("Created", "created"),
)
HASHES = (("Hash of the settings", "settings_hash"), ("Code version", "code_version"))


def _render(comparison: Comparison) -> Markup:
    provenance = tree(comparison.content.get("provenance"))
    facts = [
        [head, value_text(value)]
        for head, key in FACTS
        if (value := comparison.content.get(key)) is not None
    ]
    facts += [[head, value_text(value)] for head, key in HASHES if (value := provenance.get(key))]
    sources = trees(provenance.get("sources"))
    hashes = [
        {"hospital": row.get("name"), "content_hash": digest}
        for row in comparison.hospitals
        if (digest := content_hash(row))
    ]
    settings = flatten(provenance["settings"]) if provenance.get("settings") else []
    return render(
        "comparison_provenance.html.j2",
        facts=table("In short", FACTS_COLUMNS, facts, "facts")
        if facts
        else absent("comparison.json does not say how the comparison was made."),
        settings=table("Every setting of the scenario", KEY_COLUMNS, settings, "settings")
        if settings
        else absent("The settings are not known."),
        environment=environment_table(
            tree(provenance.get("environment")), "Versions and machine are not known."
        ),
        sources=sources_table(
            sources or hashes,
            "Sources, licences and content hashes of the data",
            "The sources, licences and content hashes of the data are not known.",
        ),
        count=len(settings),
    )


SECTION = Section("provenance", "Provenance", _render)
