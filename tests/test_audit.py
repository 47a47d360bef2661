"""Audit: planted leaks, clean generators, controls, errors, and the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgan import files
from fedgan.audit.audit import HospitalAudit, audit_hospital, audit_report, headline, signs
from fedgan.audit.copy_search import PRIVATE, plant
from fedgan.audit.membership_inference import _negative, attack_functions, role_rows
from fedgan.audit.shadow_training import shadow_settings, shortened
from fedgan.audit.subject import (
    AuditedModel,
    AuditSettings,
    LocalTraining,
    assign_roles,
    pixel_space,
)
from fedgan.config import Settings, from_dict, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.data.federation import Hospital, open_hospitals
from fedgan.data.phantoms import write_phantoms
from fedgan.errors import FedganError, SplitError
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator
from fedgan.report.run.privacy.findings import Audit
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import save_tensors

QUICK = AuditSettings(images=150, projected=0, embedding_steps=4, bootstrap=200)
Run = Callable[..., tuple[int, str, str]]


class Recall(nn.Module):
    """A stand-in for a generator: each latent returns one of the given images."""

    z_dim = 4

    def __init__(self, images: np.ndarray, labels: int) -> None:
        super().__init__()
        self.images, self.label_dim = images, labels

    def forward(self, z: Tensor, c: Tensor, psi: float = 1.0, noise: str = "const") -> Tensor:
        rows = (z[:, 0] * 1e5).long().abs() % len(self.images)
        return torch.from_numpy(self.images[rows.numpy()]).float() / 127.5 - 1


def pixels_of(dataset: ImageDataset) -> np.ndarray:
    return np.asarray(dataset.images[np.arange(len(dataset))])


@pytest.fixture(scope="module")
def settings() -> Settings:
    evaluation = {"seeds": 1, "epochs": 1, "bootstrap": 10}
    return from_dict({"federation": {"hospitals": 1}, "evaluation": evaluation})


@pytest.fixture(scope="module")
def hospital(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """About 210 training and 90 held-out phantoms."""
    root = tmp_path_factory.mktemp("shards")
    write_phantoms(root, "lesions", 300, 32, hospitals=1, seed=0)
    return open_hospitals(settings, root)[0]


@pytest.fixture(scope="module")
def fresh(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Phantoms of the same scanner and mix that no hospital has."""
    root = tmp_path_factory.mktemp("fresh")
    write_phantoms(root, "lesions", 150, 32, hospitals=1, seed=1)
    return pixels_of(open_hospitals(settings, root)[0].train)


@pytest.fixture(scope="module")
def clean(settings: Settings, hospital: Hospital, fresh: np.ndarray) -> HospitalAudit:
    return audit_hospital(AuditedModel(settings, Recall(fresh, 7)), hospital, QUICK)


@pytest.fixture(scope="module")
def leaky(settings: Settings, hospital: Hospital, fresh: np.ndarray) -> HospitalAudit:
    """Audit of a generator half of whose images are slightly changed training images."""
    leaked = plant(np.concatenate([fresh, fresh]), hospital.train, 5)
    images = np.concatenate([leaked.images[leaked.flags], fresh[: int(leaked.flags.sum())]])
    return audit_hospital(AuditedModel(settings, Recall(images, 7)), hospital, QUICK)


# --- what an audit says -------------------------------------------------------------------------


def test_audit_finds_a_planted_leak(leaky: HospitalAudit) -> None:
    found = leaky.numbers
    assert found["valid"], found["controls"]
    pixels = found["copies"]["pixels"]
    assert 0.4 < pixels["copying_share"] < 0.65
    assert pixels["excess_ci"][0] > 0.2
    assert pixels["memorised_share"] > 0.15
    assert pixels["near_training_share"] > 2 * pixels["near_held_out_share"]
    distance = next(row for row in found["membership"] if row["attack"] == "distance")
    assert distance["auc"] > distance["null_auc"]
    assert any("copy training images by pixels" in text for text in found["signs"])
    assert "evidence of a leak" in headline({"hospitals": [found]})


