"""The ADA controller of the augmentation probability p."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgan.config import AugmentSettings
from fedgan.errors import CheckpointError
from fedgan.training.ada import AdaController


def logits_with_mean_sign(positive: int, negative: int) -> torch.Tensor:
    return torch.cat([torch.full((positive,), 0.3), torch.full((negative,), -7.0)])


def run_window(controller: AdaController, logits: torch.Tensor) -> None:
    for _ in range(controller.settings.interval):
        controller.observe(logits)
        controller.step()


def test_p_rises_by_the_exact_amount_above_the_target() -> None:
    controller = AdaController(AugmentSettings(p=0.25, target=0.6, interval=4, speed_kimg=100.0))
    run_window(controller, logits_with_mean_sign(15, 1))  # r_t = 0.875
    assert controller.r_t == 0.875
    assert controller.p == 0.25 + 16 * 4 / 100_000


def test_p_falls_by_the_exact_amount_below_the_target() -> None:
    controller = AdaController(AugmentSettings(p=0.25, target=0.6, interval=2, speed_kimg=0.5))
    run_window(controller, logits_with_mean_sign(12, 4))  # r_t = 0.5
    assert controller.r_t == 0.5
    assert controller.p == 0.25 - 16 * 2 / 500


def test_p_stays_exactly_on_the_target() -> None:
    controller = AdaController(AugmentSettings(p=0.25, target=0.5))
    run_window(controller, logits_with_mean_sign(12, 4))
    assert controller.p == 0.25


def test_p_is_clamped_to_the_unit_interval() -> None:
    up = AdaController(AugmentSettings(p=1.0))
    run_window(up, torch.ones(16))
    down = AdaController(AugmentSettings(p=0.0))
    run_window(down, -torch.ones(16))
    assert (up.p, down.p) == (1.0, 0.0)


def test_p_goes_from_0_to_1_within_speed_kimg() -> None:
    controller = AdaController(AugmentSettings(speed_kimg=1.0, interval=4))
    steps = 0
    while controller.p < 1.0 - 1e-9:
        controller.observe(torch.ones(25))
        controller.step()
        steps += 1
    assert steps * 25 == 1000


def test_p_moves_only_at_the_end_of_a_window() -> None:
    controller = AdaController(AugmentSettings(interval=3))
    seen = []
    for _ in range(7):
        controller.observe(torch.ones(8))
        controller.step()
        seen.append(controller.p)
    assert seen[0] == seen[1] == 0.0
    assert 0.0 < seen[2] == seen[3] == seen[4] < seen[5] == seen[6]


def test_r_t_is_the_mean_sign_over_the_window() -> None:
    controller = AdaController(AugmentSettings(interval=2))
    run_window(controller, torch.ones(8))
    for logits in (torch.tensor([5.0, -1e-3, 0.0]), torch.tensor([[2.0]])):
        controller.observe(logits)
        controller.step()
    assert controller.r_t == pytest.approx((1 - 1 + 0 + 1) / 4)


def test_observations_of_one_step_are_summed() -> None:
    controller = AdaController(AugmentSettings(interval=1, speed_kimg=1.0))
    controller.observe(torch.ones(6))
    controller.observe(-torch.ones(2))
    controller.step()
    assert controller.r_t == 0.5
    assert controller.p == 0.0  # below 0.6


def test_fixed_mode_keeps_p_and_measures_r_t() -> None:
    controller = AdaController(AugmentSettings(mode="fixed", p=0.3))
    run_window(controller, torch.ones(16))
    assert (controller.p, controller.r_t) == (0.3, 1.0)


def test_mode_none_keeps_p_at_0() -> None:
    controller = AdaController(AugmentSettings(mode="none", p=0.3))
    run_window(controller, torch.ones(16))
    assert (controller.p, controller.r_t) == (0.0, 1.0)


def test_window_without_observations_changes_nothing() -> None:
    controller = AdaController(AugmentSettings(p=0.5))
    run_window(controller, torch.ones(16))
    before = (controller.p, controller.r_t)
    for _ in range(4):
        controller.step()
    assert (controller.p, controller.r_t) == before


def test_nan_logits_do_not_move_p() -> None:
    controller = AdaController(AugmentSettings(p=0.5, target=0.0))
    run_window(controller, torch.full((4,), float("nan")))
    assert controller.p == 0.5


def test_observe_keeps_no_graph() -> None:
    logits = torch.ones(4, requires_grad=True)
    controller = AdaController(AugmentSettings())
    controller.observe(logits * 2)
    assert isinstance(controller._signs, torch.Tensor)
    assert not controller._signs.requires_grad


@given(stop=st.integers(0, 23), seed=st.integers(0, 999), interval=st.integers(1, 6))
def test_resume_within_a_window_is_exact(stop: int, seed: int, interval: int) -> None:
    settings = AugmentSettings(p=0.4, target=0.1, interval=interval, speed_kimg=0.7)
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(seed))
    whole, first = AdaController(settings), AdaController(settings)
    for row in logits:
        whole.observe(row)
        whole.step()
    for row in logits[:stop]:
        first.observe(row)
        first.step()
    second = AdaController(settings)
    second.load_state(json.loads(json.dumps(first.state())))
    for row in logits[stop:]:
        second.observe(row)
        second.step()
    assert second.state() == whole.state()


def test_state_between_observe_and_step_keeps_the_observation() -> None:
    settings = AugmentSettings(interval=1)
    first, second = AdaController(settings), AdaController(settings)
    first.observe(torch.ones(8))
    second.load_state(first.state())
    first.step()
    second.step()
    assert second.state() == first.state()
    assert second.r_t == 1.0


@pytest.mark.parametrize("change", [{"p": 1.5}, {"p": None}, {"steps": -1}, {"images": "many"}])
def test_damaged_state_is_refused_without_changes(change: dict[str, object]) -> None:
    controller = AdaController(AugmentSettings(p=0.4))
    before = controller.state()
    with pytest.raises(CheckpointError, match="ADA state"):
        controller.load_state({**before, **change})
    assert controller.state() == before


def test_state_of_another_program_is_refused() -> None:
    with pytest.raises(CheckpointError, match="ADA state"):
        AdaController(AugmentSettings()).load_state({"probability": 0.1})
