"""Extractors from weights files: identification, errors, and the cache of real features."""

from __future__ import annotations

import json
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torchvision.models import densenet121, inception_v3

from fedgan.data.dataset import Rows
from fedgan.errors import ConfigError, DataError, FedganError, MachineError, StorageError
from fedgan.evaluation import feature_cache
from fedgan.evaluation.extractors import inception, xray
from fedgan.evaluation.feature_cache import FeatureCache, images_hash
from fedgan.evaluation.features import (
    InceptionExtractor,
    ReferenceExtractor,
    SqueezeNetExtractor,
    XrayExtractor,
    check_features,
    extractor_from,
    squeezenet_shapes,
)
from fedgan.models.classifiers import build_classifier


def _random_state(build, seed=0):
    """A state dict of plausible random weights: He-normal kernels, neutral batch norms."""
    with torch.device("meta"):
        shapes = build().state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in shapes.items():
        if value.ndim > 1:
            state[name] = (
                torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
            )
        elif name.endswith(("weight", "running_var")):
            state[name] = torch.ones(value.shape)
        else:
            state[name] = torch.zeros(value.shape, dtype=value.dtype)
    return state


def _images(count, channels, side, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (count, channels, side, side), dtype=np.uint8
    )


# --- Inception-v3 -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_state():
    return _random_state(lambda: inception_v3(weights=None, init_weights=False))


@pytest.fixture(scope="module")
def inception_file(inception_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_state, path)
    return path


@pytest.fixture(scope="module")
def extractor(inception_file):
    return extractor_from(str(inception_file))


def test_inception_is_identified_by_content_and_is_fid(extractor):
    assert isinstance(extractor, InceptionExtractor)
    assert extractor.name == "Inception-v3 (torchvision, ImageNet, pool3, 2048)"
    assert extractor.is_fid
    assert not SqueezeNetExtractor.is_fid
    assert not XrayExtractor.is_fid
    assert not ReferenceExtractor(build_classifier("small-cnn", 1, 32, 2)).is_fid


def test_inception_agrees_with_torchvision_preprocessing(extractor, inception_state):
    network = inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    network.load_state_dict(inception_state)
    network.fc = torch.nn.Identity()
    images = _images(2, 3, 299)
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    with torch.inference_mode():
        expected = network((torch.from_numpy(images) / 255 - mean) / std).numpy()
    assert expected.std() > 1e-3
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-3, atol=1e-4 * expected.std())


def test_inception_features_do_not_depend_on_batch_or_grey_repetition(extractor, inception_state):
    images = _images(3, 1, 24)
    features = extractor(images)
    assert features.shape == (3, 2048)
    assert features.dtype == np.float64
    assert np.array_equal(extractor(images), features)
    colour = extractor_from_state(inception_state, batch=2)(np.repeat(images, 3, axis=1))
    np.testing.assert_allclose(colour, features, rtol=1e-3, atol=1e-4 * features.std())
    assert extractor(images[:0]).shape == (0, 2048)


def extractor_from_state(state, batch):
    return InceptionExtractor(state, "weights of the test", batch=batch)


