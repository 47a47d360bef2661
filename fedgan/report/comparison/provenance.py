"""Provenance: settings, seeds, versions, machine, data hashes and licences."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.facts import content_hash, flatten, source_text, value_text
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, tree, trees

KEY_COLUMNS = (Column("Key", numeric=False), Column("Value", numeric=False))
FACT_COLUMNS = (Column("Fact", numeric=False), Column("Value", numeric=False))
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
    settings = flatten(provenance["settings"]) if provenance.get("settings") else []
    return render(
        "comparison_provenance.html.j2",
        facts=table("In short", FACT_COLUMNS, facts, "facts")
        if facts
        else absent("comparison.json does not say how the comparison was made."),
        settings=table("Every setting of the scenario", KEY_COLUMNS, settings, "settings")
        if settings
        else absent("The settings are not known."),
        environment=_environment(provenance),
        sources=_sources(comparison, provenance),
        count=len(settings),
    )


def _environment(provenance: Tree) -> Markup:
    rows = flatten(tree(provenance.get("environment")))
    if not rows:
        return absent("Versions and machine are not known.")
    return table("Versions and machine", KEY_COLUMNS, rows, "environment")


def _sources(comparison: Comparison, provenance: Tree) -> Markup:
    """Source, licence and content hash per hospital; only the hash where no source is named."""
    sources = trees(provenance.get("sources"))
    if not sources:
        sources = [
            {"hospital": row.get("name"), "content_hash": digest}
            for row in comparison.hospitals
            if (digest := content_hash(row))
        ]
    keys = list(dict.fromkeys(key for source in sources for key in source))
    if not keys:
        return absent("The sources, licences and content hashes of the data are not known.")
    sources = [
        source | ({"content_hash": content_hash(source)} if "content_hash" in source else {})
        for source in sources
    ]
    rows = [
        [(source_text if key == "source" else value_text)(source.get(key)) for key in keys]
        for source in sources
    ]
    columns = [Column(key.replace("_", " ").capitalize(), numeric=False) for key in keys]
    return table("Sources, licences and content hashes of the data", columns, rows, "sources")


SECTION = Section("provenance", "Provenance", _render)
