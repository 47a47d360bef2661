"""Hospitals that take part in a run: as introduced in this session, and as kept in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Participant:
    """A hospital that has joined a run, as checkpoints keep it.

    `images`: its training images. `units`: its units of privacy (images or patients).
    `joined`: rounds that were complete when it joined; 0 for those that began together.
    `label_counts`: training images per label; empty unless `federation.share_label_counts`.
    `key`: who may be this hospital: in a deployment the name of its registered key (of an unnamed
    key the node), in a simulation empty.
    """

    number: int
    name: str
    images: int
    units: int = 0
    joined: int = 0
    label_counts: tuple[int, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class Member:
    """A connected hospital with the facts that it was introduced with.

    `node`: Flower's node id. `phantoms`: all its images are phantoms. `units`: units of privacy
    (images or patients), 0 without privacy. `label_counts`, `key`: as in `Participant`.
    """

    node: int
    number: int
    name: str
    images: int
    label_names: tuple[str, ...]
    exclusive: bool
    channels: int
    resolution: int
    phantoms: bool = False
    units: int = 0
    label_counts: tuple[int, ...] = ()
    key: str = ""

    def __str__(self) -> str:
        return hospital_label(self.number, self.name)

    def participant(self, joined: int) -> Participant:
        """The checkpoint entry of this hospital, which joins after `joined` rounds."""
        return Participant(
            self.number, self.name, self.images, self.units, joined, self.label_counts, self.key
        )


def hospital_label(number: int, name: str) -> str:
    """A hospital's name in errors and log lines: hospital 1 ('north')."""
    return f"hospital {number + 1} ('{name}')"
