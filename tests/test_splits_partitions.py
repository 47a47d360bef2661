"""Splits and partitions by patient, and opening the hospitals of a scenario."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedgan.config import Settings, from_dict
from fedgan.data import partitions
from fedgan.data.dataset import ImageDataset, pool, unit_names, unit_numbers
from fedgan.data.federation import (
    block_mean,
    describe_hospitals,
    open_hospital,
    open_hospitals,
    partition_record,
)
from fedgan.data.shard import Shard, write_shard
from fedgan.data.splits import check_splits, make_splits
from fedgan.errors import ConfigError, DataError, SplitError

FAST = settings(max_examples=40)
BYTE = st.integers(0, 2)  # few values: images with equal pixels


@st.composite
def tables(draw: st.DrawFn, least_patients: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of a pool: patients, institutions (one per patient), classes (one per row)."""
    count = draw(st.integers(least_patients, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    rows = np.repeat(np.arange(count), rng.integers(1, 5, count))
    rng.shuffle(rows)
    institutions = rng.integers(0, 3, count)
    return (
        np.char.add("p", rows.astype(str)),
        np.char.add("h", institutions[rows].astype(str)),
        rng.integers(0, 4, len(rows)),
    )


def dirichlet(
    patients: np.ndarray, classes: np.ndarray, hospitals: int, alpha: float, seed: int
) -> list[np.ndarray]:
    shares = partitions.dirichlet_shares(int(classes.max()) + 1, hospitals, alpha, seed)
    return partitions.partition_by_shares(patients, classes, shares, seed)


def assert_whole_patients(
    patients: np.ndarray, parts: list[np.ndarray], cover: bool = True
) -> None:
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    if cover:
        assert np.array_equal(np.sort(together), np.arange(len(patients)))
    owners = [set(patients[part]) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert all((np.diff(part) > 0).all() for part in parts)


# --- splits --------------------------------------------------------------------------------------


@given(tables(), st.integers(0, 5), st.booleans())
@FAST
def test_splits_keep_patients_whole(table, seed, has_test):
    patients, _, _ = table
    given = None
    if has_test:
        tested = [
            hashlib.sha256(patient.encode()).digest()[0] < 60 for patient in patients.tolist()
        ]
        given = np.where(tested, "test", "train")
    splits = make_splits(patients, given, seed)
    check_splits(patients, splits, "here")
    if given is not None:
        assert np.array_equal(splits == "test", given == "test")


@given(tables(least_patients=12), st.integers(0, 5), st.randoms(use_true_random=False))
@FAST
def test_a_removed_patient_moves_no_other(table, seed, random):
    patients, _, classes = table
    order = np.array(random.sample(range(len(patients)), len(patients)))
    rest = order[patients[order] != patients[0]]
    assert np.array_equal(
        make_splits(patients, seed=seed)[rest], make_splits(patients[rest], seed=seed)
    )
    shares = partitions.dirichlet_shares(4, 3, 0.5, seed)
    for divide in (
        lambda rows: partitions.iid(patients[rows], 3, seed),
        lambda rows: partitions.partition_by_shares(patients[rows], classes[rows], shares, seed),
    ):
        for whole, left in zip(divide(np.arange(len(patients))), divide(rest), strict=True):
            assert set(whole[patients[whole] != patients[0]]) == set(rest[left])


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(["", "a", "p", "ap"]), BYTE),
        max_size=12,
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@FAST
def test_units_are_patients_of_an_institution_in_any_order(rows, has_patients, random):
    def data(chosen: list[tuple[str, str, int]]) -> ImageDataset:
        places, patients = ([row[column] for row in chosen] for column in (0, 1))
        return ImageDataset(
            "d",
            np.array([row[2] for row in chosen], np.uint8).reshape(-1, 1, 1, 1),
            np.zeros((len(chosen), 0), np.uint8),
            (),
            patients=np.array(patients if has_patients else [], str),
            institutions=np.array(places, str),
        )

    whole = data(rows)
    names, numbers = unit_names(whole).tolist(), unit_numbers(whole)
    for one in range(len(rows)):
        for other in range(one):
            same = has_patients and rows[one][1] != "" and rows[one][:2] == rows[other][:2]
            assert (names[one] == names[other]) == (numbers[one] == numbers[other]) == same
    kept = random.sample(rows, len(rows) // 2)
    assert not Counter(unit_names(data(kept)).tolist()) - Counter(names)
    assert sorted(unit_names(data(random.sample(rows, len(rows)))).tolist()) == sorted(names)


def test_pool_with_a_hospital_without_patients_keeps_those_of_the_other():
    def data(patients: list[str]) -> ImageDataset:
        images = np.zeros((2, 1, 1, 1), np.uint8)
        return ImageDataset(
            "d", images, np.zeros((2, 0), np.uint8), (), patients=np.array(patients, str)
        )

    assert len(set(unit_numbers(pool([data(["p", "p"]), data([])])))) == 3
    with pytest.raises(DataError, match="2 images and 1 patients"):
        data(["p"])


def test_shares_of_splits_and_partitions_are_met_in_expectation():
    patients = np.arange(20_000).astype(str)
    splits = make_splits(patients, seed=3)
    assert abs((splits == "test").mean() - 0.2) < 0.01  # 3.5 standard deviations
    assert abs((splits == "val").mean() - 0.1) < 0.01
    sizes = [len(part) / 20_000 for part in partitions.iid(patients, 4, 3)]
    assert max(abs(size - 0.25) for size in sizes) < 0.0125
    # The draw of the split says nothing about the hospital.
    held = np.flatnonzero(splits == "test")
    sizes = [len(part) / len(held) for part in partitions.iid(patients[held], 4, 3)]
    assert max(abs(size - 0.25) for size in sizes) < 0.03


def test_given_split_is_kept_and_invalid_ones_are_refused():
    patients, given = np.array(list("aabbcc")), np.array(["train"] * 2 + ["val"] * 2 + ["test"] * 2)
    assert np.array_equal(make_splits(patients, given=given), given)
    with pytest.raises(SplitError, match="1 patient is"):
        make_splits(np.array(list("aabbcb")), given=given)
    with pytest.raises(DataError, match="shares"):
        make_splits(patients, val=0.5, test=0.5)


# --- partitions ----------------------------------------------------------------------------------


@given(tables(least_patients=12), st.integers(1, 5), st.integers(0, 3))
@FAST
def test_iid_is_a_disjoint_cover(table, hospitals, seed):
    patients, _, _ = table
    parts = partitions.iid(patients, hospitals, seed)
    assert len(parts) == hospitals
    assert_whole_patients(patients, parts)


@given(
    tables(least_patients=25),
    st.integers(1, 4),
    st.sampled_from([0.1, 0.5, 10.0]),
    st.integers(0, 3),
)
@FAST
def test_dirichlet_is_a_disjoint_cover(table, hospitals, alpha, seed):
    patients, _, classes = table
    assert_whole_patients(patients, dirichlet(patients, classes, hospitals, alpha, seed))


@given(tables())
@FAST
def test_institutions_are_a_disjoint_cover(table):
    patients, institutions, _ = table
    names, parts = partitions.by_institution(institutions)
    assert_whole_patients(patients, parts)
    assert all(set(institutions[part]) == {name} for name, part in zip(names, parts, strict=True))


@given(
    tables(least_patients=12),
    st.lists(st.integers(4, 12), min_size=1, max_size=4),
    st.integers(0, 3),
)
@FAST
def test_fixed_quantities_are_disjoint_upper_bounds(table, quantities, seed):
    patients, _, _ = table
    assume(sum(quantities) + 8 <= len(patients))
    parts = partitions.fixed_quantities(patients, quantities, seed)
    assert_whole_patients(patients, parts, cover=False)
    for part, wanted in zip(parts, quantities, strict=True):
        assert wanted - 3 <= len(part) <= wanted  # a patient has at most 4 images


def test_fixed_quantities_are_exact_for_single_image_patients():
    patients = np.arange(100).astype(str)
    assert [len(part) for part in partitions.fixed_quantities(patients, [10, 30, 60], 0)] == [
        10,
        30,
        60,
    ]
    with pytest.raises(DataError, match="requires 101 images"):
        partitions.fixed_quantities(patients, [1, 100], 0)
    with pytest.raises(DataError, match="leaves a hospital empty"):
        partitions.fixed_quantities(np.array(["a"] * 5 + ["b"] * 5), [3, 5], 0)
    with pytest.raises(DataError, match="2 patients cannot be divided over 3"):
        partitions.iid(np.array(["a", "b", "b"]), 3, 0)


def test_alpha_controls_the_label_skew():
    patients, classes = np.arange(3000).astype(str), np.arange(3000) % 5

    def spread(alpha: float) -> float:
        parts = dirichlet(patients, classes, 3, alpha, seed=0)
        counts = np.array([np.bincount(classes[part], minlength=5) for part in parts])
        return float((counts / counts.sum(axis=0)).std())

    assert spread(0.1) > 0.3 > spread(1.0) > spread(100.0)
    assert spread(100.0) < 0.08
    assert spread(1e6) < 0.04  # 0.02 is the spread of 600 patients that each draw a hospital


def test_class_of_several_labels_is_the_first():
    labels = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 1]], np.uint8)
    assert partitions.row_classes(labels).tolist() == [1, 0, 3, 2]
    assert partitions.row_classes(labels[:, :0]).tolist() == [0] * 4


