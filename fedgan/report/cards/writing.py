"""The cards of one run: the facts as JSON, and the Markdown made of the same facts."""

from __future__ import annotations

from pathlib import Path

from fedgan import files
from fedgan.report.cards.collect import collect
from fedgan.report.cards.markdown import render
from fedgan.report.cards.subjects import dataset_facts, model_facts
from fedgan.report.run.data import Tree
from fedgan.run_folder import RunFolder


def write_cards(run: RunFolder) -> list[Path]:
    """Write model_card and dataset_card (.md and .json) into the run's folder `cards` and return their paths.

    Reads the run folder alone. Anything but config.toml may lack or be damaged: the card then says so. Raises
    `ConfigError` where this is no run folder, `StorageError` where it cannot be written.
    """
    card = collect(run)
    return write_both(run.path / "cards", model_facts(card), dataset_facts(card))


def write_both(folder: Path, model: Tree, dataset: Tree) -> list[Path]:
    """Write the two cards into `folder`, each as Markdown and as JSON, atomically; their paths."""
    return [
        path
        for name, template, facts in (
            ("model_card", "card_model.md.j2", model),
            ("dataset_card", "card_dataset.md.j2", dataset),
        )
        for path in write_card(folder, name, template, facts)
    ]


def write_card(folder: Path, name: str, template: str, facts: Tree) -> list[Path]:
    """Write `facts` as `name`.md and `name`.json; their paths."""
    page, plain = folder / f"{name}.md", folder / f"{name}.json"
    files.write_text(page, render(template, facts))
    files.write_json(plain, facts)
    return [page, plain]
