"""The node-config of a hospital: limits of requests, and where an operator sees them."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
from small_federation import NAMES, LocalGrid, NoEvaluator, ledger_in, tiny, write_shards

from client.app import app
from client.hospital import TrainRequest
from client.policy import GIB, POLICY, apply_policy, apply_state_quota, read_policy
from client.policy import reference_markdown as policy_markdown
from fedgan.cli import doctor
from fedgan.errors import ConfigError, FederationError
from fedgan.exchange.error_messages import STEPS
from fedgan.files import locked as held
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from server.federation import Federation

PRIVATE = ("privacy.noise_multiplier=1",)
COMPATIBLE = (
    "model.minibatch_std_group=0",
    "augment.mode=none",
    "training.r1_gamma=0",
    "training.labels=uniform",
)


def request(*overrides: str, **fields: Any) -> TrainRequest:
    return TrainRequest(tiny(Path("data"), *overrides), "e", "run", **fields)


@pytest.mark.parametrize(
    ("key", "value", "refused", "passes"),
    [
        ("max-epsilon", 3, request(), request(*PRIVATE)),
        ("require-secure", True, request(), request("federation.secure=true")),
        ("unit", "patient", request(), request(*PRIVATE)),
        ("unit", "patient", request(*PRIVATE, "privacy.unit=image"), request(*PRIVATE)),
        ("unit", "image", request(), request(*PRIVATE)),
        ("unit", "image", request(), request(*PRIVATE, "privacy.unit=image")),
        ("max-delta", 1e-6, request(), request(*PRIVATE)),
        ("min-noise", 0.5, request(), request(*PRIVATE)),
        ("min-images", 20, request(images=19), request(images=20)),
        ("min-images", 20, request(images=1), request(images=0)),
        ("min-batch", 4, request(batch=3), request(batch=4)),
        ("min-batch", 5, request(), request(batch=5)),
        ("max-images", 20, request(images=21), request(images=20)),
        ("allow-families", "stylegan2", None, request()),
        (
            "allow-exchange",
            "generator, ema",
            request("federation.exchange=generator,discriminator"),
            request("federation.exchange=generator,ema"),
        ),
    ],
)
def test_policy_refuses_requests_beyond_it_and_no_others(
    key: str, value: Any, refused: TrainRequest | None, passes: TrainRequest
) -> None:
    after = apply_policy(passes, {key: value, "partition-id": 0, "num-partitions": 3})
    assert after == passes or key == "max-epsilon"
    if refused is None:  # no second family exists
        model = dataclasses.replace(request().settings.model, family="other")
        refused = request()
        refused = dataclasses.replace(
            refused, settings=dataclasses.replace(refused.settings, model=model)
        )
    steps: list[str] = []
    with pytest.raises(ConfigError, match=f"this node's config has {key} = .*, and .*: refused"):
        apply_policy(refused, {key: value}, steps.append)
    assert steps[-1] == f"applying its {key}"


def test_max_threads_lowers_the_request() -> None:
    def threads(requested: int, limit: str) -> int:
        asked = request(f"federation.threads={requested}")
        return apply_policy(asked, {"max-threads": limit}).settings.federation.threads

    assert threads(4, "2") == 2
    assert threads(1, "2") == 1
    assert threads(0, "1") == 1  # all cores


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"max-epsilom": 3}, "has max-epsilom, which is no key: did you mean max-epsilon?"),
        ({"x": 3}, "has x, which is no key: known are partition-id, "),
        ({"Min_Images": 3}, "has Min_Images: it is written min-images"),
        ({"data_root": "/data"}, "has data_root: it is written data-root"),
        ({"min-images": 2.5}, "min-images = 2.5 in this node's config: give a whole number"),
        ({"min-images": True}, "give a whole number above 0"),
        ({"max-seconds": "-1"}, "give a number above 0"),
        ({"max-images": "inf"}, "give a whole number above 0"),
        ({"unit": "hospital"}, 'give "patient" or "image"'),
        ({"require-unit": "patient"}, "has require-unit, which is no key"),
        ({"min-noise": 0}, "give a number above 0"),
        ({"allow-exchange": "generators"}, "of: generator, discriminator, ema"),
        ({"allow-exchange": ""}, "of: generator, discriminator, ema"),
    ],
)
def test_unknown_keys_and_values_refuse_every_request(node: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        apply_policy(request(), node)


def test_every_key_has_a_listed_step_and_a_row_of_the_documentation() -> None:
    assert {f"applying its {key.name}" for key in POLICY} <= set(STEPS)
    rows = policy_markdown().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| `{key.name}`" for key in POLICY]


# --- in a federation ------------------------------------------------------------------------------


def federate_with(tmp_path: Path, policy: dict[str, Any], *overrides: str) -> None:
    """Train a deployment of two hospitals; the second has `policy` in its node-config."""
    data = write_shards(tmp_path / "data", (24, 16))
    run = RunFolder.at(tmp_path / "run")
    prepare_run(tiny(data, *overrides, hospitals=2, rounds=1, kimg=0.016), run)

    def node_config(number: int) -> dict[str, Any]:
        own = {"data-root": str(data / NAMES[number]), "state-dir": str(tmp_path / NAMES[number])}
        return own | (policy if number else {})

    Federation(run.settings(), run, experiment_of(run), NoEvaluator()).train(
        LocalGrid(2, app, node_config=node_config)  # type: ignore[arg-type]
    )


def test_refusal_is_one_listed_reason_and_a_line_of_client_log(tmp_path: Path) -> None:
    with pytest.raises(
        FederationError, match=r"ConfigError while applying its unit \(partition-id 1\)$"
    ):
        federate_with(tmp_path, {"unit": "patient"})
    log = (tmp_path / "beta" / "client.log").read_text()
    assert "this node's config has unit = patient, and the run has no privacy" in log


@pytest.mark.parametrize(
    ("policy", "override", "why"),
    [
        (
            {"max-delta": 1e-6},
            "privacy.delta=0",
            "max-delta = 1e-06, and the run has delta = 1e-05",
        ),
        ({"max-delta": 1e-6}, "privacy.delta=2e-6", "and the run has delta = 2e-06 here"),
        (
            {"min-noise": 3},
            "privacy.noise_multiplier=2.9",
            "and the run has a noise multiplier of 2",
        ),
        (
            {"min-noise": 99},
            "privacy.epsilon=5",
            "min-noise = 99, and the run has a noise multipli",
        ),
    ],
)
def test_delta_and_noise_of_a_hospital_are_limited_before_it_trains(
    tmp_path: Path, policy: dict[str, Any], override: str, why: str
) -> None:
    (key,) = policy
    noise = () if "epsilon" in override else PRIVATE
    with pytest.raises(FederationError, match=f"ConfigError while applying its {key}"):
        federate_with(tmp_path, policy, *COMPATIBLE, *noise, override)
    (log,) = (tmp_path / "beta").glob("*/client.log")
    assert why in log.read_text()
    assert not list((tmp_path / "beta").rglob("state-*"))
    assert not ledger_in(tmp_path / "data" / "beta").exists()


def test_training_ends_at_max_seconds(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="ConfigError while applying its max-seconds"):
        federate_with(tmp_path, {"max-seconds": 1e-6})
    (log,) = (tmp_path / "beta").glob("*/client.log")
    assert "after 4 of 8 images they are over" in log.read_text()
    assert not list((tmp_path / "beta").glob("*/state-*"))


def test_private_hospital_within_its_policy_trains(tmp_path: Path) -> None:
    limits = {"unit": "patient", "max-delta": 1e-5, "min-noise": 1, "max-epsilon": 1e6}
    federate_with(tmp_path, limits, *COMPATIBLE, *PRIVATE)
    assert ledger_in(tmp_path / "data" / "beta").exists()


def test_hospital_within_its_policy_trains(tmp_path: Path) -> None:
    limits = {"max-images": 100, "min-batch": 1, "max-seconds": 600, "state-quota": 1}
    federate_with(tmp_path, limits | {"allow-families": "stylegan2", "max-threads": 1})
    assert len(list((tmp_path / "beta").glob("*/state-*"))) == 2


# --- state-quota ----------------------------------------------------------------------------------


def state_folder(folder: Path, age: int) -> Path:
    """A folder with a state of 1 KiB, and what a hospital keeps beside it."""
    folder.mkdir(parents=True)
    for name in ("state-00003.safetensors", "experiment.json", "client.log"):
        (folder / name).write_bytes(bytes(1024))
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    return folder


def test_state_quota_removes_states_of_the_oldest_other_experiments(tmp_path: Path) -> None:
    own, new, old = (state_folder(tmp_path / str(age), age) for age in (9, 2, 5))
    for name in ("privacy-ledger.jsonl", "outbound.jsonl"):
        (tmp_path / name).write_bytes(bytes(1024))
    kept = {path for path in tmp_path.rglob("*") if not path.name.startswith("state-")}
    apply_state_quota(tmp_path, own, 2048 / GIB)
    assert {path.parent for path in tmp_path.glob("*/state-*")} == {own, new}
    with held(new, 0.0), pytest.raises(ConfigError, match="state-quota"):  # it trains now
        apply_state_quota(tmp_path, own, 1024 / GIB)
    apply_state_quota(tmp_path, own, 1024 / GIB)
    assert [path.parent for path in tmp_path.glob("*/state-*")] == [own]
    with pytest.raises(ConfigError, match=r"state-quota = .*, and the states need"):
        apply_state_quota(tmp_path, own, 1023 / GIB)
    assert {path for path in tmp_path.rglob("*") if not path.name.startswith("state-")} == kept
    assert old.is_dir()


# --- fedgan doctor --------------------------------------------------------------------------------


def test_doctor_shows_the_policy_of_a_node_config() -> None:
    (check,) = doctor.policy_checks('partition-id=2 max-epsilon=4.0 allow-exchange="generator,ema"')
    assert (check.name, check.status) == ("policy", "ok")
    assert check.found.startswith("max-epsilon = 4, allow-exchange = generator,ema; no limit by ")
    assert "require-secure" in check.found
    (check,) = doctor.policy_checks("partition-id=2")
    assert check.status == "warning"
    (check,) = doctor.policy_checks("require_secure=true")
    assert (check.status, check.found) == (
        "failed",
        "this node's config has require_secure: it is written require-secure",
    )
    (check,) = doctor.policy_checks("min-images=two words")
    assert check.status == "failed"
    assert doctor.policy_checks("") == []


def test_policy_is_read_from_texts_as_flower_gives_them() -> None:
    node = {"max-epsilon": "4", "require-secure": "True", "state-quota": 1.5, "data-root": "/d"}
    assert read_policy(node) == {"max-epsilon": 4.0, "require-secure": True, "state-quota": 1.5}
