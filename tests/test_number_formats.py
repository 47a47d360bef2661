"""16-bit formats and changes on the wire: half the bytes, bounded rounding, no drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_federation import error_reply, federate, tiny, write_shards

from client.app import app
from client.wire import received_model
from fedgan import files
from fedgan.errors import ConfigError, FederationError
from fedgan.exchange.number_formats import DTYPES, make_update, pack, restore, unpack
from fedgan.run_folder import RunFolder
from fedgan.runs.compatibility import check_compatibility
from fedgan.runs.participants import Member
from fedgan.training.checkpoint import load_tensors
from fedgan.training.trainer import Trainer
from server.aggregation.weights import is_average
from server.records import check_reply, decode_replies, encode_messages, encoded_bytes, to_record

SHARE = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # relative rounding error
STEP = {"fp16": 2.0**-25, "bf16": 2.0**-134}  # half the smallest number
BITS16 = pytest.mark.parametrize("wire", ["fp16", "bf16"])
PARTS = ("generator/", "discriminator/", "ema/")

shapes = hnp.array_shapes(min_dims=1, max_dims=3, max_side=5)
weights = hnp.arrays(np.float32, shapes, elements=st.floats(-60000, 60000, width=32))


@pytest.fixture(autouse=True)
def identity() -> None:
    """Set the task identity that Flower's Message needs."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def arrays_of(run: RunFolder, round_number: int) -> dict[str, np.ndarray]:
    tensors, _ = load_tensors(run.checkpoint(round_number))
    return {key: tensor.numpy() for key, tensor in tensors.items() if key.startswith(PARTS)}


def message(arrays: dict[str, np.ndarray]) -> Message:
    return Message(
        RecordDict({"arrays": to_record(arrays), "config": ConfigRecord({"round": 3})}),
        100,
        "train",
    )


def reply(arrays: dict[str, np.ndarray]) -> Message:
    request = message({})
    request.metadata.__dict__["_message_id"] = "request"
    records = {"arrays": ArrayRecord({key: Array(value) for key, value in arrays.items()})}
    return Message(
        RecordDict(records | {"metrics": MetricRecord({"num_examples": 5})}), reply_to=request
    )  # type: ignore[arg-type]


# --- packing --------------------------------------------------------------------------------------


@given(hnp.arrays(np.uint16, shapes))
def test_packing_is_exact_for_representable_numbers(bits: np.ndarray) -> None:
    for wire, exact in (("fp16", bits.view(np.float16)), ("bf16", bits)):
        with np.errstate(invalid="ignore"):
            wide = unpack({"g/w": exact}, wire)["g/w"]
        wide = np.where(np.isfinite(wide), wide, np.float32(0))
        packed = pack({"g/w": wide}, wire)["g/w"]
        assert (packed.dtype, packed.shape) == (DTYPES[wire], bits.shape)
        assert np.array_equal(
            unpack({"g/w": packed}, wire)["g/w"].view(np.uint32), wide.view(np.uint32)
        )


@BITS16
@given(array=weights)
def test_rounding_error_is_bounded(wire: str, array: np.ndarray) -> None:
    found = unpack(pack({"g/w": array}, wire), wire)["g/w"]
    assert found.dtype == np.float32
    assert (
        np.abs(found.astype(np.float64) - array)
        <= SHARE[wire] * np.abs(array.astype(np.float64)) + STEP[wire]
    ).all()


def test_bf16_rounds_to_nearest_even() -> None:
    numbers = np.array([1.0, -2.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3e38], np.float32)
    assert pack({"w": numbers}, "bf16")["w"].tolist() == [
        0x3F80,
        0xC000,
        0x3F80,
        0x3F82,
        0x3F81,
        0x7F62,
    ]


def test_float32_is_not_copied() -> None:
    sent, trained = (
        {"w": np.array([0.1, np.nan], np.float32)},
        {"w": np.array([0.3, 1e38], np.float32)},
    )
    assert pack(sent, "fp32")["w"] is sent["w"]
    assert (
        restore(make_update(trained, sent, "fp32", False), sent, sent, "fp32", False)["w"]
        is trained["w"]
    )


