"""What a private run gives away beside its model: labels, hashes, and what a server may ask of a hospital."""

from __future__ import annotations

import pytest
import torch
from test_dp_step import images_of, settings_of

from fedgan.errors import ConfigError
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.step import PrivateStep

# --- what promises nothing ---------------------------------------------------------------------------


def test_a_delta_above_one_in_n_is_refused(tmp_path):
    def begin(delta: float) -> PrivateStep:
        settings = settings_of(f"privacy.delta={delta}", "privacy.unit=patient")
        return PrivateStep(settings, images_of(20, patients=10), 5, 50, Ledger(tmp_path / "l"), "run", torch.device("cpu"))

    with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.11 is more than 1/n") as found:
        begin(0.11)
    assert "\n" not in str(found.value)
    assert begin(0.1).delta == begin(0).delta == 0.1
