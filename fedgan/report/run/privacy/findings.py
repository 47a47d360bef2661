"""Findings of an audit (audit.json): each figure beside the same figure for held-out real images.

An audit is valid only if its controls passed: planted copies were detected and held-out images
were not taken for copies. A missing figure becomes a dash. An audit that does not state that it is
valid is not valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgan.audit.rules import (
    FEW_PATIENTS,
    FORMAT,
    POWERFUL,
    Measured,
    attack_stands_out,
    copies_stand_out,
    exceeded_claim,
    outliers_stand_out,
    projection_stands_out,
)
from fedgan.evaluation.metrics.intervals import wilson_interval
from fedgan.report.html.format import bounds, decimal, interval, number, plural
from fedgan.report.run.data import Tree, dig, sentences, tree, trees
from fedgan.report.run.privacy.statements import LIMIT

SPACES = {
    "pixels": "pixels",
    "features": "extractor features",
    "embedding": "contrastive embedding",
}
CONTROLS = ("positive", "negative")  # both must pass for a valid audit
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Figure:
    """A figure of one hospital (higher: worse leak) and the same figure for held-out real images.

    `stands_out`: whether it exceeds the held-out figure by the rules of the audit; None: not known.
    `is_insensitive`: it did not detect planted copies, so it cannot show that there is no leak.
    """

    criterion: str
    hospital: str
    measure: str
    value: float | None
    ci: Interval
    real: float | None
    real_ci: Interval
    stands_out: bool | None
    is_insensitive: bool = False

    def describe(self) -> str:
        """Measure, hospital, figure and held-out figure."""
        text = f"{self.measure} at {self.hospital}: {_with_interval(self.value, self.ci)}"
        if self.real is not None:
            text += f", held-out real images {_with_interval(self.real, self.real_ci)}"
        return text


def _with_interval(value: float | None, ci: Interval) -> str:
    return decimal(value) + (f" ({interval(ci)})" if ci else "")


@dataclass(frozen=True)
class Audit:
    """The audit of a run, the content of audit.json."""

    content: Tree

    @property
    def exists(self) -> bool:
        """Whether the run folder has an audit.json."""
        return bool(self.content)

    @property
    def hospitals(self) -> list[Tree]:
        return trees(self.content.get("hospitals"))

    @property
    def round(self) -> int | None:
        found = number(self.content.get("round"))
        return None if found is None else round(found)

    @property
    def is_valid(self) -> bool:
        """Whether the audit states that it is valid and nothing in it contradicts that."""
        return self.exists and not self.failure_reasons

    @property
    def failure_reasons(self) -> list[str]:
        """Why the audit is not valid; empty for a valid audit."""
        reasons = []
        if (found := self.content.get("format", FORMAT)) != FORMAT:
            return [f"audit.json has the format {found}, not {FORMAT}: run fedgan audit again"]
        for hospital in self.hospitals:
            name = name_of(hospital)
            if not controls(hospital):
                why = "; ".join(sentences(hospital.get("notes"))).rstrip(".")
                reasons.append(f"no control was run at {name}{f' ({why})' if why else ''}")
                continue
            failed = {
                kind: control for kind, control in controls(hospital) if not passed(kind, control)
            }
            missing = [
                kind for kind in CONTROLS if not isinstance(dig(hospital, "controls", kind), dict)
            ]
            details = [text for control in failed.values() for text in _reasons(control)]
            why = f" ({'; '.join(details)})" if details else ""
            if failed:
                reasons.append(f"at {name} the {_join_controls(list(failed))} did not pass{why}")
            if missing:
                reasons.append(f"at {name} the {_join_controls(missing)} was not run")
            if hospital.get("valid") is not True and not failed and not missing:
                reasons.append(f"the audit of {name} does not state that it is valid")
        if not self.hospitals:
            reasons.append("no hospital was audited")
        elif self.content.get("valid") is not True and not reasons:
            reasons.append("audit.json does not state that it is valid")
        return reasons

    @property
    def figures(self) -> list[Figure]:
        return [figure for hospital in self.hospitals for figure in _figures(hospital)]

    @property
    def notes(self) -> list[str]:
        """All notes of the audit, each once, with the names of hospitals and attacks."""
        found = sentences(self.content.get("notes"))
        own = [
            (name_of(hospital), text) for hospital in self.hospitals for text in _notes(hospital)
        ]
        return list(dict.fromkeys([*found, *_grouped(own)]))

    def verdict(self) -> str:
        """The result of the audit in one to four sentences, broken claims of ε first."""
        broken = [
            f"The guarantee does not hold at {name_of(entry)}: {sign}."
            for entry in trees(self.content.get("canaries"))
            if (sign := exceeded_claim(entry))
        ]
        return " ".join([*broken, self._verdict_of_attacks()])

    def _verdict_of_attacks(self) -> str:
        if not self.is_valid:
            return (
                f"This audit is not valid: {'; '.join(self.failure_reasons)}. Its figures prove "
                "nothing, neither a leak nor its absence."
            )
        measured = [figure for figure in self.figures if figure.stands_out is not None]
        found = [figure for figure in measured if figure.stands_out]
        if not measured:
            return "The controls passed, but no figure was measured: this audit is no evidence."
        scope = f"{plural(len(measured), 'figure')} of {plural(len(self.hospitals), 'hospital')}"
        if not found:
            return (
                f"The controls passed, and none of {scope} stands out from the same figure for "
                f"held-out real images.{_insensitive_note(measured)}{self._few_patients_note()} "
                f"{LIMIT}"
            )
        listed = "; ".join(figure.describe() for figure in found[:3]) + (
            f"; and {len(found) - 3} more" if len(found) > 3 else ""
        )
        verb = "stands" if len(found) == 1 else "stand"
        return (
            f"Evidence of a leak: {len(found)} of {scope} {verb} out from the same figure for "
            f"held-out real images. {listed}. By chance alone about "
            f"{max(len(measured) * 0.025, 0.1):.1g} would."
        )

    def _few_patients_note(self) -> str:
        """The hospitals whose few held-out patients reveal only a large leak; may be empty."""
        few = [
            f"{name_of(hospital)} ({count:,.0f})"
            for hospital in self.hospitals
            if (count := number(hospital.get("held_out_patients"))) is not None
            and count < FEW_PATIENTS
        ]
        return (
            f" Held-out patients are few at {', '.join(few)}: only a large leak would show there."
            if few
            else ""
        )


def _insensitive_note(measured: list[Figure]) -> str:
    count = sum(figure.is_insensitive for figure in measured)
    if not count:
        return ""
    verb = "comes" if count == 1 else "come"
    return (
        f" {count} of these figures {verb} from a search or an attack that did not detect the "
        "planted leak either (insensitive)."
    )


def _notes(hospital: Tree) -> list[str]:
    """Notes of a hospital; equal notes of several attacks are one note with all their names."""
    attack_notes = [
        (str(row.get("attack", "unnamed attack")), part)
        for row in trees(hospital.get("membership"))
        for text in sentences(row.get("note"))
        for part in text.split("; ")
    ]
    return [*sentences(hospital.get("notes")), *_grouped(attack_notes)]


def _grouped(notes: list[tuple[str, str]]) -> list[str]:
    """From (name, text): each text once, after the names that share it."""
    names: dict[str, list[str]] = {}
    for name, text in notes:
        names.setdefault(text, []).append(name)
    return [f"{', '.join(dict.fromkeys(shared))}: {text}" for text, shared in names.items()]


def name_of(hospital: Tree) -> str:
    return str(hospital.get("name", "unnamed"))


def controls(hospital: Tree) -> list[tuple[str, Tree]]:
    """(name, content) of a hospital's controls."""
    return [
        (str(name), tree(content))
        for name, content in tree(hospital.get("controls")).items()
        if isinstance(content, dict)
    ]


