"""Write cards: the facts as JSON, and as Markdown."""

from __future__ import annotations

from pathlib import Path

from fedgan import files
from fedgan.report.cards.collect import collect
from fedgan.report.cards.markdown import render
from fedgan.report.cards.subjects import dataset_facts, model_facts
from fedgan.report.run.data import Tree
from fedgan.run_folder import RunFolder


def write_cards(run: RunFolder) -> list[Path]:
    """Write model_card and dataset_card (.md and .json) into the folder `cards` of a run.

    Returns their paths. Files other than config.toml may be missing or damaged; the card then says
    so. Raises `ConfigError` if `run` is no run folder, `StorageError` if a card cannot be written.
    """
    card = collect(run)
    return write_both(run.path / "cards", model_facts(card), dataset_facts(card))


def write_both(folder: Path, model: Tree, dataset: Tree) -> list[Path]:
    """Write both cards into `folder`, as Markdown and JSON, atomically; return their paths."""
    return [
        path
        for name, template, facts in (
            ("model_card", "card_model.md.j2", model),
            ("dataset_card", "card_dataset.md.j2", dataset),
        )
        for path in write_card(folder, name, template, facts)
    ]


def write_card(folder: Path, name: str, template: str, facts: Tree) -> list[Path]:
    """Write `facts` as `name`.md and `name`.json; return their paths."""
    markdown, json = folder / f"{name}.md", folder / f"{name}.json"
    files.write_text(markdown, render(template, facts))
    files.write_json(json, facts)
    return [markdown, json]