def test_audit_of_a_clean_generator_finds_nothing(clean: HospitalAudit) -> None:
    found = clean.numbers
    assert found["valid"], found["controls"]
    assert found["copies"]["pixels"]["excess_ci"][0] <= 0
    assert found["signs"] == []
    assert headline({"hospitals": [found]}).startswith("valid, and no figure stands out")


def test_audit_figures_have_held_out_counterparts(clean: HospitalAudit) -> None:
    found = clean.numbers
    for copies in found["copies"].values():
        assert copies["held_out_ci"][0] <= copies["held_out_share"] <= copies["held_out_ci"][1]
    assert [row["attack"] for row in found["membership"]] == [
        "distance",
        "density",
        "density ratio",
    ]
    for row in found["membership"]:
        assert row["null_auc_ci"][0] <= row["null_auc"] <= row["null_auc_ci"][1]
        assert abs(row["null_images"] - row["members"]) <= 3
        assert row["members"] == row["non_members"]
        assert (row["tpr_at_1"], row["null_tpr_at_1"]) == (None, None)
        assert "needs 100 non-members" in row["note"]


def test_audit_report_holds_numbers_only(
    leaky: HospitalAudit, hospital: Hospital, settings: Settings
) -> None:
    report = audit_report([leaky], AuditedModel(settings, None), QUICK, 3, "ab12")
    text = json.dumps(report)
    assert not any(str(patient) in text for patient in hospital.train.patients)
    assert not set(PRIVATE) & report["hospitals"][0]["copies"]["pixels"].keys()
    assert not {"pairs", "path"} & report["hospitals"][0].keys()
    assert (report["round"], report["checkpoint_sha256"], report["valid"]) == (3, "ab12", True)
    assert report["settings"]["images"] == 150


def test_run_report_reads_the_audit(
    clean: HospitalAudit, leaky: HospitalAudit, settings: Settings
) -> None:
    for found in (clean, leaky):
        content = json.loads(
            json.dumps(audit_report([found], AuditedModel(settings, None), QUICK, 3, "ab12"))
        )
        audited = Audit(content)
        assert audited.is_valid, audited.failure_reasons
        assert len([figure for figure in audited.figures if figure.stands_out]) == len(
            found.numbers["signs"]
        )
        assert not [
            figure
            for figure in audited.figures
            if None in (figure.value, figure.ci, figure.real, figure.real_ci)
        ]


def test_run_report_refuses_an_audit_of_another_format() -> None:
    audited = Audit({"format": "fedgan-audit-1", "valid": True, "hospitals": [{"valid": True}]})
    (reason,) = audited.failure_reasons
    assert "has the format fedgan-audit-1, not fedgan-audit-3: run fedgan audit again" in reason
    assert not audited.is_valid


def test_audit_pictures_show_each_space(leaky: HospitalAudit) -> None:
    assert set(leaky.pictures) == {"pixels", "features", "embedding"}
    # 24 pairs of 32 pixels, enlarged four times: 6 rows of 8
    assert leaky.pictures["pixels"].height == 6 * (128 + 2) - 2


def test_audit_of_a_private_run_notes_that_epsilon_excludes_it(clean: HospitalAudit) -> None:
    private = from_dict({"privacy": {"epsilon": 8.0}})
    assert any(
        "the epsilon of the training does not cover" in note
        for note in audit_report([clean], AuditedModel(private, None), QUICK, 1, "x")["notes"]
    )


# --- controls -----------------------------------------------------------------------------------


def test_positive_control_measures_the_planted_leak(clean: HospitalAudit) -> None:
    positive = clean.numbers["controls"]["positive"]
    assert "pixels" in positive["sensitive"]
    pixels = positive["copies"]["pixels"]
    assert pixels["auc"] >= 0.9
    assert pixels["found_ci"][0] <= pixels["planted_share"] <= pixels["found_ci"][1]
    assert positive["membership"]["attacks"]["distance"]["auc"] >= 0.9


def test_positive_control_does_not_depend_on_the_generator(
    clean: HospitalAudit, leaky: HospitalAudit
) -> None:
    one, other = (
        found.numbers["controls"]["positive"]["copies"]["pixels"] for found in (clean, leaky)
    )
    assert one == other


