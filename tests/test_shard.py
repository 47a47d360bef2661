"""Shards: round trip, atomic writing, and clear errors for damaged files."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.data.shard import Samples, Shard, ShardWriter, folder_name, write_shard
from fedgan.errors import DataError, SplitError, StorageError

NAMES = ("normal", "abnormal", "other")


def make_shard(
    path: Path,
    count: int = 12,
    resolution: int = 16,
    channels: int = 1,
    seed: int = 0,
    **changes: object,
) -> Shard:
    rng = np.random.default_rng(seed)
    arguments: dict = {
        "images": rng.integers(0, 256, (count, channels, resolution, resolution), dtype=np.uint8),
        "labels": np.eye(3, dtype=np.uint8)[np.arange(count) % 3],
        "patients": [f"p{i // 2}" for i in range(count)],
        "splits": [
            "train" if i // 2 < 4 else "val" if i // 2 < 5 else "test" for i in range(count)
        ],
        "label_names": NAMES,
        **changes,
    }
    return write_shard(path, **arguments)


def edit_card(path: Path, **changes: object) -> None:
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps({**card, **changes}))


@given(
    st.integers(1, 40),
    st.sampled_from([1, 3]),
    st.sampled_from([16, 32]),
    st.integers(0, 4),
    st.booleans(),
    st.data(),
)
@settings(max_examples=15)
def test_shard_round_trip(
    tmp_path_factory, count, channels, resolution, label_dim, exclusive, data
):
    rng = np.random.default_rng(count)
    exclusive = exclusive or label_dim == 0
    codes = rng.integers(0, max(label_dim, 1), count)
    labels = (
        np.eye(label_dim, dtype=np.uint8)[codes]
        if exclusive and label_dim
        else rng.integers(0, 2, (count, label_dim))
    )
    text = st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8
    )
    patients = [f"{i}{data.draw(text)}" for i in range(count)]
    splits = data.draw(
        st.lists(st.sampled_from(["train", "val", "test"]), min_size=count, max_size=count)
    )
    images = rng.integers(0, 256, (count, channels, resolution, resolution), dtype=np.uint8)
    names = [f"label {i}, with comma" for i in range(label_dim)]
    path = tmp_path_factory.mktemp("round") / "north"
    write_shard(
        path,
        images,
        labels,
        patients=patients,
        splits=splits,
        label_names=names,
        exclusive=exclusive,
        licence="CC",
    )
    shard = Shard.open(path, verify=True)
    assert isinstance(shard.images, np.memmap)
    assert not shard.images.flags.writeable
    assert np.array_equal(shard.images, images)
    assert np.array_equal(shard.labels, labels)
    assert shard.samples.patients.tolist() == patients
    assert shard.samples.splits.tolist() == splits
    assert set(shard.samples.institutions) == {"north"}
    assert (shard.card.label_names, shard.card.exclusive, shard.card.licence) == (
        tuple(names),
        exclusive,
        "CC",
    )
    for split in ("train", "val", "test"):
        rows = np.array(splits) == split
        assert shard.card.images[split] == rows.sum()
        assert list(shard.card.counts[split].values()) == labels[rows].sum(axis=0).tolist()
        assert shard.card.patients[split] == rows.sum()
        assert np.array_equal(shard.dataset(split).images[np.arange(rows.sum())], images[rows])


def test_content_hash_depends_on_content_not_on_path(tmp_path):
    first = make_shard(tmp_path / "a")
    copy = make_shard(
        tmp_path / "deep" / "b",
        sources=[f"/elsewhere/{i}.png" for i in range(12)],
        name="other-name",
    )
    assert first.card.content_hash == copy.card.content_hash == copy.hash_content()
    hashes = {
        first.card.content_hash,
        make_shard(tmp_path / "c", seed=1).card.content_hash,
        make_shard(
            tmp_path / "d", labels=np.eye(3, dtype=np.uint8)[(np.arange(12) + 1) % 3]
        ).card.content_hash,
        make_shard(tmp_path / "e", patients=[f"q{i // 2}" for i in range(12)]).card.content_hash,
        make_shard(tmp_path / "f", splits=["train"] * 12).card.content_hash,
    }
    assert len(hashes) == 5


def test_chunks_give_the_same_shard_as_one_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 16, 16), dtype=np.uint8)
    whole, parts = (
        make_shard(tmp_path / "a", images=images),
        make_shard(tmp_path / "b", images=iter([images[:5], images[5:]])),
    )
    assert (tmp_path / "a/images.npy").read_bytes() == (tmp_path / "b/images.npy").read_bytes()
    assert whole.card.content_hash == parts.card.content_hash
    assert np.array_equal(np.load(tmp_path / "a/images.npy", allow_pickle=False), images)


def test_existing_shard_needs_overwrite(tmp_path):
    before = make_shard(tmp_path / "a")
    with pytest.raises(DataError, match="exists already"):
        make_shard(tmp_path / "a", seed=1)
    assert Shard.open(tmp_path / "a", verify=True).card.content_hash == before.card.content_hash
    after = make_shard(tmp_path / "a", seed=1, overwrite=True)
    assert after.card.content_hash != before.card.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_full_disk_leaves_no_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    images = np.zeros((600, 1, 32, 32), np.uint8)
    try:  # the kernel refuses the write like a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        with pytest.raises(StorageError, match="cannot write"):
            make_shard(tmp_path / "a", 600, images=images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_unfinished_writer_leaves_no_file(tmp_path):
    def stop_early() -> None:
        with ShardWriter(tmp_path / "a", 1, 16) as writer:
            writer.append(np.zeros((2, 1, 16, 16), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_early()
    with ShardWriter(tmp_path / "a", 1, 16) as writer:
        writer.append(np.zeros((2, 1, 16, 16), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_path_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        make_shard(tmp_path / "file" / "a")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "samples.csv", "card.json"])
def test_missing_file_is_named(tmp_path, name):
    make_shard(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(DataError, match=name):
        Shard.open(tmp_path / "a")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "samples.csv", "card.json"])
@pytest.mark.parametrize("left", [0, 0.5, 0.95])
def test_truncated_file_is_one_clear_error(tmp_path, name, left):
    make_shard(tmp_path / "a", 40, splits=["train"] * 40)
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(DataError, match="import the shard again") as raised:
        Shard.open(tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_arrays_with_python_objects_are_refused(tmp_path):
    make_shard(tmp_path / "a")
    np.save(tmp_path / "a/labels.npy", np.array([{}] * 12, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"labels\.npy"):
        Shard.open(tmp_path / "a")


def test_verify_detects_one_changed_pixel(tmp_path):
    make_shard(tmp_path / "a")
    file = tmp_path / "a/images.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    Shard.open(tmp_path / "a")
    with pytest.raises(DataError, match="do not match the content hash"):
        Shard.open(tmp_path / "a", verify=True)


def test_patient_in_two_splits_is_an_error_without_the_patient_id(tmp_path):
    splits = ["train"] * 11 + ["test"]  # p5 has rows 10 and 11
    with pytest.raises(SplitError, match="1 patient is in more than one split") as raised:
        make_shard(tmp_path / "a", splits=splits)
    assert "p5" not in str(raised.value)
    assert not (tmp_path / "a").exists()
    make_shard(tmp_path / "b")
    lines = (tmp_path / "b/samples.csv").read_text().splitlines()
    assert lines[1] == "0,p0,b,train,"
    (tmp_path / "b/samples.csv").write_text("\n".join([lines[0], "0,p0,b,test,", *lines[2:]]))
    with pytest.raises(SplitError):
        Shard.open(tmp_path / "b")


def test_label_outside_the_card_is_refused(tmp_path):
    make_shard(tmp_path / "a")
    edit_card(tmp_path / "a", label_names=["normal", "abnormal"])
    with pytest.raises(DataError, match="outside the card"):
        Shard.open(tmp_path / "a")
    make_shard(tmp_path / "b")
    labels = np.load(tmp_path / "b/labels.npy", allow_pickle=False)
    labels[0] = (0, 2, 0)
    np.save(tmp_path / "b/labels.npy", labels)
    with pytest.raises(DataError, match="0 or 1"):
        Shard.open(tmp_path / "b")
    with pytest.raises(DataError, match="1 images do not have exactly one label"):
        make_shard(
            tmp_path / "c",
            labels=np.concatenate([np.eye(3, dtype=np.uint8)[[0] * 11], [[1, 1, 0]]]),
        )


@pytest.mark.parametrize("resolution", [8, 24, 48])
def test_resolution_must_be_a_power_of_two(tmp_path, resolution):
    with pytest.raises(DataError, match=f"{resolution} is no power of two"):
        make_shard(tmp_path / "a", resolution=resolution)
    make_shard(tmp_path / "b")
    edit_card(tmp_path / "b", resolution=resolution)
    with pytest.raises(DataError, match=f"{resolution} is no power of two"):
        Shard.open(tmp_path / "b")


def test_card_of_another_format_or_with_a_path_as_name_is_refused(tmp_path):
    make_shard(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit_card(tmp_path / "a", format="fedgan-shard-99")
    with pytest.raises(DataError, match="fedgan-shard-99"):
        Shard.open(tmp_path / "a")
    edit_card(tmp_path / "b", name="../../etc")
    with pytest.raises(DataError, match="name must be"):
        Shard.open(tmp_path / "b")
    with pytest.raises(DataError, match="no shard at"):
        Shard.open(tmp_path / "nowhere")


def test_samples_need_one_row_per_image_and_a_known_split(tmp_path):
    images = np.zeros((3, 1, 16, 16), np.uint8)
    column = np.array(["a", "b"])
    with ShardWriter(tmp_path / "a", 1, 16) as writer:
        writer.append(images)
        with pytest.raises(DataError, match="3 images and 2 samples"):
            writer.finish(
                np.zeros((2, 0)), Samples(column, column, column, column), name="a", label_names=()
            )
    with pytest.raises(DataError, match="'holdout' is no split"):
        make_shard(tmp_path / "b", splits=["holdout"] * 12)


@given(st.text(max_size=80))
def test_folder_names_are_safe_and_stable(name):
    folder = folder_name(name)
    assert folder
    assert "/" not in folder
    assert "\\" not in folder
    assert not folder.startswith(".")
    assert folder_name(folder) == folder


@pytest.mark.parametrize("name", ["a\nb", "a\x9bb", "\u202eab", "a\u200bb", "a\u2028b"])
def test_label_names_with_invisible_characters_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"has a control, bidi or zero-width character") as caught:
        make_shard(tmp_path / "shard", label_names=("normal", name, "other"))
    assert str(caught.value).isprintable()
    assert not (tmp_path / "shard").exists()
