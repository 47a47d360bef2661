"""Validator: settings, layers and warm starts that void the guarantee are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_federation import write_shards
from torch import nn

from fedgan.config import from_dict, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.privacy.ledger import JointLedger, Ledger
from fedgan.privacy.validator import check_modules, check_private, check_start, refusals
from fedgan.run_folder import RunFolder
from fedgan.runs.participants import Member
from fedgan.runs.preparation import prepare_run
from fedgan.runs.round_state import initial_state
from fedgan.training.checkpoint import save_tensors
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer
from fedgan.training.warm_start import warm_start

TREE = {
    "data": {"resolution": 16},
    "model": {
        "z_dim": 4,
        "w_dim": 8,
        "channel_base": 64,
        "channel_max": 8,
        "mapping_layers": 1,
        "minibatch_std_group": 0,
    },
    "augment": {"mode": "none"},
    "training": {"batch_size": 4, "device": "cpu", "r1_gamma": 0.0, "labels": "uniform"},
    "privacy": {"noise_multiplier": 1.0},
}


def settings_of(*overrides: str):
    return from_dict(TREE, overrides)


def images_of(channels: int = 1) -> ImageDataset:
    return ImageDataset(
        "clinic",
        np.zeros((20, channels, 16, 16), np.uint8),
        np.eye(2, dtype=np.uint8)[[0, 1] * 10],
        ("a", "b"),
    )


REFUSED = [
    ("model.minibatch_std_group=4", "minibatch_std_group = 4", "other images", "set it to 0"),
    ("augment.mode=ada", "augment.mode = 'ada'", "signs on real images", "privacy.r_t_noise"),
    (
        "privacy.images_per_patient=0",
        "images_per_patient = 0",
        "without a bound",
        "give one",
    ),
    (
        "training.r1_gamma=0.5",
        "training.r1_gamma = 0.5",
        "outside the clipped loss",
        "privacy.r1 = true",
    ),
    (
        "training.r1_gamma=-1",
        "training.r1_gamma = -1",
        "outside the clipped loss",
        "privacy.r1 = true",
    ),
    ("training.sampling=shuffle", "training.sampling = 'shuffle'", "Poisson", "use 'auto'"),
    (
        "training.labels=data",
        "training.labels = 'data'",
        "counts of real labels",
        "privacy.label_noise",
    ),
    (
        "privacy.epsilon=3",
        "privacy.epsilon and privacy.noise_multiplier",
        "both set the noise",
        "one of them",
    ),
]


@pytest.mark.parametrize(("override", "what", "why", "instead"), REFUSED)
def test_refusal_names_key_reason_and_alternative(override, what, why, instead):
    assert list(refusals(settings_of())) == []
    with pytest.raises(ConfigError) as found:
        check_private(settings_of(override))
    assert all(part in str(found.value) for part in (what, why, instead))


def test_partition_by_quantities_is_refused_with_privacy():
    keys = ("data.partition=quantities", "federation.hospitals=2", "data.quantities=10,20")
    with pytest.raises(ConfigError, match="who else is in the pool decides"):
        check_private(settings_of(*keys))
    check_private(settings_of(*keys, "privacy.noise_multiplier=-1"))


@pytest.mark.parametrize(("override", "what", "why", "instead"), REFUSED[:-1])
def test_validator_refuses_nothing_without_privacy(override, what, why, instead):
    check_private(settings_of(override, "privacy.noise_multiplier=-1"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("augment.mode=ada", "privacy.r_t_noise=5"),
        ("augment.mode=fixed", "augment.p=0.4"),
        ("training.r1_gamma=0.5", "privacy.r1=true"),
        ("training.labels=data", "privacy.label_noise=5"),
        ("training.sampling=poisson",),
        ("privacy.unit=image", "privacy.images_per_patient=0"),
    ],
)
def test_suggested_alternatives_are_accepted(overrides):
    check_private(settings_of(*overrides))


def test_report_with_private_training_images_is_refused():
    with pytest.raises(ConfigError, match=r"show_real = 'all'.*use 'none'"):
        check_private(settings_of("evaluation.show_real=all", "data.root=/clinic"))
    check_private(settings_of("evaluation.show_real=all"))
    check_private(settings_of("evaluation.show_real=none", "data.root=/clinic"))
    for root in ("/elsewhere", "/clinic-reference"):
        keys = ("data.root=/clinic", f"evaluation.root={root}")
        check_private(settings_of("evaluation.show_real=all", *keys))


def test_report_with_the_training_folder_as_reference_is_refused(tmp_path):
    data = tmp_path / "data"
    (data / "north").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    for root in ("data", "data/north", "link", "link/north/..", "."):
        keys = (f"data.root={data}", f"evaluation.root={tmp_path / root}")
        with pytest.raises(ConfigError, match=r"show_real = 'all'"):
            check_private(settings_of("evaluation.show_real=all", *keys))
        check_private(settings_of("evaluation.show_real=none", *keys))


@pytest.mark.parametrize("partition", ["institution", "iid"])
def test_report_with_a_copy_of_training_images_is_refused(tmp_path, partition):
    data = write_shards(tmp_path / "data", (40, 24))
    write_shards(tmp_path / "copy", (40,), names=["other"])  # the images of the first shard
    write_shards(tmp_path / "apart", (8, 8, 24))
    for name in ("alpha", "beta"):
        shutil.rmtree(tmp_path / "apart" / name)

    def prepare(root: str, show: str) -> None:
        keys = (f"data.root={data}", f"data.partition={partition}", "federation.hospitals=2")
        shown = (f"evaluation.root={tmp_path / root}", f"evaluation.show_real={show}")
        prepare_run(settings_of(*keys, *shown), RunFolder.at(tmp_path / f"run-{root}-{show}"))

    with pytest.raises(ConfigError, match=r"evaluation\.root holds training images.*'none'"):
        prepare("copy", "all")
    prepare("copy", "none")
    prepare("apart", "all")


def test_all_refusals_are_reported_at_once():
    with pytest.raises(ConfigError) as found:
        check_private(settings_of(*(override for override, *_ in REFUSED[:3])))
    assert all(what in str(found.value) for _, what, *_ in REFUSED[:3])


def test_private_trainer_needs_valid_settings_and_a_ledger(tmp_path):
    begin = {"planned_images": 40, "ledger": JointLedger([Ledger(tmp_path / "l")]), "run": "run"}
    with pytest.raises(ConfigError, match="Poisson"):
        begin_training(settings_of("training.sampling=shuffle"), images_of(), **begin)
    with pytest.raises(ConfigError, match="no ledger"):
        Trainer(settings_of(), images_of())
    assert begin_training(settings_of(), images_of(), **begin).private is not None


# --- layers of D ----------------------------------------------------------------------------------


class Critic(nn.Module):
    """A discriminator with an arbitrary layer in the middle."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(1, 4, 3), between, nn.Linear(4 * 14 * 14, 1)

    def forward(self, images: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(images)).flatten(1))[:, 0]


