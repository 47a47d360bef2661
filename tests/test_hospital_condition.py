"""Conditioning on the hospital (`model.hospitals`), and sampling it from a label alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import federate, tiny, write_shards

from client.app import app
from fedgan.audit import audit
from fedgan.audit.subject import AuditedModel, AuditSettings
from fedgan.cli.audit_subject import load_audited_model
from fedgan.config import ModelSettings, Settings, from_dict, to_dict
from fedgan.data.federation import open_hospitals
from fedgan.errors import CheckpointError, ConfigError, FedganError
from fedgan.evaluation.reference import pool_hospitals
from fedgan.evaluation.sampling import generate_images
from fedgan.models.hospital_condition import HospitalCondition
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import load_generator, load_tensors, save_tensors
from fedgan.training.trainer import Trainer

APART = ("model.hospitals=3", "federation.share_label_counts=true")
MODEL = ModelSettings(
    z_dim=4, w_dim=8, channel_base=64, channel_max=8, mapping_layers=1, hospitals=3
)
SHARES = {0: (60, [60, 0]), 1: (30, [20, 10]), 2: (10, [0, 10])}


def hospitals_of(z: torch.Tensor, c: torch.Tensor, condition: HospitalCondition) -> np.ndarray:
    return condition(c, z)[:, c.shape[1] :].argmax(1).numpy()


# --- sampling the hospital of a label -------------------------------------------------------------


def test_hospitals_are_sampled_by_their_share_of_the_label() -> None:
    condition = HospitalCondition(2, 3)
    condition.set_label_counts(SHARES, exclusive=True)
    z = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    for label, expected in ((0, [0.75, 0.25, 0.0]), (1, [0.0, 0.5, 0.5])):
        c = torch.eye(2)[torch.full((len(z),), label)]
        found = np.bincount(hospitals_of(z, c, condition), minlength=3) / len(z)
        np.testing.assert_allclose(found, expected, atol=0.015)
        np.testing.assert_allclose(condition.odds(c[:1]).numpy()[0], expected, atol=1e-5)


def test_sampled_hospital_is_independent_of_the_latent() -> None:
    condition = HospitalCondition(2, 3)
    condition.set_label_counts(SHARES, exclusive=True)
    z = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1))
    chosen = hospitals_of(z, torch.eye(2)[torch.zeros(len(z), dtype=torch.long)], condition)
    for hospital in (0, 1):
        latents = z[torch.from_numpy(chosen == hospital)]
        np.testing.assert_allclose(latents.mean(0), 0, atol=0.06)
        np.testing.assert_allclose(latents.std(0), 1, atol=0.05)


def test_odds_use_present_and_absent_findings() -> None:
    """Two hospitals of equal size: each finding in 1/2 and in 1/10 of the images."""
    condition = HospitalCondition(2, 2)
    condition.set_label_counts({0: (100, [50, 50]), 1: (100, [10, 10])}, exclusive=False)
    odds = condition.odds(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])).numpy()[:, 0]
    np.testing.assert_allclose(
        odds, [0.25 / (0.25 + 0.81), 0.25 / (0.25 + 0.09), 0.25 / (0.25 + 0.01)], rtol=1e-6
    )


def test_rare_label_has_odds_for_its_holder_only() -> None:
    condition = HospitalCondition(2, 2)
    condition.set_label_counts({0: (1_000_000, [1_000_000, 0]), 1: (1, [0, 1])}, exclusive=True)
    assert condition.odds(torch.eye(2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_label_of_no_hospital_is_sampled_by_size() -> None:
    condition = HospitalCondition(2, 2)
    condition.set_label_counts({0: (30, [30, 0]), 1: (10, [10, 0])}, exclusive=True)
    assert condition.odds(torch.eye(2))[1].tolist() == [0.75, 0.25]


def test_absent_hospital_has_odds_of_zero() -> None:
    condition = HospitalCondition(1, 3)
    condition.set_label_counts({0: (5, [5]), 2: (15, [15])}, exclusive=True)
    np.testing.assert_allclose(
        condition.odds(torch.ones(1, 1)).numpy()[0], [0.25, 0.0, 0.75], atol=1e-9
    )


def test_latent_and_label_give_one_image_in_any_batch() -> None:
    generator = Generator(MODEL, 16, 1, 2).eval()
    generator.mapping.hospital_condition.set_label_counts(SHARES, exclusive=True)
    labels = np.eye(2, dtype=np.uint8)[np.arange(40) % 2]
    whole, cut = (
        generate_images(generator, labels, seed=3, batch=batch).astype(int) for batch in (64, 7)
    )
    assert np.abs(whole - cut).max() <= 1


def test_named_hospital_changes_the_image() -> None:
    generator = Generator(MODEL, 16, 1, 2).eval()
    z, label = torch.randn(1, 4), torch.tensor([[1.0, 0.0]])
    first, second = (
        generator(z, torch.cat([label, torch.eye(3)[[k]]], 1), noise="const") for k in (0, 1)
    )
    assert (first - second).abs().max() > 1e-3
    with pytest.raises(FedganError, match="no label counts of the hospitals"):
        generator(z, label)


def test_discriminator_weighs_hospitals_of_a_label() -> None:
    discriminator = Discriminator(MODEL, 16, 1, 2)
    assert discriminator.mapping is not None
    discriminator.mapping.hospital_condition.set_label_counts(SHARES, exclusive=True)
    images, label = torch.randn(4, 1, 16, 16), torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    weighed = torch.cat([label, torch.tensor([[0.75, 0.25, 0.0]]).repeat(4, 1)], 1)
    torch.testing.assert_close(
        discriminator(images, label), discriminator(images, weighed), atol=1e-5, rtol=1e-4
    )


def test_audit_restricts_the_networks_to_one_hospital() -> None:
    generator, discriminator = Generator(MODEL, 16, 1, 2), Discriminator(MODEL, 16, 1, 2)
    assert discriminator.mapping is not None
    for network in (generator, discriminator):
        network.mapping.hospital_condition.set_label_counts(SHARES, exclusive=True)
    audited = AuditedModel(
        from_dict({}), generator, discriminator, numbers={"alpha": 0, "gamma": 2}
    )
    label, images, z = (
        torch.tensor([[0.0, 1.0]]).repeat(4, 1),
        torch.randn(4, 1, 16, 16),
        torch.randn(4, 4),
    )
    named = torch.cat([label, torch.tensor([[0.0, 0.0, 1.0]]).repeat(4, 1)], 1)
    mixed = discriminator(images, label)
    with audited.conditioned_on("gamma") as alone:
        assert alone
        torch.testing.assert_close(discriminator(images, label), discriminator(images, named))
        torch.testing.assert_close(generator(z, label), generator(z, named))
    with pytest.raises(ZeroDivisionError), audited.conditioned_on("gamma"):
        raise ZeroDivisionError
    torch.testing.assert_close(discriminator(images, label), mixed)
    with audited.conditioned_on("a stranger") as alone:
        assert not alone
        torch.testing.assert_close(discriminator(images, label), mixed)


def test_networks_without_hospitals_have_no_condition_weights() -> None:
    plain = dataclasses.replace(MODEL, hospitals=0)
    for label_dim in (0, 2):
        for kind in (Generator, Discriminator):
            names = kind(plain, 16, 1, label_dim).state_dict()
            assert ("mapping.embed.weight" in names) == bool(label_dim)
            assert not any("condition" in name for name in names)


# --- training -------------------------------------------------------------------------------------


def apart(root: Path, *overrides: str) -> Settings:
    return tiny(write_shards(root / "data", (48, 24, 16)), *APART, *overrides, rounds=2, kimg=0.048)


def test_each_hospital_trains_its_own_column(tmp_path: Path) -> None:
    settings, run = apart(tmp_path, "federation.weights=sum"), RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    start = load_tensors(run.checkpoint(0))[0]
    for number, name in enumerate(("alpha", "beta", "gamma")):
        local = load_tensors(run.hospital_state(name) / "state-00001.safetensors")[0]
        for part in ("generator", "discriminator"):
            key = f"{part}/mapping.embed.weight"
            moved = (local[key] - start[key]).abs().amax(0)[2:] > 0
            assert moved.tolist() == [k == number for k in range(3)]
    merged = load_tensors(run.checkpoint(2))[0]["generator/mapping.embed.weight"]
    assert ((merged - start["generator/mapping.embed.weight"]).abs().amax(0)[2:] > 0).all()


def test_checkpoint_restores_the_label_counts(tmp_path: Path) -> None:
    settings, run = apart(tmp_path), RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    generator, _ = load_generator(run.checkpoint(2))
    sizes = [len(hospital.train) for hospital in open_hospitals(settings)]
    odds = generator.mapping.hospital_condition.odds(torch.eye(2)).numpy()
    np.testing.assert_allclose(odds, np.tile(np.array(sizes) / sum(sizes), (2, 1)), atol=1e-6)
    tensors, meta = load_tensors(run.checkpoint(2))
    meta["since"].pop("2")  # as of a hospital that joined and never sent an update
    save_tensors(tmp_path / "without.safetensors", tensors, meta)
    odds = (
        load_generator(tmp_path / "without.safetensors")[0]
        .mapping.hospital_condition.odds(torch.eye(2))
        .numpy()
    )
    np.testing.assert_allclose(
        odds, np.tile([sizes[0] / sum(sizes[:2]), sizes[1] / sum(sizes[:2]), 0], (2, 1)), atol=1e-6
    )
    for share in meta["participants"]:
        share["label_counts"] = []
    save_tensors(
        run.checkpoint(2),
        tensors,
        {key: value for key, value in meta.items() if key not in ("format", "sha256")},
    )
    with pytest.raises(CheckpointError, match="lacks the hospitals' label counts"):
        load_generator(run.checkpoint(2))


def test_pooled_images_train_the_columns_of_their_hospitals(tmp_path: Path) -> None:
    """Two columns change where the images of two hospitals are pooled."""
    settings = apart(tmp_path)
    hospitals = open_hospitals(settings)[:2]
    data = pool_hospitals([(hospital.name, hospital.train) for hospital in hospitals], "both")
    places = np.repeat([0, 1], [len(hospital.train) for hospital in hospitals])
    trainer = Trainer(settings, data, hospital_of_row=places)
    before = trainer.step.generator.mapping.embed.weight.detach().clone()
    trainer.train(96)
    after = trainer.step.generator.mapping.embed.weight.detach()  # type: ignore[union-attr]
    assert ((after - before).abs().amax(0)[2:] > 0).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["model.hospitals=2", "federation.share_label_counts=true"], "federation.hospitals = 3"),
        (["model.hospitals=3"], "share_label_counts = true"),
        (
            ["federation.share_label_counts=true", "privacy.client_level=server"],
            "and model.hospitals",
        ),
        ([*APART, "training.labels=uniform"], "may not hold"),
    ],
)
def test_settings_without_label_counts_are_refused(
    overrides: list[str], word: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=word):
        from_dict(to_dict(tiny(tmp_path)), overrides)


def test_audit_of_a_run_restricts_to_each_hospital(tmp_path: Path) -> None:
    settings, run = apart(tmp_path), RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    audited, meta = load_audited_model(run.checkpoint(2), settings)
    assert audited.numbers == {"alpha": 0, "beta": 1, "gamma": 2}
    hospital = next(hospital for hospital in open_hospitals(settings) if hospital.name == "beta")
    audits: list[tuple[torch.Tensor, list[str]]] = []

    def record(of: AuditedModel, *rest: Any) -> None:
        audits.append((of.generator.mapping.hospital_condition.odds(torch.eye(2)), rest[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "reason_unauditable", lambda hospital: "")
        patch.setattr(audit, "_audit", record)
        audit.audit_hospital(audited, hospital, AuditSettings())
    odds, notes = audits[0]
    assert (odds == torch.tensor([0, 1, 0])).all()
    assert notes == [audit.CONDITIONED]
    tensors, _ = load_tensors(run.checkpoint(2))
    meta["since"].pop("1")  # as of a hospital that joined and never sent an update
    save_tensors(tmp_path / "without.safetensors", tensors, meta)
    stranger, _ = load_audited_model(tmp_path / "without.safetensors", settings)
    with stranger.conditioned_on("beta") as alone:
        assert not alone