@given(tables())
@FAST
def test_class_of_a_patient_is_the_most_frequent(table):
    patients, _, classes = table
    codes, sizes, groups = partitions.patient_table(patients, classes)
    for number, patient in enumerate(np.unique(patients)):
        counts = np.bincount(classes[patients == patient])
        assert sizes[number] == counts.sum()
        assert groups[number] == counts.argmax()
        assert set(patients[codes == number]) == {patient}


# --- opening hospitals ---------------------------------------------------------------------------


def scenario(*overrides: str) -> Settings:
    return from_dict({}, ["training.batch_size=4", *overrides])


def hospital_shard(
    path: Path, count: int, seed: int, labels: np.ndarray | None = None, **changes: object
) -> Shard:
    rng = np.random.default_rng(seed)
    labels = np.eye(3, dtype=np.uint8)[rng.integers(0, 3, count)] if labels is None else labels
    patients = np.array([f"{path.name}-{i // 2}" for i in range(count)])
    arguments: dict = {
        "images": rng.integers(0, 256, (count, 1, 32, 32), dtype=np.uint8),
        "labels": labels,
        "patients": patients,
        "splits": make_splits(patients, seed=seed),
        "label_names": ("normal", "a", "b")[: labels.shape[1]],
        **changes,
    }
    return write_shard(path, **arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for seed, (name, count) in enumerate({"small": 40, "big": 80, "also-big": 80}.items()):
        hospital_shard(folder / name, count, seed)
    return folder


def test_shards_are_hospitals_with_the_largest_first(root):
    hospitals = open_hospitals(scenario(f"data.root={root}"))
    assert [hospital.name for hospital in hospitals] == ["also-big", "big", "small"]
    assert partition_record(hospitals) == []
    big = Shard.open(root / "big")
    for split in ("train", "val", "test"):
        data = hospitals[1].split(split)
        rows = big.rows(split)
        images, labels = data.batch(np.arange(len(data)))
        assert np.array_equal(images.numpy(), big.images[rows])
        assert np.array_equal(labels.numpy(), big.labels[rows])
        assert data.content_hash == big.card.content_hash
    (described,) = [row for row in describe_hospitals(hospitals) if row["name"] == "small"]
    small = Shard.open(root / "small")
    assert described == {
        "name": "small",
        "counts": small.card.counts,
        "images": small.card.images,
        "patients": small.card.patients,
        "content_hash": small.card.content_hash,
    }
    json.dumps(described)


def test_label_map_and_resolution_apply_on_opening(root):
    hospitals = open_hospitals(
        scenario("data.label_map=normal=normal,*=ill", "data.resolution=16"), root
    )
    shard = Shard.open(root / "small")
    train = hospitals[2].train
    images, labels = train.batch(np.arange(len(train)))
    blocks = (
        shard.images[shard.rows("train")]
        .astype(float)
        .reshape(-1, 1, 16, 2, 16, 2)
        .mean(axis=(3, 5))
    )
    assert train.resolution == 16
    assert np.abs(images.numpy() - blocks).max() <= 0.5
    assert train.label_names == ("normal", "ill")
    assert np.array_equal(labels.numpy()[:, 0], shard.labels[shard.rows("train"), 0])
    assert (labels.sum(dim=1) == 1).all()


@given(st.sampled_from([2, 4, 8]), st.integers(0, 100))
@FAST
def test_block_mean_rounds_to_nearest(factor, seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    size = 16 // factor
    exact = images.astype(float).reshape(2, 3, size, factor, size, factor).mean(axis=(3, 5))
    assert np.array_equal(block_mean(images, factor), np.floor(exact + 0.5).astype(np.uint8))
    assert (block_mean(np.full((1, 1, 16, 16), 255, np.uint8), factor) == 255).all()


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "quantities"])
def test_pool_is_partitioned_by_patient_and_recorded(root, partition):
    config = scenario(
        f"data.partition={partition}",
        "federation.hospitals=4",
        "data.quantities=10,20,30,40",
        "data.resolution=16",
        "seed=3",
    )
    hospitals = open_hospitals(config, root)
    assert sorted(hospital.name for hospital in hospitals) == [
        "hospital-1",
        "hospital-2",
        "hospital-3",
        "hospital-4",
    ]
    assert [len(h.train) for h in hospitals] == sorted(
        (len(h.train) for h in hospitals), reverse=True
    )
    shards = {path.name: Shard.open(path) for path in root.iterdir()}
    owners = [
        {p for split in ("train", "val", "test") for p in h.split(split).patients}
        for h in hospitals
    ]
    for split in ("train", "val", "test"):
        assigned = sum(len(h.split(split)) for h in hospitals)
        held = sum(len(shard.rows(split)) for shard in shards.values())
        assert assigned == (100 if partition == "quantities" and split == "train" else held)
    assert sum(map(len, owners)) == len(set().union(*owners))
    record = json.loads(json.dumps(partition_record(hospitals)))
    for hospital, entry in zip(hospitals, record, strict=True):
        assert entry["name"] == hospital.name
        for split, parts in entry["rows"].items():
            found = [shards[name].samples.patients[rows] for name, rows in parts.items()]
            assert sorted(np.concatenate([*found, []]).tolist()) == sorted(
                hospital.split(split).patients.tolist()
            )
            assert all(
                (shards[name].samples.splits[rows] == split).all() for name, rows in parts.items()
            )
    again = open_hospitals(config, root)
    assert describe_hospitals(again) == describe_hospitals(hospitals)
    other = open_hospitals(
        scenario(
            f"data.partition={partition}", "federation.hospitals=4", "data.quantities=10,20,30,40"
        ),
        root,
    )
    assert {h.train.content_hash for h in other}.isdisjoint(h.train.content_hash for h in hospitals)