@pytest.mark.parametrize(
    ("wire", "value", "text"),
    [
        ("fp16", 65520.0, "beyond the range of fp16: set federation.wire = 'bf16' or 'fp32'"),
        ("bf16", 3.4e38, "beyond the range of bf16: set federation.wire = 'fp32'"),
        ("fp16", np.nan, "not finite: the training diverged"),
        ("bf16", -np.inf, "not finite: the training diverged"),
    ],
)
def test_unrepresentable_number_is_an_error_with_the_array_name(
    wire: str, value: float, text: str
) -> None:
    good, bad = np.ones(3, np.float32), np.array([1, value], np.float32)
    with pytest.raises(FederationError) as caught:
        pack({"ema/good": good, "generator/bad": bad}, wire)
    assert str(caught.value).startswith("'generator/bad' ")
    assert text in str(caught.value)


def test_array_of_another_dtype_is_refused() -> None:
    with pytest.raises(
        FederationError,
        match=r"'ema/w' arrived as float32, but federation.wire = 'fp16' sends float16",
    ):
        unpack({"ema/w": np.ones(2, np.float32)}, "fp16")
    with pytest.raises(FederationError, match="arrived as float16"):
        received_model(
            message({"ema/w": np.ones(2, np.float16)}),
            tiny(Path("nowhere"), "federation.wire=bf16"),
        )


# --- the algebra ----------------------------------------------------------------------------------


@BITS16
@pytest.mark.parametrize("delta", [True, False])
@given(array=weights)
def test_unchanged_updates_leave_the_master_unchanged(
    wire: str, delta: bool, array: np.ndarray
) -> None:
    master = {"g/w": array}
    for _ in range(5):
        sent = unpack(pack(master, wire), wire)
        restored = restore(make_update(sent, sent, wire, delta), master, sent, wire, delta)
        assert restored["g/w"].dtype == np.float32
        assert np.array_equal(restored["g/w"], array)
        master = restored


@BITS16
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_mean_of_restored_models_is_the_mean_change(
    wire: str, seed: int, hospitals: int, scale: float, size: float
) -> None:
    rng = np.random.default_rng(seed)
    master = {"g/w": (scale * rng.standard_normal(50)).astype(np.float32)}
    sent = unpack(pack(master, wire), wire)
    trained = [
        {"g/w": sent["g/w"] + (size * rng.standard_normal(50)).astype(np.float32)}
        for _ in range(hospitals)
    ]
    models = [
        restore(make_update(model, sent, wire, True), master, sent, wire, True) for model in trained
    ]
    changes = [model["g/w"].astype(np.float64) - sent["g/w"] for model in trained]
    exact = master["g/w"] + np.mean(changes, axis=0)
    found = np.mean([model["g/w"].astype(np.float64) for model in models], axis=0)
    float32 = 2.0**-23 * max(np.abs(model["g/w"]).max() for model in [*trained, *models])
    assert (
        np.abs(found - exact)
        <= SHARE[wire] * np.mean(np.abs(changes), axis=0) + STEP[wire] + float32
    ).all()


@BITS16
def test_small_steps_accumulate_only_with_delta(wire: str) -> None:
    step = 100 * SHARE[wire] / 20  # below a tenth of half the gap at 100
    for delta, moved in ((True, 200), (False, 0)):
        master = {"mapping/w": np.full(3, 100.0, np.float32)}
        for _ in range(200):
            sent = unpack(pack(master, wire), wire)
            trained = {"mapping/w": sent["mapping/w"] + np.float32(step)}
            master = restore(make_update(trained, sent, wire, delta), master, sent, wire, delta)
        assert master["mapping/w"] == pytest.approx(100 + moved * step, abs=0.005 * 200 * step)


# --- server and hospitals -------------------------------------------------------------------------


