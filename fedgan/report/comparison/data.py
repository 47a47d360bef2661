"""Content of a comparison folder as the report reads it: `comparison.json` and the folder's path.

Damaged content raises nothing: it becomes a sentence in `problems`. Failed arms stay in every list,
so each table has a row for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgan.comparison_folder import ComparisonFolder
from fedgan.errors import ConfigError
from fedgan.redact import redact
from fedgan.report.facts import are_all_phantoms
from fedgan.report.html.format import bounds, number
from fedgan.report.run.data import Tree, clean, dig, labels_in_counts, tree, trees

REAL, CENTRALIZED, FEDERATED, LOCAL = "real", "centralized", "federated", "local"
FINETUNED, COALITION = "finetuned", "coalition"
STYLES = 8  # distinct arm styles (colour, dash, shape); the ninth arm repeats the first


@dataclass(frozen=True)
class ArmRun:
    """One training of an arm with one seed, as `comparison.json` lists it."""

    content: Tree

    @property
    def name(self) -> str:
        return _name(self.content)

    @property
    def kind(self) -> str:
        return str(self.content.get("arm") or "")

    @property
    def label(self) -> str:
        seed = number(self.content.get("seed"))
        return f"{self.name}, seed {'not known' if seed is None else f'{seed:g}'}"

    @property
    def row_label(self) -> str:
        """`label`, followed by the status of a training without figures."""
        if not self.failure_reason:
            return self.label
        return f"{self.label} ({'not evaluated' if self.status == 'done' else self.status})"

    @property
    def status(self) -> str:
        return str(self.content.get("status") or "missing")

    @property
    def evaluation(self) -> Tree:
        return tree(self.content.get("evaluation"))

    @property
    def utility(self) -> Tree:
        return tree(self.evaluation.get("utility"))

    @property
    def fidelity(self) -> Tree:
        return tree(self.evaluation.get("fidelity"))

    @property
    def cost(self) -> Tree:
        return tree(self.content.get("cost"))

    @property
    def failure_reason(self) -> str:
        """Predicate that says why there are no figures; empty where there are some."""
        if self.status != "done":
            reason = str(redact(self.content.get("failure") or "")).strip().rstrip(".")
            verb = "failed" if self.status == "failed" else f"is {self.status}"
            return f"{verb}: {reason}" if reason else f"{verb}, without a recorded reason"
        return "" if self.evaluation else "was trained but not evaluated"


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: training on real images, an arm over its seeds, or one hospital.

    `figures` is its row of `summary` (empty if missing); `style` its CSS class in every chart.
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
        return f"{self.hospital} alone" if self.is_hospital and self.kind == LOCAL else self.name

    @property
    def row_label(self) -> str:
        """`label`, followed by the status of an arm without a macro AUC."""
        if self.value is not None:
            return self.label
        failed = self.runs and all(run.status == "failed" for run in self.runs)
        return f"{self.label} ({'failed' if failed else 'no figures'})"

    @property
    def is_hospital(self) -> bool:
        """Whether the row is the own generator of one hospital."""
        return self.hospital is not None

    @property
    def value(self) -> float | None:
        """Macro AUC over all real test images."""
        return number(self.figures.get("macro_auc"))

    @property
    def failure_reason(self) -> str:
        """Predicate that says why there is no macro AUC; empty where there is one."""
        if self.value is not None:
            return ""
        reasons = dict.fromkeys(run.failure_reason for run in self.runs if run.failure_reason)
        return "; ".join(reasons) or "has no macro AUC: comparison.json gives none"

    def in_institution(self, name: str) -> Tree:
        """Figures on the test images of one institution."""
        return tree(dig(self.figures, "per_institution", name))

    def for_class(self, label: str) -> Tree:
        """Figures for one class."""
        return tree(dig(self.figures, "per_class", label))


@dataclass(frozen=True)
class Comparison:
    """Content of a comparison folder. `content`: `comparison.json`, empty if it is unreadable."""

    content: Tree
    folder: Path | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return str(self.content.get("name") or "comparison")

    @property
    def labels(self) -> list[str]:
        """Classes of the classifiers: those of `label_names`, then any other that has figures."""
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
        """Hospitals of the data, then any other that has figures."""
        found = dict.fromkeys(
            str(row["name"]) for row in self.hospitals if row.get("name") is not None
        )
        for row in trees(self.content.get("summary")):
            found.update(dict.fromkeys(tree(row.get("per_institution"))))
            found.update({str(row["hospital"]): None} if row.get("hospital") is not None else {})
        return list(found)

    @property
    def data_labels(self) -> list[str]:
        """Labels of the images (rows of the sample grids), in the order of the counts."""
        return labels_in_counts(self.hospitals) or self.labels

    @cached_property
    def runs(self) -> tuple[ArmRun, ...]:
        """All trainings, coalitions included: arms in the order of the file, then seeds."""
        found = [ArmRun(row) for row in trees(self.content.get("arms"))]
        order = list(dict.fromkeys(run.name for run in found))
        return tuple(sorted(found, key=lambda run: order.index(run.name)))

    @cached_property
    def arm_runs(self) -> tuple[ArmRun, ...]:
        """All trainings except coalitions, which only serve the contribution."""
        return tuple(run for run in self.runs if run.kind != COALITION)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Real images, the arms in the order of `arms`, then each hospital's own generator."""
        rows = [row for row in trees(self.content.get("summary")) if row.get("arm") != COALITION]
        real = next((row for row in rows if row.get("arm") == REAL), {})
        arm_rows = {
            _name(row): row
            for row in rows
            if row.get("arm") != REAL and row.get("hospital") is None
        }
        arms = []
        names = dict.fromkeys([*(run.name for run in self.arm_runs), *arm_rows])
        for i, name in enumerate(names):
            runs = tuple(run for run in self.arm_runs if run.name == name)
            row = arm_rows.get(name, {})
            kind = str(row.get("arm") or (runs[0].kind if runs else ""))
            arms.append(Entry(name, kind, None, row, f"a{i % STYLES + 1}", runs))
        hospitals = []
        for row in rows:
            if row.get("hospital") is not None:
                runs = tuple(run for run in self.arm_runs if run.kind == str(row.get("arm")))
                kind, name = str(row.get("arm") or ""), str(row["hospital"])
                hospitals.append(Entry(_name(row), kind, name, row, "alone", runs))
        return (Entry(REAL, REAL, None, real, "real"), *arms, *hospitals)

    @property
    def arms(self) -> list[Entry]:
        """The arms, without real images and single hospitals."""
        return [entry for entry in self.entries if entry.kind != REAL and not entry.is_hospital]

    @property
    def hospital_entries(self) -> list[Entry]:
        """The own generators of single hospitals."""
        return [entry for entry in self.entries if entry.is_hospital]

    @property
    def real(self) -> Entry:
        return self.entries[0]

    @property
    def centralized(self) -> Entry | None:
        """The centralised arm: the one of that name, else the first of that kind."""
        found = [entry for entry in self.arms if entry.kind == CENTRALIZED]
        return next((e for e in found if e.name == CENTRALIZED), next(iter(found), None))

    @property
    def federated(self) -> Entry | None:
        """The main federated arm: the one named so, else the first with figures, else the first."""
        found = [entry for entry in self.arms if entry.kind == FEDERATED]
        measured = [entry for entry in found if entry.value is not None]
        return next(
            (entry for entry in measured if entry.name == FEDERATED),
            next(iter([*measured, *found]), None),
        )

    @property
    def variants(self) -> list[Tree]:
        """The arms of an ablation, the baseline first; empty for any other comparison."""
        return trees(dig(self.content, "ablation", "variants"))

    @property
    def has_only_phantoms(self) -> bool:
        """Whether all images are phantoms, so no figure describes patients."""
        provenance = tree(self.content.get("provenance"))
        foreign = dig(provenance, "settings", "evaluation", "root")
        return not foreign and are_all_phantoms(
            row.get("source") for row in trees(provenance.get("sources"))
        )

    @property
    def margin(self) -> float | None:
        """The non-inferiority margin; None unless it is positive."""
        margin = number(self.content.get("margin"))
        return margin if margin is not None and margin > 0 else None

    def test_images(self, institution: str) -> float | None:
        """Number of an institution's real test images, the same for every arm."""
        return first_number(
            dig(run.utility, key, "per_institution", institution, "images")
            for run in self.arm_runs
            for key in ("synthetic", "real")
        )

    def label(self, name: str) -> str:
        """Label of the row of `summary` with this name."""
        return next((entry.label for entry in self.entries if entry.name == name), name)

    @property
    def has_small_counts(self) -> bool:
        """Whether the report prints a count of 1 to 9 images or patients of real people."""
        counts = [
            n
            for row in self.hospitals
            for key in ("counts", "images", "patients")
            for n in numbers(row.get(key))
        ]
        return not self.has_only_phantoms and any(1 <= n <= 9 for n in counts)

    @property
    def pairs(self) -> list[Tree]:
        """The paired comparisons."""
        return trees(self.content.get("comparisons"))

    def style(self, name: str) -> str:
        """CSS class of an arm by its name."""
        return next((entry.style for entry in self.arms if entry.name == name), "main")

    def difference(self, a: str, b: str) -> Tree:
        """The paired difference a − b in either order of measurement; empty if not measured."""
        for row in self.pairs:
            pair = (str(row.get("a")), str(row.get("b")))
            if pair == (a, b) and number(row.get("difference")) is not None:
                return row
            if pair == (b, a) and (value := number(row.get("difference"))) is not None:
                ends = bounds(row.get("ci"))
                ci = [-ends[1], -ends[0]] if ends else None
                return row | {"a": a, "b": b, "difference": -value, "ci": ci}
        return {}