def test_negative_control_fails_for_different_distributions(hospital: Hospital) -> None:
    """Held-out images of a darker scanner: any attack finds non-members without a generator."""
    dark = dataclasses.replace(hospital.test, images=pixels_of(hospital.test) // 3)
    roles = assign_roles(dataclasses.replace(hospital, test=dark, val=dark.take(np.arange(0))), 0)
    space = pixel_space(hospital.train.images.shape[1:])
    alike = assign_roles(hospital, 0)
    assert _negative(attack_functions(space), role_rows(space, alike), alike, QUICK, 3)["passed"]
    found = _negative(attack_functions(space), role_rows(space, roles), roles, QUICK, 3)
    assert not found["passed"]
    assert "differ without any generator" in found["reason"]


def test_audit_with_insensitive_spaces_is_not_valid(
    settings: Settings, hospital: Hospital, fresh: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgan.audit import audit

    class Insensitive:
        """Rows that do not depend on the images."""

        def __init__(self, *_: Any) -> None:
            rng = np.random.default_rng(0)
            space = pixel_space(hospital.train.images.shape[1:])
            size = 3 * 32 * 32
            insensitive = dataclasses.replace(
                space,
                rows=lambda images: rng.normal(size=(images.shape[0], size)).astype(np.float32),
            )
            self.pixels, self.features, self.embedding = (
                insensitive,
                None,
                dataclasses.replace(insensitive, name="embedding"),
            )

    monkeypatch.setattr(audit, "Spaces", Insensitive)
    found = audit_hospital(AuditedModel(settings, Recall(fresh, 7)), hospital, QUICK).numbers
    assert not found["valid"]
    assert "no space finds the planted copies" in found["controls"]["positive"]["reason"]
    assert "finds planted members with an AUC" in found["controls"]["positive"]["reason"]
    assert headline({"hospitals": [found]}).startswith("not valid at")
    assert sum("Insensitive:" in note for note in found["notes"]) == 2


# --- what cannot be measured --------------------------------------------------------------------


def test_audit_with_few_held_out_images_is_null_with_the_reason(
    settings: Settings, hospital: Hospital, fresh: np.ndarray
) -> None:
    few = dataclasses.replace(
        hospital, test=hospital.test.take(np.arange(9)), val=hospital.val.take(np.arange(3))
    )
    audited = AuditedModel(settings, Recall(fresh, 7))
    found = audit_hospital(audited, few, QUICK)
    assert found.pictures == {}
    assert found.numbers["copies"] == {"pixels": None, "features": None, "embedding": None}
    assert (found.numbers["membership"], found.numbers["projection"], found.numbers["valid"]) == (
        [],
        None,
        False,
    )
    assert "12 held-out images are too few" in headline(
        audit_report([found], audited, QUICK, 1, "x")
    )


def test_audit_with_few_held_out_patients_gives_the_reason(
    settings: Settings, hospital: Hospital, fresh: np.ndarray
) -> None:
    same = dataclasses.replace(
        hospital.test, patients=np.array([f"p{row % 5}" for row in range(len(hospital.test))])
    )
    one = dataclasses.replace(hospital, test=same, val=hospital.val.take(np.arange(0)))
    found = audit_hospital(AuditedModel(settings, Recall(fresh, 7)), one, QUICK)
    assert "5 patients are too few" in found.numbers["notes"][0]


def test_assign_roles_refuses_a_patient_in_two_splits(hospital: Hospital) -> None:
    patients = np.array(hospital.test.patients)
    patients[0] = hospital.train.patients[0]
    with pytest.raises(SplitError, match="also in"):
        assign_roles(
            dataclasses.replace(
                hospital, test=dataclasses.replace(hospital.test, patients=patients)
            ),
            0,
        )


def test_audit_refuses_a_generator_of_another_size(settings: Settings, hospital: Hospital) -> None:
    with pytest.raises(FedganError, match="audit with the shards"):
        audit_hospital(
            AuditedModel(settings, Recall(np.zeros((4, 3, 16, 16), np.uint8), 7)), hospital, QUICK
        )


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_assign_roles_gives_each_patient_one_role(hospital: Hospital, seed: int) -> None:
    roles = assign_roles(hospital, seed)
    for parts in (
        (roles.non_members, roles.pseudo_members, roles.reference),
        (roles.query_half, roles.reference_half),
    ):
        patients = [set(roles.held_out_patients[part].tolist()) for part in parts]
        assert sum(len(some) for some in patients) == len(set().union(*patients))
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(roles.held_out)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 3
    assert len(roles.members) == len(roles.non_members)


def entry(**copies: Any) -> dict[str, Any]:
    counts = {"outliers": 0, "held_out_outliers": 0, "synthetic_images": 200, "held_out_images": 90}
    shares = {"excess_ci": (0.1, 0.3), "copying_share": 0.25, "held_out_share": 0.05}
    found = {**counts, **shares, **copies}
    return {"copies": {"pixels": found}, "membership": [], "projection": None}


def test_blurred_generator_is_no_sign_of_copying() -> None:
    near = {
        "near_training_share": 0.3,
        "near_training_ci": (0.25, 0.35),
        "near_held_out_ci": (0.23, 0.33),
    }
    assert signs(entry(**near, near_held_out_share=0.28)) == []
    near["near_held_out_ci"] = (0.03, 0.08)
    assert len(signs(entry(**near, near_held_out_share=0.05))) == 1
    assert len(signs(entry())) == 1


def test_one_copy_is_a_sign_and_is_named_as_one() -> None:
    (sign,) = signs(entry(excess_ci=(-0.1, 0.1), outliers=1))
    assert sign.startswith("1 synthetic image is far nearer to one training patient")
    assert signs(entry(excess_ci=(-0.1, 0.1), outliers=1, held_out_outliers=1)) == []


def test_membership_sign_needs_to_exceed_the_held_out_figure() -> None:
    row = {
        "attack": "distance",
        "auc": 0.6,
        "auc_ci": (0.55, 0.65),
        "null_auc": 0.5,
        "null_auc_ci": (0.46, 0.54),
    }
    assert len(signs({"copies": {}, "membership": [row], "projection": None})) == 1
    row |= {"null_auc": 0.58, "null_auc_ci": (0.53, 0.63)}
    assert signs({"copies": {}, "membership": [row], "projection": None}) == []


# --- the command --------------------------------------------------------------------------------


def small_run(path: Path, **sections: Any) -> RunFolder:
    """A run after one round: untrained networks of 16 pixels, and its phantoms."""
    tree: dict[str, Any] = {
        "name": "small",
        "data": {"resolution": 16, "phantoms": "lesions"},
        "model": {
            "z_dim": 4,
            "w_dim": 8,
            "channel_base": 64,
            "channel_max": 8,
            "mapping_layers": 1,
        },
        "training": {"batch_size": 4, "kimg": 1.0, "device": "cpu"},
        "federation": {"hospitals": 1, "rounds": 1},
        "evaluation": {"seeds": 1, "epochs": 1, "bootstrap": 10, "images": 40},
    }
    settings = from_dict(tree | sections)
    run = RunFolder.at(path)
    run.write_settings(settings)
    write_phantoms(run.path / "shards", "lesions", 130, 16, hospitals=1, seed=0)
    (hospital,) = open_hospitals(settings, run.path / "shards")
    counts = {
        name: int(count)
        for name, count in zip(
            hospital.train.label_names, hospital.train.labels.sum(0), strict=True
        )
    }
    files.write_json(run.hospitals, [{"name": hospital.name, "counts": {"train": counts}}])
    networks = {
        "ema": Generator(settings.model, 16, 3, 7),
        "discriminator": Discriminator(settings.model, 16, 3, 7),
    }
    tensors = {
        f"{part}/{name}": value
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    }
    meta = {
        "round": 1,
        "images_seen": 1000,
        "wall_seconds": 2.0,
        "bytes_exchanged": 10,
        "settings": to_dict(settings),
    }
    meta |= {
        "label_names": list(hospital.train.label_names),
        "exclusive": True,
        "channels": 3,
        "resolution": 16,
    }
    save_tensors(run.checkpoint(1), tensors, meta)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return small_run(tmp_path_factory.mktemp("finished") / "run")


WORDS = ("--images", "60", "--projected", "4", "--embedding-steps", "2")


def test_audit_command_writes_numbers_and_pictures(fedgan: Run, finished: RunFolder) -> None:
    code, out, err = fedgan("audit", finished.path, *WORDS, "--json")
    assert code == 0, err
    printed, written = json.loads(out), json.loads(finished.audit.read_text())
    assert printed["audit"] == str(finished.audit)
    assert printed["valid"] == written["valid"]
    (found,) = written["hospitals"]
    assert found["membership"][0]["attack"] == "discriminator"
    assert found["projection"]["images"][0] == 4
    assert (
        written["checkpoint_sha256"]
        == json.loads(finished.checkpoint(1).with_suffix(".json").read_text())["sha256"]
    )
    pictures = {path.relative_to(finished.path).as_posix() for path in finished.path.rglob("*.png")}
    assert pictures == {
        f"hospitals/{found['name']}/audit/pairs-{space}.png"
        for space in ("pixels", "features", "embedding")
    }
    assert str(finished.path) not in finished.audit.read_text()
    # again, into another folder: the same numbers, and the run is unchanged
    code, out, _ = fedgan("audit", finished.path, *WORDS, "--output", "again")
    assert code == 0
    assert Path("again/audit.json").read_bytes() == finished.audit.read_bytes()
    assert "keep them in the hospital" in out
    assert all(f"{word} " in out for word in ("copies", "membership", "verdict"))


def test_audit_command_trains_shadows(fedgan: Run, finished: RunFolder) -> None:
    words = [
        "--images",
        "50",
        "--projected",
        "0",
        "--embedding-steps",
        "1",
        "--shadows",
        "2",
        "--shadow-kimg",
        "0.008",
    ]
    code, _, err = fedgan("audit", finished.path, *words, "--output", "shadowed")
    assert code == 0, err
    assert "2 shadow trainings of 0.008 kimg: 0.016 kimg in total" in err
    hospital = json.loads(Path("shadowed/audit.json").read_text())["hospitals"][0]
    assert {
        "distance, calibrated by shadows",
        "discriminator, calibrated by shadows",
    } <= {row["attack"] for row in hospital["membership"]}
    assert any("for 0.008 kimg (the run: 1 kimg)." in note for note in hospital["notes"])


def test_shadows_take_the_batch_of_their_hospital() -> None:
    """A shared batch of 512 is larger than a small hospital; its share is not."""
    keys = ["training.batch_size=512", "training.warm_start=x", "privacy.max_epsilon=3"]
    shares = {"south": LocalTraining(2, 17, 4800)}
    audited = AuditedModel(from_dict({}, keys), None, trainings=shares)
    own = [shadow_settings(audited, "south", images, QUICK, 1) for images in (90, 9)]
    assert [found.training.batch_size for found in own] == [17, 9]
    assert (own[0].training.warm_start, own[0].privacy.max_epsilon) == ("", 0.0)
    assert shadow_settings(audited, "north", 90, QUICK, 1).training.batch_size == 90
    assert "4.8 of this hospital's images)" in shortened(audited, "south", QUICK)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--hospital", "nowhere"], 2, "has no such hospital"),
        (["--shadows", "3"], 2, "give an even number"),
        (["--canaries", "9"], 2, "no differential privacy, so there is no ε"),
        (["--images", "5"], 2, "--images"),
        (["--shards", "empty"], 3, "no data at empty"),
    ],
)
def test_audit_command_errors_are_one_line(
    words: list[str], code: int, text: str, fedgan: Run, finished: RunFolder
) -> None:
    found, out, err = fedgan("audit", finished.path, *words)
    assert (found, out) == (code, "")
    assert text in err
    assert len(err.splitlines()) == 1


def test_audit_command_names_missing_shards(
    fedgan: Run, finished: RunFolder, tmp_path: Path
) -> None:
    moved = RunFolder.at(tmp_path / "moved")
    moved.write_settings(finished.settings())
    for suffix in (".safetensors", ".json"):
        files.write_bytes(
            moved.checkpoint(1).with_suffix(suffix),
            finished.checkpoint(1).with_suffix(suffix).read_bytes(),
        )
    code, _, err = fedgan("audit", moved.path)
    assert code == 3
    assert "give --shards DIR" in err
