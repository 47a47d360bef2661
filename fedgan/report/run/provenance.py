"""Provenance: settings, versions, machine, content hashes and licences of the data."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.config import describe, to_dict
from fedgan.report.facts import content_hash, flatten, source_text, value_text
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import RunData, Tree, trees

SETTINGS_COLUMNS = (
    Column("Key", numeric=False),
    Column("Value", numeric=False),
    Column("Meaning", numeric=False),
)
HASH_COLUMNS = (Column("Hospital", numeric=False), Column("Content hash", numeric=False))
FACTS_COLUMNS = (Column("Fact", numeric=False), Column("Value", numeric=False))


def _render(run: RunData) -> Markup:
    values = dict(flatten(to_dict(run.settings)))
    rows = [[item.key, values.get(item.key, ""), item.meaning] for item in describe()]
    defaults = {item.key: value_text(item.default) for item in describe()}
    changed = [
        row for row in rows if row[1] != defaults[row[0]] and row[0] not in ("name", "description")
    ]
    hashes = [
        [str(row.get("name", "unnamed")), found]
        for row in run.hospitals
        if (found := content_hash(row))
    ]
    return render(
        "provenance.html.j2",
        changed=table("Settings that differ from their defaults", SETTINGS_COLUMNS, changed)
        if changed
        else Markup(""),
        settings=table("All settings", SETTINGS_COLUMNS, rows, "settings"),
        environment=environment_table(
            {key: value for key, value in run.environment.items() if key != "sources"},
            "environment.json is missing: versions and machine are unknown.",
        ),
        sources=sources_table(
            trees(run.environment.get("sources")),
            "Sources and licences of the data",
            "The sources and licences of the data are unknown: environment.json does not list "
            "them.",
        ),
        hashes=table("Content hashes of the images", HASH_COLUMNS, hashes)
        if hashes
        else absent("No content hash of the images is known."),
        count=len(rows),
        name=run.settings.name,
        seed=run.settings.seed,
    )


def environment_table(facts: Tree, missing: str) -> Markup:
    """Versions and machine; the sentence `missing` without any."""
    rows = flatten(facts)
    if not rows:
        return absent(missing)
    return table("Versions and machine", FACTS_COLUMNS, rows, "environment")


def sources_table(sources: Sequence[Tree], caption: str, missing: str) -> Markup:
    """One row per source, one column per key; the sentence `missing` without any."""
    keys = list(dict.fromkeys(key for source in sources for key in source))
    if not keys:
        return absent(missing)
    sources = [
        source | ({"content_hash": content_hash(source)} if "content_hash" in source else {})
        for source in sources
    ]
    rows = [
        [(source_text if key == "source" else value_text)(source.get(key)) for key in keys]
        for source in sources
    ]
    columns = [Column(key.replace("_", " ").capitalize(), numeric=False) for key in keys]
    return table(caption, columns, rows, "sources")


SECTION = Section("provenance", "Provenance", _render)