def load(folder: Path) -> Comparison:
    """Read a comparison folder. Raises `ConfigError` if it has no `comparison.json`."""
    paths = ComparisonFolder.at(folder)
    if not paths.comparison.is_file():
        raise ConfigError(
            f"{paths.path} holds no comparison.json: give the folder of a comparison, "
            "or let `fedgan compare` finish first"
        )
    paths.check_format()
    try:
        content: Any = clean(json.loads(paths.comparison.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return Comparison(content, paths.path)
    problem = (
        "comparison.json is damaged and could not be read, so this report has no figures; "
        "`fedgan compare` writes it again."
    )
    return Comparison({}, paths.path, (problem,))


def numbers(value: Any) -> list[float]:
    """All finite numbers of a nested dict or list."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [n for item in items for n in numbers(item)]
    return [n] if (n := number(value)) is not None else []


def first_number(values: Iterable[object]) -> float | None:
    """The first value that is a finite number."""
    return next((n for value in values if (n := number(value)) is not None), None)


def mean_number(values: Iterable[object]) -> float | None:
    """Mean of the values that are finite numbers; None without any."""
    known = [n for value in values if (n := number(value)) is not None]
    return sum(known) / len(known) if known else None


def failure_note(rows: Iterable[ArmRun | Entry]) -> str:
    """One sentence per row without figures, with its reason; empty if there is none."""
    return " ".join(f"{row.label} {row.failure_reason}." for row in rows if row.failure_reason)


def _name(row: Tree) -> str:
    return str(row.get("name") or row.get("arm") or "unnamed arm")
