"""All that the comparison's page knows: `comparison.json`, read once and made harmless, and where the pictures lie.

Nothing here raises for damaged content: what cannot be read becomes a sentence in `problems`. The arms that failed stay
in every list, so that each table has a row for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgan.comparison_folder import ComparisonFolder
from fedgan.errors import ConfigError
from fedgan.redact import redact
from fedgan.report.facts import all_drawn
from fedgan.report.html.format import bounds, number
from fedgan.report.run.data import Tree, clean, dig, tree, trees

REAL, CENTRALIZED, FEDERATED, LOCAL = "real", "centralized", "federated", "local"
FINETUNED, COALITION = "finetuned", "coalition"
STYLES = 8  # arms that colour, dash and shape tell apart; the ninth looks like the first


@dataclass(frozen=True)
class ArmRun:
    """One training of an arm with one seed, as `comparison.json` lists it."""

    content: Tree

    @property
    def name(self) -> str:
        return str(self.content.get("name") or self.content.get("arm") or "unnamed arm")

    @property
    def kind(self) -> str:
        return str(self.content.get("arm") or "")

    @property
    def seed(self) -> str:
        seed = number(self.content.get("seed"))
        return "not known" if seed is None else f"{seed:g}"

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def status(self) -> str:
        return str(self.content.get("status") or "missing")

    @property
    def evaluation(self) -> Tree:
        return tree(self.content.get("evaluation"))

    @property
    def failure_reason(self) -> str:
        """Why this training gives no figures, as half a sentence; empty where it gives some."""
        if self.status != "done":
            reason = str(redact(self.content.get("failure") or "")).strip().rstrip(".")
            verb = "failed" if self.status == "failed" else f"is {self.status}"
            return f"{verb}: {reason}" if reason else f"{verb}, and no reason was written down"
        return "" if self.evaluation else "was trained, but not evaluated"

    @property
    def members(self) -> list[Tree]:
        return trees(self.content.get("members"))


@dataclass(frozen=True)
class Entry:
    """Something that is compared: training on real images, an arm over its seeds, or one hospital alone.

    `figures` is its row of `summary`, empty where there is none; `style` is its CSS class in every chart.
    """

    name: str
    kind: str
    hospital: str | None
    figures: Tree
    style: str
    runs: tuple[ArmRun, ...] = ()

    @property
    def label(self) -> str:
        if self.kind == REAL:
            return "real images"
        return f"{self.hospital} alone" if self.is_alone and self.kind == LOCAL else self.name

    @property
    def is_alone(self) -> bool:
        return self.hospital is not None

    @property
    def value(self) -> float | None:
        """Macro AUC over all real test images."""
        return number(self.figures.get("macro_auc"))

    @property
    def interval(self) -> tuple[float, float] | None:
        return bounds(self.figures.get("macro_auc_ci"))

    @property
    def failure_reason(self) -> str:
        """Why there is no macro AUC, as half a sentence; empty where there is one."""
        if self.value is not None:
            return ""
        reasons = list(dict.fromkeys(run.failure_reason for run in self.runs if run.failure_reason))
        if reasons:
            return "; ".join(reasons)
        return "has no macro AUC: comparison.json gives none"

    def inside(self, institution: str) -> Tree:
        """Its figures on the test images of one institution."""
        return tree(dig(self.figures, "per_institution", institution))

    def of_class(self, label: str) -> Tree:
        return tree(dig(self.figures, "per_class", label))


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison folder. `content` is `comparison.json`, or empty where it could not be read."""

    content: Tree
    folder: Path | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return str(self.content.get("name") or "comparison")

    @property
    def labels(self) -> list[str]:
        """Labels that the classifiers tell apart: the named ones, then any that only a figure has."""
        named = self.content.get("label_names")
        found = dict.fromkeys(str(name) for name in named) if isinstance(named, list) else {}
        for row in trees(self.content.get("summary")):
            found.update(dict.fromkeys(tree(row.get("per_class"))))
        return list(found)

    @property
    def hospitals(self) -> list[Tree]:
        return trees(self.content.get("hospitals"))

    @property
    def hospital_names(self) -> list[str]:
        """The hospitals of the data, then any that only a figure names."""
        found = dict.fromkeys(
            str(row["name"]) for row in self.hospitals if row.get("name") is not None
        )
        for row in trees(self.content.get("summary")):
            found.update(dict.fromkeys(tree(row.get("per_institution"))))
            found.update({str(row["hospital"]): None} if row.get("hospital") is not None else {})
        return list(found)

    @property
    def data_labels(self) -> list[str]:
        """Labels of the images, and so of the rows of the sample grids, in the order in which the hospitals list them."""
        found: dict[str, None] = {}
        for hospital in self.hospitals:
            for split in tree(hospital.get("counts")).values():
                found.update(dict.fromkeys(tree(split)))
        return list(found) or self.labels

    @cached_property
    def runs(self) -> tuple[ArmRun, ...]:
        """Every training, coalitions too: arm by arm in the order in which the arms are first listed, then by seed."""
        found = [ArmRun(row) for row in trees(self.content.get("arms"))]
        order = list(dict.fromkeys(run.name for run in found))
        return tuple(sorted(found, key=lambda run: order.index(run.name)))

    @cached_property
    def arm_runs(self) -> tuple[ArmRun, ...]:
        """Every training but those of coalitions, which serve the contribution alone."""
        return tuple(run for run in self.runs if run.kind != COALITION)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Real images, then the arms in the order of `arms` (those without a figure too), then each hospital alone."""
        rows = [row for row in trees(self.content.get("summary")) if row.get("arm") != COALITION]
        real = [row for row in rows if row.get("arm") == REAL]
        whole = {
            _name(row): row
            for row in rows
            if row.get("arm") != REAL and row.get("hospital") is None
        }
        names = list(dict.fromkeys([*(run.name for run in self.arm_runs), *whole]))
        styles = {name: f"a{i % STYLES + 1}" for i, name in enumerate(names)}
        arms = []
        for name in names:
            runs = tuple(run for run in self.arm_runs if run.name == name)
            row = whole.get(name, {})
            kind = str(row.get("arm") or (runs[0].kind if runs else ""))
            arms.append(Entry(name, kind, None, row, styles[name], runs))
        alone = [
            Entry(
                _name(row),
                str(row.get("arm") or ""),
                str(row["hospital"]),
                row,
                "alone",
                self._runs_of(str(row.get("arm"))),
            )
            for row in rows
            if row.get("hospital") is not None
        ]
        return (Entry(REAL, REAL, None, real[0] if real else {}, "real"), *arms, *alone)

    @property
    def arms(self) -> list[Entry]:
        """The arms, without real images and without hospitals alone."""
        return [entry for entry in self.entries if entry.kind != REAL and not entry.is_alone]

    @property
    def alone(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_alone]

    @property
    def real(self) -> Entry:
        return self.entries[0]

    @property
    def central(self) -> Entry | None:
        found = [entry for entry in self.arms if entry.kind == CENTRALIZED]
        return next(
            (entry for entry in found if entry.name == CENTRALIZED), next(iter(found), None)
        )

    @property
    def federated(self) -> Entry | None:
        """The federated arm that the page speaks of: the one called so, else the first with figures, else the first."""
        found = [entry for entry in self.arms if entry.kind == FEDERATED]
        measured = [entry for entry in found if entry.value is not None]
        return next(
            (entry for entry in measured if entry.name == FEDERATED),
            next(iter([*measured, *found]), None),
        )

    @property
    def variants(self) -> list[Tree]:
        """The rungs of an ablation, its foot first; empty for any other comparison."""
        return trees(dig(self.content, "ablation", "variants"))

    @property
    def drawn(self) -> bool:
        """Whether every image was drawn by a program, so that no figure speaks of patients."""
        provenance = tree(self.content.get("provenance"))
        foreign = dig(provenance, "settings", "evaluation", "root")
        return not foreign and all_drawn(
            row.get("source") for row in trees(provenance.get("sources"))
        )

    def test_images(self, institution: str) -> float | None:
        """How many real test images of an institution every arm was tested on."""
        places = [dig(run.evaluation, "utility", key, "per_institution", institution, "images")
                  for run in self.arm_runs for key in ("synthetic", "real")]  # fmt: skip
        return next((n for value in places if (n := number(value)) is not None), None)

    def label(self, name: str) -> str:
        """What the page calls the row of `summary` with this name."""
        return next((entry.label for entry in self.entries if entry.name == name), name)

    @property
    def small_counts(self) -> bool:
        """Whether the page prints a count of 1 to 9 images or patients of somebody."""
        counts = [
            n
            for row in self.hospitals
            for key in ("counts", "images", "patients")
            for n in _numbers(row.get(key))
        ]
        return not self.drawn and any(1 <= n <= 9 for n in counts)

    @property
    def comparisons(self) -> list[Tree]:
        return trees(self.content.get("comparisons"))

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(training, why it gives no figures) of every training that gives none."""
        return [(run.label, run.failure_reason) for run in self.runs if run.failure_reason]

    def style(self, name: str) -> str:
        """The CSS class of an arm by its name."""
        return next((entry.style for entry in self.arms if entry.name == name), "main")

    def difference(self, a: str, b: str) -> Tree:
        """The paired difference a − b with its interval and p-values, whichever way round it was measured; empty if not."""
        for row in self.comparisons:
            pair = (str(row.get("a")), str(row.get("b")))
            if pair == (a, b) and number(row.get("difference")) is not None:
                return row
            if pair == (b, a) and (value := number(row.get("difference"))) is not None:
                ends = bounds(row.get("ci"))
                return row | {
                    "a": a,
                    "b": b,
                    "difference": -value,
                    "ci": [-ends[1], -ends[0]] if ends else None,
                }
        return {}

    def _runs_of(self, kind: str) -> tuple[ArmRun, ...]:
        return tuple(run for run in self.arm_runs if run.kind == kind)


def load(folder: Path) -> Comparison:
    """Read a comparison folder. Raises `ConfigError` when it has no `comparison.json`; nothing else."""
    place = ComparisonFolder.at(folder)
    if not place.comparison.is_file():
        raise ConfigError(
            f"{place.path} holds no comparison.json: give the folder of a comparison, or let `fedgan compare` finish first"
        )
    try:
        content: Any = clean(json.loads(place.comparison.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return Comparison(content, place.path)
    problem = "comparison.json is damaged and could not be read, so this page has no figures; `fedgan compare` writes it again."
    return Comparison({}, place.path, (problem,))


def _name(row: Tree) -> str:
    return str(row.get("name") or row.get("arm") or "unnamed arm")


def _numbers(value: Any) -> list[float]:
    """All numbers of a nested dict."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in _numbers(item)]
    return [n] if (n := number(value)) is not None else []