def test_single_hospital_has_every_row(root):
    (hospital,) = open_hospitals(scenario("data.partition=iid", "federation.hospitals=1"), root)
    assert len(hospital.train) == sum(
        Shard.open(path).card.images["train"] for path in root.iterdir()
    )


def test_shard_is_partitioned_by_institution(tmp_path):
    hospital_shard(tmp_path / "pool", 60, 0, institutions=np.repeat(["x y", "z"], [20, 40]))
    hospitals = open_hospitals(scenario("federation.hospitals=2"), tmp_path / "pool")
    assert [hospital.name for hospital in hospitals] == ["z", "x-y"]
    assert set(hospitals[1].train.institutions) == {"x y"}
    assert partition_record(hospitals)[0]["name"] == "z"
    (whole,) = open_hospitals(scenario("federation.hospitals=1"), tmp_path / "pool")
    assert whole.name == "pool"


def test_colliding_patient_ids_stay_separate(tmp_path):
    for name, splits in (
        ("a", ["train"] * 20 + ["test"] * 4),
        ("b", ["test"] * 4 + ["train"] * 20),
    ):
        hospital_shard(tmp_path / name, 24, 0, patients=[f"{i}" for i in range(24)], splits=splits)
    hospitals = open_hospitals(scenario("data.partition=iid", "federation.hospitals=2"), tmp_path)
    for hospital in hospitals:
        train, test = (
            set(zip(data.institutions, data.patients, strict=True))
            for data in (hospital.train, hospital.test)
        )
        assert not train & test
    assert sum(len(hospital.train) for hospital in hospitals) == 40