def passed(name: str, control: Tree) -> bool:
    """Whether a control passed: required controls must state it, others must not deny it."""
    return control.get("passed") is True if name in CONTROLS else control.get("passed") is not False


def is_linkability(attack: Any) -> bool:
    """Whether an attack uses only distances from a real image to the synthetic ones."""
    name = str(attack).lower()
    return "distance" in name and "calibrated" not in name and "shadow" not in name


def copies(hospital: Tree) -> list[tuple[str, Tree]]:
    """(name of the space, findings) for each space that was searched for copies."""
    found = tree(hospital.get("copies")).items()
    return [
        (SPACES.get(str(space), str(space)), part)
        for space, part in found
        if isinstance(part, dict) and part
    ]


def attacks(hospital: Tree, criterion: str) -> list[Tree]:
    """The membership attacks of a hospital under "linkability" or "inference"."""
    return [
        row
        for row in trees(hospital.get("membership"))
        if is_linkability(row.get("attack")) is (criterion == "linkability")
    ]


def insensitive_spaces(hospital: Tree) -> list[str]:
    """Names of the spaces in which planted copies were not detected."""
    parts = tree(dig(hospital, "controls", "positive", "copies"))
    return [
        SPACES.get(str(space), str(space))
        for space, part in parts.items()
        if tree(part).get("passed") is False
    ]


