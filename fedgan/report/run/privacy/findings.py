"""What an audit found, read from audit.json: each figure beside the same figure for held-out real images, after the controls.

An audit counts only when its controls passed: a planted leak was caught and fresh images were not taken for copies.
Nothing in the file is trusted to be there: what is missing is a dash, and an audit that does not say that it is valid is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgan.audit.rules import (
    FEW_PATIENTS,
    FORMAT,
    Measured,
    attack_stands_out,
    copies_stand_out,
    projection_stands_out,
)
from fedgan.report.html.format import bounds, decimal, interval, number, plural
from fedgan.report.run.data import Tree, dig, sentences, tree, trees
from fedgan.report.run.privacy.words import LIMIT

SPACES = {
    "pixels": "pixels",
    "features": "extractor features",
    "embedding": "contrastive embedding",
}
CONTROLS = ("positive", "negative")  # without both green an audit says nothing
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Figure:
    """One figure of one hospital, higher for a worse leak, and the same figure for held-out real images.

    `stands_out`: whether it lies above the held-out figure by more than its intervals allow; None where that is not known.
    `blind`: whether a planted leak was not seen by it: it can tell of a leak, but not that there is none.
    """

    head: str
    hospital: str
    measure: str
    value: float | None
    ci: Interval
    real: float | None
    real_ci: Interval
    stands_out: bool | None
    blind: bool = False

    @property
    def words(self) -> str:
        """Hospital, measure, figure and its counterpart: for a sentence."""
        here = f"{decimal(self.value)}{f' ({interval(self.ci)})' if self.ci else ''}"
        beside = f", held-out real images {decimal(self.real)}{f' ({interval(self.real_ci)})' if self.real_ci else ''}"
        return f"{self.measure} at {self.hospital}: {here}{beside if self.real is not None else ''}"


@dataclass(frozen=True)
class Audit:
    """The audit of a run; `there` is False where no audit.json lies in the run folder."""

    content: Tree

    @property
    def there(self) -> bool:
        return bool(self.content)

    @property
    def hospitals(self) -> list[Tree]:
        return trees(self.content.get("hospitals"))

    @property
    def round(self) -> int | None:
        found = number(self.content.get("round"))
        return None if found is None else round(found)

    @property
    def valid(self) -> bool:
        """Whether the figures count: the audit says so, and nothing in it says otherwise."""
        return self.there and not self.why_not

    @property
    def why_not(self) -> list[str]:
        """Why the audit is not valid, a sentence a reason; empty for a valid one."""
        reasons = []
        if (found := self.content.get("format", FORMAT)) != FORMAT:
            return [f"audit.json has the format {found}, not {FORMAT}: run fedgan audit again"]
        for hospital in self.hospitals:
            if not controls(hospital):
                why = "; ".join(sentences(hospital.get("notes"))).rstrip(".")
                reasons.append(
                    f"no control was run at {name_of(hospital)}{f' ({why})' if why else ''}"
                )
                continue
            failed = [name for name, control in controls(hospital) if not passed(name, control)]
            missing = [
                name for name in CONTROLS if not isinstance(dig(hospital, "controls", name), dict)
            ]
            told = [
                text
                for name, control in controls(hospital)
                if name in failed
                for text in _reasons(control)
            ]
            why = f" ({'; '.join(told)})" if told else ""
            if failed:
                reasons.append(
                    f"at {name_of(hospital)} the {_control_words(failed)} did not pass{why}"
                )
            if missing:
                reasons.append(f"at {name_of(hospital)} the {_control_words(missing)} was not run")
            if hospital.get("valid") is not True and not failed and not missing:
                reasons.append(f"the audit of {name_of(hospital)} does not say that it is valid")
        if not self.hospitals:
            reasons.append("no hospital was audited")
        elif self.content.get("valid") is not True and not reasons:
            reasons.append("audit.json does not say that it is valid")
        return reasons

    @property
    def figures(self) -> list[Figure]:
        return [figure for hospital in self.hospitals for figure in _figures(hospital)]

    @property
    def notes(self) -> list[str]:
        """All notes of the audit, each once: those of hospitals with their names, those of attacks with theirs."""
        found = sentences(self.content.get("notes"))
        own = [
            (name_of(hospital), text) for hospital in self.hospitals for text in _notes(hospital)
        ]
        return list(
            dict.fromkeys([*found, *(f"{names}: {text}" for names, text in _gathered(own))])
        )

    def headline(self) -> str:
        """The verdict in a sentence or three."""
        if not self.valid:
            return f"This audit is not valid: {'; '.join(self.why_not)}. Its figures prove nothing, in neither direction."
        judged = [figure for figure in self.figures if figure.stands_out is not None]
        out = [figure for figure in judged if figure.stands_out]
        if not judged:
            return (
                "The controls passed, but no figure could be measured: this audit is no evidence."
            )
        scope = f"{plural(len(judged), 'figure')} of {plural(len(self.hospitals), 'hospital')}"
        if not out:
            return (
                f"The controls passed, and none of {scope} stands out from the same figure for held-out real images."
                f"{_blind_words(judged)}{self._few_words()} {LIMIT}"
            )
        listed = "; ".join(figure.words for figure in out[:3]) + (
            f"; and {len(out) - 3} more" if len(out) > 3 else ""
        )
        verb = "stands" if len(out) == 1 else "stand"
        return (
            f"Evidence of a leak: {len(out)} of {scope} {verb} out from the same figure for held-out real images. {listed}. "
            f"By chance alone about {max(len(judged) * 0.025, 0.1):.1g} would."
        )

    def _few_words(self) -> str:
        """Which hospitals have too few patients for more than a gross leak to show; empty where none has."""
        counts = {
            name_of(hospital): number(hospital.get("held_out_patients"))
            for hospital in self.hospitals
        }
        few = [
            f"{name} ({count:,.0f})"
            for name, count in counts.items()
            if count is not None and count < FEW_PATIENTS
        ]
        return (
            f" Held-out patients are few at {', '.join(few)}: only a gross leak would show there."
            if few
            else ""
        )


def _blind_words(judged: list[Figure]) -> str:
    blind = sum(figure.blind for figure in judged)
    verb = "comes" if blind == 1 else "come"
    return (
        f" {blind} of these figures {verb} from a search or an attack that did not see the planted leak either."
        if blind
        else ""
    )


def _notes(hospital: Tree) -> list[str]:
    """A hospital's notes; of attacks that say the same, one with all their names."""
    told = [
        (str(row.get("attack", "unnamed attack")), part)
        for row in trees(hospital.get("membership"))
        for text in sentences(row.get("note"))
        for part in text.split("; ")
    ]
    return [
        *sentences(hospital.get("notes")),
        *(f"{names}: {text}" for names, text in _gathered(told)),
    ]