def test_reply_is_checked_against_the_dtype_of_the_wire() -> None:
    member = Member(100, 0, "clinic", 10, ("a", "b"), True, 1, 16)
    sent = {"ema/w": np.ones(3, np.float32)}
    check_reply(member, reply({"ema/w": np.ones(3, np.float16)}), sent, "fp16")
    check_reply(member, reply({"ema/w": np.full(3, 0x3F80, np.uint16)}), sent, "bf16")
    with pytest.raises(
        FederationError, match=r"'ema/w' with float32 \(3,\), expected float16 \(3,\)"
    ):
        check_reply(member, reply(sent), sent, "fp16")
    with pytest.raises(
        FederationError, match=r"'ema/w' with uint16 \(2,\), expected uint16 \(3,\)"
    ):
        check_reply(member, reply({"ema/w": np.ones(2, np.uint16)}), sent, "bf16")
    for wire, bad in (
        ("fp16", np.float16(np.inf)),
        ("bf16", np.uint16(0x7FC0)),
        ("bf16", np.uint16(0xFF80)),
    ):
        with pytest.raises(FederationError, match="values that are not finite"):
            check_reply(member, reply({"ema/w": np.array([bad] * 3)}), sent, wire)


def test_server_refuses_to_send_an_unrepresentable_model(tmp_path: Path) -> None:
    settings = tiny(tmp_path, "federation.wire=fp16")
    master = {"ema/big": np.array([1e6], np.float32), "ema/w": np.ones(3, np.float32)}
    with pytest.raises(FederationError, match="'ema/big' holds a number beyond"):
        encode_messages(settings, [message(master)], master)
    sent = encode_messages(
        settings, [message({"ema/w": master["ema/w"]})], {"ema/w": master["ema/w"]}
    )[0]
    assert sent.content.array_records["arrays"]["ema/w"].numpy().dtype == np.float16
    assert dict(sent.content.config_records["config"]) == {"round": 3}
    assert (sent.metadata.dst_node_id, sent.metadata.message_type) == (100, "train")
    assert encoded_bytes(settings, master) == 8
    back = decode_replies(
        settings, [reply({"ema/w": np.full(3, 2, np.float16)})], {"ema/w": master["ema/w"]}
    )[0]
    assert back.content.array_records["arrays"]["ema/w"].numpy().tolist() == [2, 2, 2]
    assert back.content.metric_records["metrics"]["num_examples"] == 5


@pytest.mark.parametrize(
    "override", ["federation.wire=fp16", "federation.wire=bf16", "federation.delta=true"]
)
def test_clipping_at_the_hospital_needs_whole_float32_models(override: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"leave federation.wire = 'fp32' and federation.delta = false"
    ):
        check_compatibility(tiny(tmp_path, override, "privacy.client_level=client"))
    check_compatibility(tiny(tmp_path, override, "privacy.client_level=server"))


@pytest.mark.parametrize(
    ("strategy", "wire", "delta"),
    [
        ("fedavg", "bf16", True),
        ("fedavg", "fp16", False),
        ("fedavg", "fp32", True),
        ("fedmedian", "bf16", True),
        ("krum", "fp16", True),
        ("fedadam", "bf16", True),
    ],
)
def test_strategies_add_the_aggregated_change_to_the_master(
    strategy: str, wire: str, delta: bool, tmp_path: Path
) -> None:
    text = (
        f"federation.strategy={strategy}",
        f"federation.wire={wire}",
        f"federation.delta={str(delta).lower()}",
    )
    settings = tiny(write_shards(tmp_path / "data", (48, 24, 16)), *text, rounds=1, kimg=0.012)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    master, after = arrays_of(run, 0), arrays_of(run, 1)
    sent = unpack(pack(master, wire), wire)
    states = [
        load_tensors(run.hospital_state(name) / "state-00001.safetensors")[0]
        for name in ("alpha", "beta", "gamma")
    ]
    fits: list[np.ndarray] = []  # per array: whether each expectation is met
    for key in after:
        trained = np.stack([state[key].double().numpy() for state in states])
        change = trained - sent[key]
        mean = np.tensordot(np.array([24, 12, 8]) / 44, change, 1)
        match strategy:
            case "fedavg":
                expected = [mean]
            case "fedmedian":
                expected = [np.median(change, axis=0)]
            case "krum":
                expected = list(change)  # the model of one hospital
            case "fedadam" if is_average(key):  # the optimiser does not change averages
                expected = [mean]
            case "fedadam":
                expected = [
                    0.01
                    * np.sqrt(1 - 0.99**2)
                    / (1 - 0.9**2)
                    * 0.1
                    * mean
                    / (0.1 * np.abs(mean) + 1e-3)
                ]
        # rounding on the way up: of the change with delta, else of the model
        slack = SHARE.get(wire, 0) * np.abs(change if delta else trained).max(axis=0) + 1e-6 * (
            1 + np.abs(master[key])
        )
        fits.append(
            np.array([(np.abs(after[key] - master[key] - one) <= slack).all() for one in expected])
        )
        assert after[key].dtype == np.float32
    assert np.all(fits, axis=0).any()