def test_opening_weights_keeps_the_random_state(inception_file):
    before = torch.random.get_rng_state()
    check_features(inception_file)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_extractor_key_depends_on_weights_not_file(extractor, inception_state, tmp_path):
    kept = {
        name: value
        for name, value in inception_state.items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(
        kept, tmp_path / "weights.bin"
    )  # neither the name nor the counters of batch norm matter
    same = extractor_from(tmp_path / "weights.bin")
    assert same.key == extractor.key
    assert same.key.startswith(f"{same.name} sha256:")
    name = "Mixed_7c.branch1x1.bn.bias"
    other = extractor_from_state({**inception_state, name: inception_state[name] + 1e-3}, batch=1)
    assert other.key != extractor.key


def test_checkpoint_with_a_state_dict_is_opened(inception_state, extractor, tmp_path):
    torch.save({"epoch": 3, "state_dict": inception_state}, tmp_path / "checkpoint.pt")
    assert extractor_from(tmp_path / "checkpoint.pt").key == extractor.key


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_inception_file_with_a_bad_weight_raises_a_data_error(inception_state, tmp_path, damage):
    state, name = dict(inception_state), "Conv2d_1a_3x3.conv.weight"
    if damage == "missing":
        del state[name]
    else:
        state[name] = (
            torch.zeros(32, 1, 3, 3) if damage == "shape" else torch.full((32, 3, 3, 3), torch.nan)
        )
    with pytest.raises(
        DataError, match=r"no Inception-v3 weights file \('Conv2d_1a_3x3\.conv\.weight' should be"
    ):
        InceptionExtractor(state, tmp_path / "weights.pth")


def test_tensorflow_inception_is_refused_with_the_reason(tmp_path):
    torch.save(
        {inception.MARK: torch.zeros(1), "fc.weight": torch.zeros(1008, 1)}, tmp_path / "fid.pth"
    )
    with pytest.raises(
        DataError, match=r"1008 classes.*TensorFlow.*inception_v3_google-0cc3c7bd\.pth"
    ):
        check_features(tmp_path / "fid.pth")
    torch.save({inception.MARK: torch.zeros(1)}, tmp_path / "headless.pth")
    with pytest.raises(DataError, match="no classes instead of 1000"):
        check_features(tmp_path / "headless.pth")


# --- files that are none ------------------------------------------------------------------------


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import sys; sys.payload_ran = True",))


def test_missing_weights_error_names_file_and_source(tmp_path):
    message = (
        r"no weights file at .*nothing\.pth, none is downloaded"
        r".*download\.pytorch\.org/models/inception_v3_google"
    )
    with pytest.raises(ConfigError, match=message):
        check_features(str(tmp_path / "nothing.pth"))
    with pytest.raises(ConfigError, match="no weights file at"):
        check_features(tmp_path)
    with pytest.raises(
        ConfigError, match=r"'xrv' needs the path of a weights file.*\n.*densenet121-res224-all"
    ):
        check_features("xrv")


def test_reference_extractor_needs_no_file():
    check_features("reference")


@pytest.mark.parametrize(
    "kind",
    ["empty", "text", "truncated", "npy", "safetensors", "unsafe", "module", "list", "no tensors"],
)
def test_unreadable_weights_raise_one_line_and_run_no_code(tmp_path, kind):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "npy":
        with open(path, "wb") as stream:
            np.save(stream, np.zeros(3))
    elif kind == "safetensors":
        path.write_bytes((20).to_bytes(8, "little") + b'{"weight": "nothing"}')
    elif kind == "unsafe":
        path.write_bytes(pickle.dumps({"weight": Payload()}))
    elif kind == "module":
        torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    else:
        torch.save([torch.zeros(2)] if kind == "list" else {"weight": 3}, path)
    with pytest.raises(DataError, match=r"weights\.pth (is damaged|holds)") as caught:
        extractor_from(path)
    assert "\n" not in str(caught.value)
    assert not hasattr(sys, "payload_ran")
    if kind == "module":
        assert "pickled objects" in str(caught.value)


def test_other_network_error_lists_the_supported_ones(tmp_path):
    torch.save(build_classifier("resnet18", 3, 32, 2).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(
        DataError, match=r"none of the networks.*Inception-v3.*SqueezeNet.*torchxrayvision"
    ):
        check_features(tmp_path / "resnet.pth")


def test_squeezenet_is_identified_by_content(tmp_path):
    rng = np.random.default_rng(0)
    with open(tmp_path / "weights.bin", "wb") as stream:
        np.savez(
            stream,
            **{name: 0.1 * rng.normal(size=shape) for name, shape in squeezenet_shapes().items()},
        )
    extractor = extractor_from(tmp_path / "weights.bin")
    assert isinstance(extractor, SqueezeNetExtractor)
    assert extractor.key.startswith("SqueezeNet v1.0 ImageNet")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "weights.bin").read_bytes()[:5000])
    with pytest.raises(DataError, match="not a SqueezeNet"):
        check_features(tmp_path / "cut.npz")


def test_two_channels_raise_a_data_error(extractor):
    with pytest.raises(DataError, match="1 or 3 channels, not 2"):
        extractor(np.zeros((1, 2, 8, 8), np.uint8))


# --- torchxrayvision ----------------------------------------------------------------------------


def test_missing_xray_package_error_names_the_extra(tmp_path, monkeypatch):
    torch.save(
        {
            xray.MARK: torch.zeros(1),
            "features.conv0.weight": torch.zeros(64, 1, 7, 7),
            "classifier.weight": torch.zeros(18, 1024),
        },
        tmp_path / "xray.pth",
    )
    monkeypatch.setitem(sys.modules, "torchxrayvision", None)
    with pytest.raises(MachineError, match=r"pip install 'fedgan\[xray\]'"):
        check_features(tmp_path / "xray.pth")


def test_torchvision_densenet_is_refused_as_xray_network(tmp_path):
    state = _random_state(lambda: densenet121(weights=None))
    with pytest.raises(DataError, match="not torchxrayvision"):
        XrayExtractor(state, tmp_path / "densenet121.pth")


def test_xray_features_agree_with_torchxrayvision(tmp_path):
    package = pytest.importorskip("torchxrayvision", reason="the extra 'xray' is not installed")
    state = _random_state(lambda: package.models.DenseNet(weights=None))
    network = package.models.DenseNet(weights=None).eval()
    network.load_state_dict(state)
    torch.save(
        {**state, "op_threshs": torch.zeros(18)}, tmp_path / "xray.pth"
    )  # its published networks have thresholds
    extractor = extractor_from(tmp_path / "xray.pth")
    images = _images(3, 1, 224)
    prepared = package.datasets.normalize(images.astype(np.float32), 255)
    with torch.inference_mode():
        expected = network.features2(torch.from_numpy(prepared)).numpy()
    features = extractor(images)
    assert isinstance(extractor, XrayExtractor)
    assert features.shape == (3, 1024)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4 * expected.std())
    colour = XrayExtractor(state, tmp_path / "xray.pth", batch=2)(np.repeat(images, 3, axis=1))
    np.testing.assert_allclose(colour, features, rtol=1e-2, atol=1e-3 * expected.std())
    with pytest.raises(DataError, match="no torchxrayvision DenseNet-121"):
        XrayExtractor({**state, "features.norm5.bias": torch.zeros(3)}, tmp_path / "xray.pth")


