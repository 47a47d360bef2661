"""`fedgan report --tensorboard`: event files of metrics.jsonl, and the error without the extra."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedgan import files
from fedgan.config import Settings
from fedgan.report.tensorboard import scalars
from fedgan.run_folder import RunFolder

Run = Callable[..., tuple[int, str, str]]


def line(number: int, **more: object) -> dict[str, object]:
    rows = [
        {"name": "north", "num_examples": 5, "loss_g": 1.0 * number, "epsilon": None},
        {"name": "../south/ward", "num_examples": 3, "loss_g": 3.0},
    ]
    found = {
        "round": number,
        "images_seen": 100 * number,
        "wall_seconds": 2.5 * number,
        "bytes_exchanged": 4000 * number,
    }
    return found | {"mean": {"loss_g": 2.0}, "hospitals": rows} | more


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    found = RunFolder.at(tmp_path / "run")
    found.write_settings(Settings(name="small"))
    lines = [
        line(1),
        line(
            2,
            fidelity={"frechet": 12.5, "extractor": "reference", "images": 64},
            samples="round-00002.png",
        ),
    ]
    files.write_text(found.metrics, "".join(json.dumps(row) + "\n" for row in lines))
    return found


def test_each_number_of_a_round_has_a_folder_and_tag(run: RunFolder) -> None:
    found = {
        (folder, tag, step): value
        for folder, tag, value, step in scalars(files.read_json_lines(run.metrics))
    }
    assert found["federation", "total/bytes_exchanged", 2] == 8000
    assert [found["federation", "round/bytes", step] for step in (1, 2)] == [4000, 4000]
    assert found["federation", "training/loss_g", 1] == 2.0
    assert found["federation", "fidelity/frechet", 2] == 12.5
    assert found["1-north", "training/loss_g", 2] == 2.0
    assert {folder for folder, _, _ in found} == {"federation", "1-north", "2-_south_ward"}
    assert not [tag for _, tag, _ in found if tag.endswith(("epsilon", "extractor", "name"))]


def test_report_writes_tensorboard_events(fedgan: Run, run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, out, err = fedgan("report", run.path, "--tensorboard", "events")
    assert code == 0, err
    assert "tensorboard events" in out
    assert run.report.is_file()
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == [
        "1-north",
        "2-_south_ward",
        "federation",
    ]
    events = EventAccumulator(str(tmp_path / "events" / "1-north"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("training/loss_g")] == [
        (1, 1.0),
        (2, 2.0),
    ]
    code, _, err = fedgan("report", run.path, "--tensorboard", "events")
    assert code == 2
    assert "events is not empty" in err


def test_missing_extra_is_an_error_that_names_the_package(
    fedgan: Run, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = fedgan("report", run.path, "--tensorboard", "events")
    assert code == 7
    assert "pip install 'fedgan[tracking]'" in err
    assert not Path("events").exists()
    assert fedgan("report", run.path)[0] == 0


def test_run_without_a_round_is_an_error(fedgan: Run, run: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    run.metrics.unlink()
    code, _, err = fedgan("report", run.path, "--tensorboard", "events")
    assert code == 2
    assert "has no round yet" in err