def test_rounds_without_training_keep_the_model_on_any_wire(tmp_path: Path) -> None:
    data, models = write_shards(tmp_path / "data", (16, 16)), []
    for number, text in enumerate(
        ([], ["federation.wire=bf16", "federation.delta=true"], ["federation.wire=fp16"])
    ):
        run = RunFolder.at(tmp_path / str(number))
        federate(
            tiny(data, *text, "training.learning_rate=0", hospitals=2, rounds=3, kimg=0.024),
            run,
            app,
        )
        models.append(arrays_of(run, 3))
    still = [key for key in models[0] if not key.startswith("ema/") and not key.endswith("w_avg")]
    assert len(still) > 20
    for rounded in models[1:]:
        assert all(np.array_equal(models[0][key], rounded[key]) for key in still)


def test_sixteen_bit_wires_halve_the_counted_bytes(tmp_path: Path) -> None:
    data, counted = write_shards(tmp_path / "data", (16, 16)), {}
    for wire in ("fp32", "fp16", "bf16"):
        run = RunFolder.at(tmp_path / wire)
        federate(
            tiny(
                data,
                f"federation.wire={wire}",
                "federation.delta=true",
                hospitals=2,
                rounds=2,
                kimg=0.016,
            ),
            run,
            app,
        )
        counted[wire] = [line["bytes_exchanged"] for line in files.read_json_lines(run.metrics)]
    numbers = sum(array.size for array in arrays_of(run, 2).values())
    # two hospitals, two directions, four bytes
    assert counted["fp32"] == [16 * numbers, 32 * numbers]
    assert counted["fp16"] == counted["bf16"] == [8 * numbers, 16 * numbers]


def test_resumed_run_with_bf16_changes_equals_an_unbroken_run(tmp_path: Path) -> None:
    text = ("federation.wire=bf16", "federation.delta=true")
    settings = tiny(
        write_shards(tmp_path / "data", (24, 16)), *text, hospitals=2, rounds=3, kimg=0.024
    )
    whole, broken = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "broken")
    federate(settings, whole, app)

    def fault(number: int, request: Message) -> Message | None:
        last = request.content.config_records["config"].get("round") == 3
        return error_reply(request, "gone") if last and number == 1 else None

    with pytest.raises(FederationError, match="in round 3"):
        federate(settings, broken, app, fault)
    federate(settings, broken, app)
    one, other = arrays_of(whole, 3), arrays_of(broken, 3)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_model_beyond_fp16_stops_the_run_which_can_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (16, 16)),
        "federation.wire=fp16",
        hospitals=2,
        rounds=2,
        kimg=0.016,
    )
    run = RunFolder.at(tmp_path / "run")
    original = Trainer.get_parameters

    def oversized(trainer: Trainer, parts: object) -> dict[str, np.ndarray]:
        arrays = original(trainer, parts)  # type: ignore[arg-type]
        if trainer.stream == 1 and trainer.images_seen > 4:
            arrays["generator/mapping.w_avg"] += 1e6
        return arrays

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "get_parameters", oversized)
        with pytest.raises(FederationError) as caught:
            federate(settings, run, app)
    assert str(caught.value) == (
        "hospital 2 ('beta') failed in round 2: "
        "FederationError while encoding its update for federation.wire"
    )
    client_log = (run.hospital_state("beta") / "client.log").read_text()
    assert (
        "'generator/mapping.w_avg' holds a number beyond the range of fp16: "
        "set federation.wire = 'bf16' or 'fp32'" in client_log
    )
    assert run.last_round() == 1
    assert [line["round"] for line in files.read_json_lines(run.metrics)] == [1]
    run.write_settings(
        tiny(tmp_path / "data", "federation.wire=bf16", hospitals=2, rounds=2, kimg=0.016)
    )
    federate(run.settings(), run, app)
    assert run.last_round() == 2
