"""Label maps: `normal=normal,*=abnormal` merges labels by name.

A map is a list of `source=target` rules; `*` matches every label without its own rule. The targets
have the order of the rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgan.errors import ConfigError, DataError

WILDCARD = "*"
MAX_LABELS = 10_000


@dataclass(frozen=True)
class LabelMap:
    """Rules from source label to target label; without rules the identity."""

    rules: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str) -> LabelMap:
        """Parse `source=target,source=target,…`.

        Raises `ConfigError` for a rule without '=' or a repeated source.
        """
        rules: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            source, equals, target = (piece.strip() for piece in part.partition("="))
            if not equals or not source or not target or target == WILDCARD:
                raise ConfigError(
                    f"'{part}' is no rule of a label map: write source=target, e.g. "
                    "normal=normal,*=abnormal"
                )
            if source in rules:
                raise ConfigError(f"the label map has two rules for '{source}': keep one")
            rules[source] = target
        return LabelMap(tuple(rules.items()))

    @property
    def targets(self) -> tuple[str, ...]:
        """Possible target labels, in the order of the rules."""
        return tuple(dict.fromkeys(target for _, target in self.rules))

    def target(self, label: str) -> str:
        """Target of `label`. Raises `DataError` if no rule matches."""
        if not self.rules:
            return label
        rules = dict(self.rules)
        if label not in rules and WILDCARD not in rules:
            raise DataError(f"the label map has no rule for '{label}': add '{label}=…' or '*=…'")
        return rules.get(label, rules.get(WILDCARD, ""))

    def names(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Label names after the map.

        Raises `DataError` for a label without a rule and for a rule without a label.
        """
        for source, _ in self.rules:
            if source != WILDCARD and source not in labels:
                near = difflib.get_close_matches(source, labels, n=1)
                hint = (
                    f"; did you mean '{near[0]}'?"
                    if near
                    else f": the labels are {', '.join(labels)}"
                )
                raise DataError(
                    f"the label map has a rule for '{source}', which is no label of the data{hint}"
                )
        reached = [self.target(label) for label in labels]
        order = self.targets if self.rules else tuple(dict.fromkeys(reached))
        return tuple(name for name in order if name in reached)

    def apply(self, labels: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Merge columns of `labels` (N, K): a target is 1 if any of its sources is.

        Returns (N, K') uint8 and the target names.
        """
        out_names = self.names(names)
        out = np.zeros((len(labels), len(out_names)), np.uint8)
        for column, name in enumerate(names):
            out[:, out_names.index(self.target(name))] |= labels[:, column].astype(np.uint8)
        return out, out_names