def test_unconditional_shard_opens_without_labels(tmp_path):
    hospital_shard(tmp_path / "a", 30, 0, labels=np.zeros((30, 0), np.uint8))
    (hospital,) = open_hospitals(scenario("federation.hospitals=1"), tmp_path)
    assert hospital.train.batch(np.arange(2))[1].shape == (2, 0)
    parts = open_hospitals(scenario("federation.hospitals=2", "data.partition=dirichlet"), tmp_path)
    assert sum(len(part.train) for part in parts) == len(hospital.train)


def test_settings_that_do_not_match_the_data_are_clear_errors(root, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root is empty"):
        open_hospitals(scenario())
    with pytest.raises(DataError, match="no data at"):
        open_hospitals(scenario(), tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no shard"):
        open_hospitals(scenario(), tmp_path)
    with pytest.raises(DataError, match=r"--set federation\.hospitals=3"):
        open_hospitals(scenario("federation.hospitals=2"), root)
    with pytest.raises(DataError, match=r"32 pixels, fewer than data\.resolution = 64"):
        open_hospitals(scenario("data.resolution=64"), root)
    with pytest.raises(DataError, match="no rule for 'b'"):
        open_hospitals(scenario("data.label_map=normal=normal,a=a"), root)
    hospital_shard(tmp_path / "lone" / "a", 30, 0)
    with pytest.raises(DataError, match=r"raise data\.alpha"):
        open_hospitals(
            scenario("data.partition=dirichlet", "federation.hospitals=9", "data.alpha=0.001"),
            tmp_path / "lone",
        )


def test_incompatible_hospitals_are_named(tmp_path):
    hospital_shard(tmp_path / "a", 30, 0)
    hospital_shard(tmp_path / "b", 30, 0, label_names=("normal", "x", "y"))
    with pytest.raises(DataError, match="'a' and 'b' differ in label_names"):
        open_hospitals(scenario("federation.hospitals=2"), tmp_path)
    hospital_shard(tmp_path / "b", 30, 0, name="a", overwrite=True)
    with pytest.raises(DataError, match="same hospital name"):
        open_hospitals(scenario("federation.hospitals=2"), tmp_path)


def test_class_without_training_images_is_an_error(tmp_path):
    two = np.eye(3, dtype=np.uint8)[np.arange(30) % 2]
    hospital_shard(tmp_path / "a", 30, 0, labels=two)
    hospital_shard(tmp_path / "b", 30, 1, labels=two)
    with pytest.raises(DataError, match="no hospital holds the class 'b'"):
        open_hospitals(scenario("federation.hospitals=2"), tmp_path)
    assert (
        len(
            open_hospitals(
                scenario("federation.hospitals=2", "data.label_map=normal=normal,*=ill"), tmp_path
            )
        )
        == 2
    )
    assert (
        open_hospital(scenario(), tmp_path / "a").name == "a"
    )  # one shard is not compared with others
    hospital_shard(tmp_path / "c", 30, 2, splits=["test"] * 30)
    with pytest.raises(DataError, match="'c' has no image in its training split"):
        open_hospitals(scenario("federation.hospitals=3"), tmp_path)
    with pytest.raises(DataError, match="'c' has no image in its training split"):
        open_hospital(scenario(), tmp_path / "c")
