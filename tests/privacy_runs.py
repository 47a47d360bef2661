"""Artificial runs with differential privacy and audits, for tests of reports and cards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from test_report import HOSPITALS, SIZES, make_run

from fedgan import files
from fedgan.audit.attacks.copies import CopyFindings
from fedgan.config import from_dict, to_dict
from fedgan.run_folder import RunFolder

EPSILONS = (9.87, 6.54, 3.21)  # of the hospitals after the last round
ATTACKS = (
    "discriminator",
    "distance",
    "density",
    "density ratio",
    "distance, calibrated by shadows",
)
PRIVATE = ("pairs", "distances", "rows", "real_distances", "real_rows")


def copy_figures(share: float, fitted: bool, near_held_out: float = 0.05) -> dict[str, Any]:
    """An entry of `copies`, with the fields of the attack itself.

    A large `near_held_out` is that of a blurred generator.
    """
    held, closer = 0.05, 0.5 + share - 0.05
    figures: dict[str, Any] = {
        field.name: 0 for field in dataclasses.fields(CopyFindings) if field.name not in PRIVATE
    }
    known: dict[str, Any] = {
        "threshold": 3.1,
        "copying_share": share,
        "copying_ci": [share - 0.0137, share + 0.0161],
        "held_out_share": held,
        "held_out_ci": [0.0279, 0.0871],
        "excess": share - held,
        "excess_ci": [share - held - 0.0391, share - held + 0.0273],
        "memorised_share": share * 0.9,
        "memorised_ci": [share * 0.9 - 0.011, share * 0.9 + 0.012],
        "reference_images": 500,
        "held_out_images": 180,
        "synthetic_images": 1000,
        "memorised_matched": share * 0.31,
        "memorised_matched_ci": [share * 0.31 - 0.003, share * 0.31 + 0.004],
        "memorised_held_out": 0.0151,
        "memorised_held_out_ci": [0.0083, 0.0274],
        "matched_images": 180,
        "closer_share": None if fitted else closer,
        "closer_ci": None if fitted else [closer - 0.0291, closer + 0.0288],
    }
    assert known.keys() == figures.keys(), "this file and the attack differ"
    known |= {
        "outliers": 0,
        "held_out_outliers": 0,
        "dimension": 18.0,
        "power": {"one": 0.883, "1 %": 0.9995, "5 %": 1.0},
    }
    if not fitted:
        known |= {
            "near_training_share": share * 0.97,
            "near_training_ci": [share * 0.97 - 0.0131, share * 0.97 + 0.0153],
            "near_held_out_share": near_held_out,
            "near_held_out_ci": [near_held_out - 0.0127, near_held_out + 0.0149],
            "near_images": 180,
        }
    return figures | known


def membership(attack: str, auc: float) -> dict[str, Any]:
    return {
        "attack": attack,
        "auc": auc,
        "auc_ci": [auc - 0.0467, auc + 0.0452],
        "tpr_at_1": 0.0213,
        "tpr_at_1_ci": [0.0031, 0.0577],
        "tpr_at_01": None,
        "tpr_at_01_ci": None,
        "members": 180,
        "non_members": 170,
        "note": "a false-positive rate of 0.1% needs 1,000 non-members, here are 170",
        "null_auc": 0.4934,
        "null_auc_ci": [0.4312, 0.5561],
        "null_tpr_at_1": 0.0129,
        "null_tpr_at_1_ci": [0.0012, 0.0431],
        "null_tpr_at_01": None,
        "null_tpr_at_01_ci": None,
        "null_images": 170,
        "leak_auc": 0.9932 if "density" not in attack else 0.8123,
        "detects_leak": "density" not in attack,
    }


def control(passed: bool, positive: bool) -> dict[str, Any]:
    """A control as in audit.json; a failed one has a reason."""
    if positive:
        part = {
            "auc": 0.9987 if passed else 0.7123,
            "planted_share": 0.3,
            "found_share": 0.2971,
            "found_ci": [0.2611, 0.3342],
        }
        part["auc_ci"] = [part["auc"] - 0.0031, part["auc"] + 0.0011]
        spaces = {
            "pixels": part | {"passed": passed},
            "features": part | {"auc": 0.6789, "passed": False},
        }
    else:
        part = {
            "excess": 0.01,
            "excess_ci": [-0.04, 0.06],
            "mean_excess": 0.0023,
            "covered": 0.97,
            "splits": 100,
        }
        spaces = {name: part | {"passed": passed} for name in ("pixels", "features")}
    areas = {
        name: {"auc": 0.9932 if positive else 0.5071, "auc_ci": [0.48, 0.997]}
        for name in ("distance", "density")
    }
    attacked = {"attacks": areas, "passed": passed} | ({} if positive else {"level": 0.9944})
    found = {"copies": spaces, "membership": attacked, "sensitive": ["pixels"], "passed": passed}
    return (
        found
        if passed
        else found
        | {"reason": "no space finds the planted copies" if positive else "halves differ"}
    )


def hospital_audit(
    name: str,
    share: float = 0.047,
    auc: float = 0.5123,
    positive: bool = True,
    negative: bool = True,
) -> dict[str, Any]:
    """The entry of one hospital in audit.json."""
    spaces = (("pixels", False), ("features", True), ("embedding", True))
    return {
        "name": name,
        "members": 500,
        "held_out": 180,
        "held_out_patients": 97,
        "synthetic": 1000,
        "copies": {
            space: copy_figures(share + 0.0013 * i, fitted)
            for i, (space, fitted) in enumerate(spaces)
        },
        "membership": [membership(attack, auc - 0.0021 * i) for i, attack in enumerate(ATTACKS)],
        "projection": {
            "gap": 0.0412,
            "gap_ci": [-0.1131, 0.2017],
            "median_gap": 0.03,
            "median_gap_ci": [-0.1, 0.2],
            "auc": 0.5217,
            "auc_ci": [0.4213, 0.6189],
            "train_mean": 12.171,
            "held_out_mean": 12.212,
            "images": [64, 63],
            "null_gap": 0.01,
            "null_gap_ci": [-0.2, 0.2],
            "null_auc": 0.5081,
            "null_auc_ci": [0.3917, 0.6212],
            "steps": 100,
        },
        "controls": {"positive": control(positive, True), "negative": control(negative, False)},
        "valid": positive and negative,
        "notes": ["A sample of 500 of 900 training images was looked up."],
        "signs": [],
    }


def audit(*hospitals: dict[str, Any], round_number: int = 10) -> dict[str, Any]:
    """audit.json, by default of three hospitals without a leak."""
    found = list(hospitals) or [hospital_audit(name) for name in HOSPITALS]
    return {
        "format": "fedgan-audit-3",
        "round": round_number,
        "checkpoint_sha256": "ab" * 32,
        "valid": all(row["valid"] for row in found),
        "settings": {"seed": 0, "images": 1000},
        "hospitals": found,
        "notes": ["These figures are evidence about the attacks that were tried."],
    }


def write_run(
    path: Path,
    privacy: dict[str, Any] | None = None,
    content: dict[str, Any] | None = None,
    **sections: Any,
) -> RunFolder:
    """A finished run of three hospitals, with `privacy` settings and audit.json `content`."""
    run = make_run(path, labels=["nevus", "melanoma"], pictures=False)
    if privacy:
        settings = to_dict(run.settings()) | sections
        settings["privacy"] |= privacy
        run.write_settings(from_dict(settings))
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        for line in lines:
            for i, row in enumerate(line["hospitals"]):
                row |= privacy_cost(i, line["round"], privacy.get("noise_multiplier", -1.0) == 0)
        write_lines(run, lines)
    if content is not None:
        files.write_json(run.audit, content)
    return run


def privacy_cost(hospital: int, turn: int, noiseless: bool = False) -> dict[str, Any]:
    """The privacy metrics that a hospital reports in one of ten rounds."""
    cost = {
        "delta": 1 / SIZES[hospital],
        "noise_multiplier": 0.0 if noiseless else 0.913,
        "sample_rate": 16 / SIZES[hospital],
    }
    return cost | {"epsilon": None if noiseless else EPSILONS[hospital] * (0.4 + 0.06 * turn)}


def read_lines(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def write_lines(run: RunFolder, lines: list[dict[str, Any]]) -> None:
    files.write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
