"""Overview of shards: table of counts, and warnings before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgan.data.shard import Shard
from fedgan.data.splits import SPLITS

FEW_IMAGES = 20


@dataclass(frozen=True)
class CountRow:
    """Images per split of one class (`label` "": all classes) in one institution."""

    institution: str
    label: str
    counts: dict[str, int]


def count_rows(shards: Sequence[Shard]) -> list[CountRow]:
    """Images per institution, class and split; rows with an empty label count all classes."""
    rows = []
    for shard in shards:
        several = len(shard.card.institutions) > 1
        for institution, table in shard.card.institutions.items():
            name = f"{shard.name}/{institution}" if several else shard.name
            rows += [
                CountRow(name, label, {split: table[split][label] for split in SPLITS})
                for label in shard.card.label_names
            ]
            inside = shard.samples.institutions == institution
            images = {
                split: int((inside & (shard.samples.splits == split)).sum()) for split in SPLITS
            }
            rows.append(CountRow(name, "", images))
    return rows


def shard_warnings(shards: Sequence[Shard]) -> list[str]:
    """Warnings about missing splits and classes, shards that differ, and skipped files."""
    first, found = shards[0], []
    for shard in shards:
        for what in ("label_names", "exclusive", "channels", "resolution"):
            if getattr(shard.card, what) != getattr(first.card, what):
                found.append(
                    f"{shard.name} and {first.name} differ in {what}: they cannot train together"
                )
        for split in SPLITS:
            if not shard.card.images[split]:
                found.append(f"{shard.name} has no image in its {split} split")
        if shard.card.skipped:
            reasons = ", ".join(
                f"{reason} ({count})" for reason, count in shard.card.skipped.items()
            )
            found.append(f"{shard.name}: files skipped at import: {reasons}")
        found += [
            f"{shard.name}: {note}"
            for note in shard.card.notes
            if "without a patient" in note or "usable" in note
        ]
    for label in first.card.label_names:
        train = {shard.name: shard.card.counts["train"].get(label, 0) for shard in shards}
        held = [name for name, count in train.items() if count]
        total = sum(train.values())
        if not total:
            found.append(
                f"no hospital holds '{label}' in its train split: merge it by a label map or "
                "leave it out"
            )
        elif total < FEW_IMAGES:
            found.append(f"'{label}' has only {total} training images")
        if len(held) == 1 and len(shards) > 1:
            found.append(
                f"only {held[0]} holds '{label}': the class cannot be distinguished from the image "
                "style of the hospital"
            )
    return found
