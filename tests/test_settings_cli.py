"""`fedgan settings`: selection, text, JSON, and the reference page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgan.cli.settings import accepted, as_text, find, reference_markdown
from fedgan.config import Settings, describe, to_dict

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]


def test_describe_matches_the_settings_and_their_defaults() -> None:
    tree = to_dict(Settings())
    for item in describe():
        section, _, field = item.key.rpartition(".")
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        assert (tree[section] if section else tree)[field] == default


def test_settings_lists_every_key_by_section(fedgan: Run) -> None:
    code, out, _ = fedgan("settings")
    assert code == 0
    text = " ".join(out.split())
    for item in describe():
        assert f"{item.key} = " in out
        assert item.meaning in text
    headings = [line.partition("]")[0] for line in out.splitlines() if line.startswith("[")]
    assert headings == [
        f"[{name}" for name, value in to_dict(Settings()).items() if isinstance(value, dict)
    ]


def test_settings_prints_type_default_range_and_choices(fedgan: Run) -> None:
    out = fedgan("settings", "evaluation.psi")[1]
    assert "evaluation.psi = 1.0" in out
    assert "number from 0 to 1" in out
    assert "text: fedavg, fedprox" in fedgan("settings", "federation.strategy")[1]
    assert "list of whole numbers" in fedgan("settings", "data.quantities")[1]


@pytest.mark.parametrize("width", [40, 80])
def test_settings_wraps_to_the_width_of_the_terminal(
    width: int, fedgan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = fedgan("settings")[1]
    long = [line for line in out.splitlines() if len(line) > width]
    assert all(" = " in line for line in long)  # a default is never broken
    assert max(map(len, out.splitlines())) > width / 2
    monkeypatch.setenv("COLUMNS", str(3 * width))
    assert out.count("\n") > fedgan("settings")[1].count("\n")


def test_settings_takes_a_section_or_a_key(fedgan: Run) -> None:
    listed = json.loads(fedgan("settings", "privacy", "--json")[1])["settings"]
    assert [row["key"] for row in listed] == [
        item.key for item in describe() if item.key.startswith("privacy.")
    ]
    (row,) = json.loads(fedgan("settings", "training.r1_gamma", "--json")[1])["settings"]
    assert set(row) == {"key", "type", "default", "choices", "low", "high", "meaning"}
    assert (row["type"], row["default"], row["low"], row["high"]) == ("number", -1.0, -1.0, None)
    assert [item.key for item in find("seed")] == ["seed"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("privcy", "did you mean 'privacy'?"),
        ("training.r1_gama", "did you mean 'training.r1_gamma'?"),
        ("r1_gamma", "did you mean 'training.r1_gamma'?"),
        ("federation.stratgy", "did you mean 'federation.strategy'?"),
        ("xyzzy", "list all keys with: fedgan settings"),
    ],
)
def test_unknown_name_is_one_error_with_the_nearest_name(
    name: str, nearest: str, fedgan: Run
) -> None:
    code, out, err = fedgan("settings", name)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"no section or key '{name}'" in err
    assert nearest in err


def test_reference_markdown_has_one_row_per_key() -> None:
    lines = reference_markdown().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [item.key for item in describe()]
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "## `[privacy]`" in lines


def test_every_setting_states_its_type_and_fits_a_wide_terminal() -> None:
    assert all(accepted(item) for item in describe())
    assert max(map(len, as_text(describe(), 100).splitlines())) <= 100


def test_help_imports_neither_torch_nor_flower() -> None:
    code = (
        "import sys; from fedgan.cli import main; main(['--help']); main(['settings']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert not {"torch", "numpy", "flwr", "ray", "scipy"} & set(found.stderr.split())
