"""federation.control_variates: corrections of the hospitals' steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_federation import federate, tiny, write_shards
from test_training import tiny_dataset, tiny_settings
from torch import nn

from client.app import app
from fedgan.data.federation import open_hospitals
from fedgan.errors import ConfigError
from fedgan.models.stylegan2.generator import Generator
from fedgan.run_folder import RunFolder
from fedgan.runs.compatibility import check_compatibility
from fedgan.training.checkpoint import load_tensors
from fedgan.training.control_variates import ControlVariates
from fedgan.training.trainer import Trainer

ON = "federation.control_variates=true"
COMPATIBLE = (ON, "federation.local_images=equal", "training.kimg=0.96")
PARTS = ("generator", "discriminator")


def mean_model(models: list[dict[str, np.ndarray]], weights: np.ndarray) -> dict[str, np.ndarray]:
    return {
        key: sum(w * model[key] for w, model in zip(weights, models, strict=True)).astype(
            np.float32
        )
        for key in models[0]
    }


@hypothesis_settings(max_examples=20)
@given(
    optima=st.lists(st.floats(-2, 2), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    curvatures=st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4),
)
def test_corrections_lead_to_the_optimum_of_all_hospitals(
    optima: list[float], sizes: list[int], curvatures: list[float]
) -> None:
    """Quadratics a_i (w - b_i)² / 2 with the optimum Σ p a b / Σ p a."""
    share = np.array(sizes[: len(optima)], float) / sum(sizes[: len(optima)])
    a = np.array(curvatures[: len(optima)])
    best = float((share * a) @ optima / (share @ a))
    nets = [nn.Linear(1, 1, bias=False).double() for _ in optima]
    variates, x, steps = [ControlVariates() for _ in optima], 5.0, 4
    for _ in range(100):
        for net, control in zip(nets, variates, strict=True):
            trained = [net.weight.detach().clone()]
            nn.init.constant_(net.weight, x)
            control.update("net", trained, net)
        for net, control, slope, optimum in zip(nets, variates, a, optima, strict=True):
            for _ in range(steps):
                with torch.no_grad():
                    net.weight -= 0.1 * slope * (net.weight - optimum)
                control.apply({"net": net}, 1 / steps)
        x = float(share @ [net.weight.item() for net in nets])
        total = share @ [control.corrections["net"][0].item() for control in variates]
        assert abs(total) < 1e-9, "corrections must cancel out in the mean"
    assert x == pytest.approx(best, abs=1e-3)


def test_mean_without_corrections_misses_the_optimum() -> None:
    """Control for the test above: the plain mean of long rounds is biased."""
    x, a, optima = 5.0, np.array([2.0, 0.5]), np.array([1.0, -1.0])
    for _ in range(100):
        x = float(
            np.mean(
                [
                    optimum + (x - optimum) * (1 - 0.1 * slope) ** 4
                    for slope, optimum in zip(a, optima, strict=True)
                ]
            )
        )
    assert abs(x - (a @ optima) / a.sum()) > 0.05


def test_round_adds_the_whole_correction_for_any_number_of_steps() -> None:
    trainer = Trainer(tiny_settings(ON, "training.learning_rate=1e-12"), tiny_dataset())
    trainer.load_parameters(trainer.get_parameters(PARTS))
    trainer.train(24)
    trained = trainer.get_parameters(PARTS)
    sent = {key: array + np.float32(0.25) for key, array in trained.items()}
    trainer.load_parameters(sent)
    trainer.train(40)
    parameters = {
        f"{part}/{name}" for part in PARTS for name, _ in trainer.parts[part].named_parameters()
    }
    for key, array in trainer.get_parameters(PARTS).items():
        if key in parameters:
            np.testing.assert_allclose(array, sent[key] + 0.25, atol=1e-4, err_msg=key)


def test_first_received_model_gives_no_correction() -> None:
    trainer = Trainer(tiny_settings(ON), tiny_dataset())
    trainer.load_parameters(
        {key: array + np.float32(1) for key, array in trainer.get_parameters(PARTS).items()}
    )
    assert set(trainer.exchange.control_variates.corrections) == set(PARTS)
    for corrections in trainer.exchange.control_variates.corrections.values():
        assert not any(correction.any() for correction in corrections)


def test_corrections_are_dropped_when_the_setting_is_off() -> None:
    trainer = Trainer(tiny_settings(ON), tiny_dataset())
    for _ in range(2):
        trainer.load_parameters(
            {key: array + np.float32(1) for key, array in trainer.get_parameters(PARTS).items()}
        )
    state = trainer.state_dict()
    plain, corrected = (
        Trainer(tiny_settings(), tiny_dataset()),
        Trainer(tiny_settings(ON), tiny_dataset()),
    )
    for resumed in (plain, corrected):
        resumed.load_state_dict(state)
    assert not plain.exchange.control_variates.corrections
    corrected.load_parameters(
        trainer.get_parameters(PARTS)
        | {key: array + 1 for key, array in trainer.get_parameters(PARTS).items()}
    )
    for part in PARTS:  # loading does not change the state
        kept = state[0][f"variates/{part}/000"]
        torch.testing.assert_close(kept, torch.ones_like(kept), atol=1e-3, rtol=0)


def test_corrections_survive_a_restart() -> None:
    def rounds(restart: bool) -> dict[str, np.ndarray]:
        hospitals = [
            Trainer(tiny_settings(ON), tiny_dataset(seed=number), stream=number)
            for number in range(2)
        ]
        sent = hospitals[0].get_parameters(PARTS)
        for number in range(3):
            for hospital in hospitals:
                hospital.load_parameters(sent)
                hospital.train(8)
            sent = mean_model(
                [hospital.get_parameters(PARTS) for hospital in hospitals], np.array([0.5, 0.5])
            )
            if restart and number == 1:
                states = [hospital.state_dict() for hospital in hospitals]
                hospitals = [
                    Trainer(tiny_settings(ON), tiny_dataset(seed=number), stream=number)
                    for number in range(2)
                ]
                for hospital, state in zip(hospitals, states, strict=True):
                    hospital.load_state_dict(state)
        return sent

    whole, cut = rounds(False), rounds(True)
    assert all(np.array_equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("federation.weights=sum", "takes no mean"),
        ("federation.weights=damped", "takes no mean"),
        ("federation.strategy=fedadam", "another mean"),
        ("federation.strategy=fedmedian", "another mean"),
        ("federation.label_rows=true", "some rows"),
        ("federation.exchange=ema", "neither"),
        ("federation.wire=fp16", "rounds the mean"),
        ("federation.secure=true", "clips values"),
        ("training.kimg=1", "cannot be divided equally"),
        ("federation.local_images=proportional", "numbers of steps"),
        ("federation.min_hospitals=2", "without some"),
        ("privacy.noise_multiplier=1", "may stop"),
        ("privacy.client_level=server", "may stop"),
    ],
)
def test_settings_whose_corrections_do_not_cancel_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"control_variates.*{text}"):
        check_compatibility(tiny_settings(*COMPATIBLE, override))
    check_compatibility(tiny_settings(*COMPATIBLE))
    check_compatibility(tiny_settings(ON, "federation.batch=shared", "training.kimg=1"))


def test_corrections_equal_the_mean_minus_the_own_last_model(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (24, 16, 16)), *COMPATIBLE, rounds=2, kimg=0.072
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    sent = load_tensors(run.checkpoint(1))[0]
    channels, label_dim = (
        open_hospitals(settings)[0].train.channels,
        sent["generator/mapping.embed.weight"].shape[1],
    )
    names = [
        name for name, _ in Generator(settings.model, 16, channels, label_dim).named_parameters()
    ]
    for hospital in ("alpha", "beta", "gamma"):
        folder = run.hospital_state(hospital)
        own, corrected = (
            load_tensors(folder / f"state-0000{number}.safetensors")[0] for number in (1, 2)
        )
        for index, name in enumerate(names):
            key = f"generator/{name}"
            moved = (sent[key].reshape(own[key].shape) - own[key]).reshape(-1)
            torch.testing.assert_close(
                corrected[f"variates/generator/{index:03d}"].reshape(-1), moved
            )
        assert any(
            corrected[f"variates/generator/{index:03d}"].any() for index in range(len(names))
        )