class Mixing(nn.Module):
    """A layer of an unknown type that mixes images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * x.roll(1, dims=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4).eval(),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_layers_with_batch_statistics_are_refused(layer):
    with pytest.raises(ConfigError, match=rf"between \({type(layer).__name__}\).*GroupNorm"):
        check_modules(Critic(layer), images_of())


def test_layers_that_mix_images_are_refused():
    with pytest.raises(ConfigError, match="other images"):
        check_modules(Critic(Mixing()), images_of())
    model = settings_of("model.minibatch_std_group=4", "privacy.noise_multiplier=-1").model
    with pytest.raises(ConfigError, match="minibatch_std_group = 0"):
        check_modules(Discriminator(model, 16, 1, 2), images_of())


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LeakyReLU()])
def test_layers_that_do_not_mix_images_are_accepted(layer):
    check_modules(Critic(layer), images_of())


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discriminator_without_minibatch_std_is_accepted(labels, dtype):
    network = Discriminator(settings_of().model, 16, 3, labels)
    network.dtype = dtype
    shown = images_of(3)
    data = ImageDataset("clinic", shown.images, shown.labels[:, :labels], ("a", "b")[:labels])
    check_modules(network, data)
    assert all(parameter.grad is None for parameter in network.parameters())


# --- warm start -----------------------------------------------------------------------------------


def origin(**of: object) -> dict:
    """Metadata of the checkpoint of a run on phantoms, with changed settings."""
    tree = to_dict(from_dict({}, []))
    for key, value in of.items():
        section, name = key.split("__")
        tree[section][name] = value
    return {"settings": tree, "phantoms": True}


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        (origin(data__root="/somewhere/shards") | {"phantoms": False}, "data.root"),
        (origin() | {"phantoms": False}, "has no record that all its images were phantoms"),
        ({"settings": origin()["settings"]}, "has no record that all its images were phantoms"),
        (origin(training__warm_start="/somewhere/run"), "started from another model"),
        ({}, "has no record of its training data"),
    ],
)
def test_warm_start_needs_public_training_images(meta, why):
    with pytest.raises(ConfigError, match=why) as found:
        check_start(settings_of(), Path("/elsewhere/round.safetensors"), meta)
    assert "/elsewhere" not in str(found.value)
    assert "/somewhere" not in str(found.value)
    check_start(settings_of("privacy.public_start=true"), Path("round.safetensors"), meta)
    check_start(settings_of("privacy.noise_multiplier=-1"), Path("round.safetensors"), meta)


def test_warm_start_from_phantoms_is_accepted():
    check_start(settings_of(), Path("round.safetensors"), origin())


@pytest.mark.parametrize("drawn", [True, False])
def test_warm_start_is_checked_pooled_and_federated(tmp_path, drawn):
    """The server initialises the weights without privacy; the run's settings decide."""
    open_settings = settings_of("privacy.noise_multiplier=-1")
    donor = Trainer(open_settings, images_of())
    path = tmp_path / "round-00001.safetensors"
    save_tensors(
        path,
        donor.state_dict()[0],
        {"settings": to_dict(open_settings), "phantoms": drawn, "label_names": ["a"]},
    )
    settings = settings_of(f"training.warm_start={path}", "federation.hospitals=1")
    begin = {"planned_images": 40, "ledger": JointLedger([Ledger(tmp_path / "l")]), "run": "run"}
    members = [
        Member(
            **{name: value for name, value in MEMBER.items() if name in Member.__dataclass_fields__}
        )
    ]
    pooled = begin_training(settings, images_of(), **begin)
    if not drawn:
        with pytest.raises(ConfigError, match="public_start"):
            warm_start(pooled)
        with pytest.raises(ConfigError, match="public_start"):
            initial_state(settings, members)
    else:
        warm_start(pooled)
        initial_state(settings, members)


MEMBER = {
    "node": 1,
    "number": 0,
    "name": "clinic",
    "images": 20,
    "units": 20,
    "label_names": ("a", "b"),
    "exclusive": True,
    "channels": 1,
    "resolution": 16,
}