def test_xray_import_keeps_the_warning_filters(tmp_path, monkeypatch):
    pytest.importorskip("torchxrayvision", reason="the extra 'xray' is not installed")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchxrayvision"]:
        monkeypatch.delitem(sys.modules, name)
    before = list(warnings.filters)
    xray._torchxrayvision(tmp_path / "xray.pth")
    assert list(warnings.filters) == before


# --- the reference classifier's key -------------------------------------------------------------


def test_reference_key_depends_on_its_weights():
    def key(seed):
        torch.manual_seed(seed)
        return ReferenceExtractor(build_classifier("small-cnn", 1, 32, 2)).key

    with torch.random.fork_rng(devices=[]):
        assert key(0) == key(0) != key(1)


# --- the cache ----------------------------------------------------------------------------------


@given(
    count=st.integers(0, 9),
    block=st.integers(1, 400),
    place=st.integers(0, 10_000),
    by=st.integers(1, 255),
)
@settings(max_examples=40)
def test_images_hash_depends_on_every_byte_and_not_on_blocks(count, block, place, by):
    images = _images(count, 2, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "BLOCK_BYTES", block)
        found = images_hash(images)
    assert found == images_hash(images)
    assert found != images_hash(images.reshape(count, 1, 8, 4))
    if count:
        changed = images.copy()
        changed.reshape(-1)[place % images.size] ^= np.uint8(by)
        assert images_hash(changed) != found


def test_images_hash_is_equal_for_memory_maps_and_views(tmp_path):
    images = _images(7, 1, 5)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert images_hash(mapped) == images_hash(images)
    rows = np.array([4, 1, 6])
    assert images_hash(Rows(mapped, rows)) == images_hash(images[rows])


class Counter:
    """An extractor that counts its calls."""

    name, is_fid = "counter", False

    def __init__(self, key="counter sha256:0", scale=1.0):
        self.key, self.scale, self.calls = key, scale, 0

    def __call__(self, images):
        self.calls += 1
        return images.reshape(len(images), -1)[:, :3] * self.scale


def test_cached_features_are_computed_once(tmp_path):
    cache, extractor, images = FeatureCache(tmp_path / "cache"), Counter(), _images(5, 1, 4)
    first = cache.features(images, extractor)
    again = FeatureCache(tmp_path / "cache").features(images.copy(), extractor)
    assert extractor.calls == 1
    assert first.dtype == again.dtype == np.float64
    assert np.array_equal(first, again)
    cache.features(_images(5, 1, 4, seed=1), extractor)
    assert extractor.calls == 2
    other = Counter("counter sha256:1", scale=2.0)
    assert np.array_equal(cache.features(images, other), 2 * first)


def test_cache_entry_holds_only_hashes_and_extractor(tmp_path):
    cache, images = FeatureCache(tmp_path), _images(5, 1, 4)
    cache.features(images, Counter())
    path = cache.path(images_hash(images), Counter().key)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        path.with_suffix(".json").name,
        path.name,
    ]
    entry = json.loads(path.with_suffix(".json").read_text())
    assert set(entry) == {"format", "images", "extractor", "sha256"}
    assert entry["images"] == images_hash(images)
    assert entry["extractor"] == "counter sha256:0"


@pytest.mark.parametrize(
    "damage",
    ["cut", "flipped", "empty", "gone", "no json", "torn json", "list", "foreign", "pickle"],
)
def test_damaged_cache_entry_is_replaced(tmp_path, damage):
    cache, extractor, images = FeatureCache(tmp_path), Counter(), _images(5, 1, 4)
    features = cache.features(images, extractor)
    path = cache.path(images_hash(images), extractor.key)
    side, data = path.with_suffix(".json"), path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-5])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gone":
        path.unlink()
    elif damage == "no json":
        side.unlink()
    elif damage == "torn json":
        side.write_text(side.read_text()[:20])
    elif damage == "list":
        side.write_text("[]")
    elif damage == "foreign":
        side.write_text(json.dumps({**json.loads(side.read_text()), "images": "0" * 64}))
    else:
        np.save(path, np.array([Payload()]), allow_pickle=True)
    assert np.array_equal(cache.features(images, extractor), features)
    assert extractor.calls == 2
    assert np.array_equal(cache.features(images, extractor), features)
    assert extractor.calls == 2
    assert not hasattr(sys, "payload_ran")


def test_unwritable_cache_folder_raises_a_storage_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        FeatureCache(tmp_path / "cache").features(_images(2, 1, 4), Counter())


def test_extractor_error_leaves_no_cache_entry(tmp_path):
    def fail():
        raise FedganError("no features")

    with pytest.raises(FedganError, match="no features"):
        FeatureCache(tmp_path / "cache").get("0", "1", fail)
    assert not (tmp_path / "cache").exists()