def _gathered(told: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(names, text) for each text, from (name, text)."""
    names: dict[str, list[str]] = {}
    for name, text in told:
        names.setdefault(text, []).append(name)
    return [(", ".join(dict.fromkeys(said)), text) for text, said in names.items()]


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
    """Whether a control is green: the two that every audit needs have to say so, others must not say the opposite."""
    return control.get("passed") is True if name in CONTROLS else control.get("passed") is not False


def is_linking(attack: Any) -> bool:
    """Whether an attack needs only a real image and the synthetic ones, by distance: it stands under linkability."""
    words = str(attack).lower()
    return "distance" in words and "calibrated" not in words and "shadow" not in words


def copies(hospital: Tree) -> list[tuple[str, Tree]]:
    """(space in words, findings) for each space in which copies were looked for."""
    found = tree(hospital.get("copies")).items()
    return [
        (SPACES.get(str(space), str(space)), part)
        for space, part in found
        if isinstance(part, dict) and part
    ]


def attacks(hospital: Tree, linking: bool) -> list[Tree]:
    """The membership attacks of a hospital that stand under linkability, or those that stand under inference."""
    return [
        row for row in trees(hospital.get("membership")) if is_linking(row.get("attack")) is linking
    ]


def blind_spaces(hospital: Tree) -> list[str]:
    """The spaces, in words, in which the planted copies were not found: what was found there proves little."""
    parts = tree(dig(hospital, "controls", "positive", "copies"))
    return [
        SPACES.get(str(space), str(space))
        for space, part in parts.items()
        if tree(part).get("passed") is False
    ]


def _figures(hospital: Tree) -> Iterator[Figure]:
    """Each figure, judged by the rules of the audit itself (fedgan/audit/rules.py)."""
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
            space in blind_spaces(hospital),
        )
    projection = tree(hospital.get("projection"))
    if number(projection.get("auc")) is not None:
        gap, area = bounds(projection.get("gap_ci")), bounds(projection.get("auc_ci"))
        out = None if gap is None or area is None else projection_stands_out(gap, area)
        yield _area("singling-out", name, "AUC of the projection gap", projection, out)
    for linking, head in ((True, "linkability"), (False, "inference")):
        for row in attacks(hospital, linking):
            auc = _measured(row, "auc", "auc_ci")
            out = (
                None
                if auc is None
                else attack_stands_out(auc, _measured(row, "null_auc", "null_auc_ci"))
            )
            yield _area(head, name, f"AUC of {row.get('attack', 'an unnamed attack')}", row, out)


def _area(head: str, name: str, measure: str, found: Tree, out: bool | None) -> Figure:
    """An area under the curve beside that of held-out images."""
    value, ci = number(found.get("auc")), bounds(found.get("auc_ci"))
    blind = found.get("detects_leak") is False
    return Figure(
        head,
        name,
        measure,
        value,
        ci,
        number(found.get("null_auc")),
        bounds(found.get("null_auc_ci")),
        out,
        blind,
    )


def _measured(found: Tree, key: str, ci: str) -> Measured | None:
    """A figure with its interval, None where either is missing."""
    value, ends = number(found.get(key)), bounds(found.get(ci))
    return None if value is None or ends is None else (value, ends)


def _control_words(names: list[str]) -> str:
    return " and the ".join(f"{name} control" for name in names)


def _reasons(control: Tree) -> list[str]:
    """What a control says of its failure, itself or a part of it."""
    found = sentences(control.get("reason"))
    for part in [*control.values()]:
        parts = [part] if isinstance(part, dict) else trees(part)
        found += [
            text
            for item in parts
            if item.get("passed") is False
            for text in sentences(item.get("reason"))
        ]
    return list(dict.fromkeys(found))
