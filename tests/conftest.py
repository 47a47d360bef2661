"""Options and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from fedgan.cli import main
from fedgan.privacy.register import VARIABLE

# Beside the shards of each test: no register of the home folder, none of another test.
os.environ[VARIABLE] = ".ledgers"

# The duration of an example shows the load of the machine, not an error.
settings.register_profile("fedgan", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedgan")

VECTORS = "stylegan2_vectors.npz"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference",
        metavar="PATH",
        default=None,
        help=f"folder of {VECTORS}, recorded numbers of a StyleGAN2-ADA; default: skip these tests",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: at the end one worker would wait for the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def reference_vectors(pytestconfig: pytest.Config) -> dict[str, np.ndarray]:
    """Arrays of the recorded StyleGAN2-ADA (`param/…`, `in/…`, `out/…`, `ada/…`), or skip."""
    folder = pytestconfig.getoption("--reference")
    if folder is None:
        pytest.skip(f"no recorded numbers: give the folder of {VECTORS} with --reference PATH")
    path = Path(folder) / VECTORS
    if not path.is_file():
        pytest.skip(f"no {VECTORS} in the folder of --reference")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture
def fedgan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`fedgan(*arguments)` → (exit code, stdout, stderr), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run