def _figures(hospital: Tree) -> Iterator[Figure]:
    """Figures of a hospital, compared by the rules of the audit (fedgan/audit/rules.py)."""
    name = name_of(hospital)
    for space, found in copies(hospital):
        excess = bounds(found.get("excess_ci"))
        near = [
            _measured(found, f"near_{side}_share", f"near_{side}_ci")
            for side in ("training", "held_out")
        ]
        yield Figure(
            "singling-out",
            name,
            f"share of copies ({space})",
            number(found.get("copying_share")),
            bounds(found.get("copying_ci")),
            number(found.get("held_out_share")),
            bounds(found.get("held_out_ci")),
            None if excess is None else copies_stand_out(excess, *near),
            space in insensitive_spaces(hospital),
        )
        yield _outlier_figure(name, space, found)
    projection = tree(hospital.get("projection"))
    if number(projection.get("auc")) is not None:
        gap, area = bounds(projection.get("gap_ci")), bounds(projection.get("auc_ci"))
        out = None if gap is None or area is None else projection_stands_out(gap, area)
        yield _auc_figure("singling-out", name, "AUC of the projection gap", projection, out)
    for criterion in ("linkability", "inference"):
        for row in attacks(hospital, criterion):
            auc = _measured(row, "auc", "auc_ci")
            out = (
                None
                if auc is None
                else attack_stands_out(auc, _measured(row, "null_auc", "null_auc_ci"))
            )
            measure = f"AUC of {row.get('attack', 'an unnamed attack')}"
            yield _auc_figure(criterion, name, measure, row, out)


def _outlier_figure(hospital: str, space: str, found: Tree) -> Figure:
    """The share of single copies (fedgan/audit/attacks/tail.py) beside that of held-out images."""
    counts = [
        number(found.get(key))
        for key in ("outliers", "synthetic_images", "held_out_outliers", "held_out_images")
    ]
    known = [int(count) for count in counts if count is not None]
    measure = f"share of single copies ({space})"
    if len(known) < len(counts) or not known[1] or not known[3]:
        return Figure("singling-out", hospital, measure, None, None, None, None, None, False)
    shares = known[0] / known[1], known[2] / known[3]
    return Figure(
        "singling-out",
        hospital,
        measure,
        shares[0],
        wilson_interval(min(shares[0], 1.0), known[1]),
        shares[1],
        wilson_interval(min(shares[1], 1.0), known[3]),
        outliers_stand_out(*known),
        (number(dig(found, "power", "5 %")) or 0.0) < POWERFUL,
    )


def _auc_figure(
    criterion: str, hospital: str, measure: str, found: Tree, stands_out: bool | None
) -> Figure:
    """An AUC beside that of held-out images."""
    return Figure(
        criterion,
        hospital,
        measure,
        number(found.get("auc")),
        bounds(found.get("auc_ci")),
        number(found.get("null_auc")),
        bounds(found.get("null_auc_ci")),
        stands_out,
        found.get("detects_leak") is False,
    )


def _measured(found: Tree, key: str, ci: str) -> Measured | None:
    """A figure with its interval; None if either is missing."""
    value, ends = number(found.get(key)), bounds(found.get(ci))
    return None if value is None or ends is None else (value, ends)


def _join_controls(names: list[str]) -> str:
    return " and the ".join(f"{name} control" for name in names)


def _reasons(control: Tree) -> list[str]:
    """Reasons of failure given by a control or its parts."""
    found = sentences(control.get("reason"))
    for part in control.values():
        parts = [part] if isinstance(part, dict) else trees(part)
        found += [
            text
            for item in parts
            if item.get("passed") is False
            for text in sentences(item.get("reason"))
        ]
    return list(dict.fromkeys(found))
