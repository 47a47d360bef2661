"""Image packs (.npz) in two layouts. Images are streamed from the archive.

fedgan: `images` (N, H, W) or (N, H, W, C) uint8 and, optionally, `label`, `institution`, `split` (0
train, 1 test), `patient`, `name`. A JSON with the same stem ("labels", "institutions",
"split_codes") or arrays of these names decode the codes. MedMNIST (arXiv 2110.14795):
`train_images`, `train_labels`, and the same for `val` and `test`.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedgan.data.importers.source import Source, read_split
from fedgan.data.labels import MAX_LABELS
from fedgan.errors import DataError, FedganError
from fedgan.files import parse_json

MAX_IMAGES, MAX_PIXELS = 2**24, 2**26
MAX_COLUMN_BYTES = 2**30  # labels, patients and other columns, which are read as a whole


def read_npz(file: str | Path, name: str = "") -> Source:
    """Read the rows of an .npz pack.

    `name` is the institution if the pack names none (default: the file stem). Raises `DataError`
    for a missing or damaged file, arrays that do not match, and a label code outside the card.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise DataError(f"no file at {file}: give the path of an .npz pack")
    try:
        pack = _Pack(file)
        card = _card(file, pack)
        medmnist = "train_images" in pack.files
        if not medmnist and "images" not in pack.files:
            raise DataError(
                f"{file} holds neither 'images' nor 'train_images': it is no image pack in a known "
                "layout"
            )
        return (_medmnist if medmnist else _own_layout)(file, pack, card, name or file.stem)
    except FedganError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy and codecs raise many kinds
        raise _damage_error(file, error) from None


def _own_layout(file: Path, pack: _Pack, card: Mapping[str, Any], name: str) -> Source:
    shape = _image_shape(file, "images")
    count = shape[0]

    def column(key: str) -> np.ndarray | None:
        if key not in pack.files:
            return None
        values = np.asarray(pack[key])
        if len(values) != count:
            raise DataError(f"{file}: '{key}' has {len(values)} entries for {count} images")
        return values

    labels, names, exclusive = _labels(file, column("label"), card.get("labels"))
    split = column("split")
    return _source(
        file,
        [("images", shape)],
        card,
        labels=labels,
        label_names=names,
        exclusive=exclusive,
        patients=_texts(column("patient"), count),
        institutions=_decode(
            file, "institution", column("institution"), card.get("institutions"), count, name
        ),
        given=None if split is None else _splits(file, split, card.get("split_codes")),
        names=_texts(column("name"), count),
    )


def _medmnist(file: Path, pack: _Pack, card: Mapping[str, Any], name: str) -> Source:
    splits = [split for split in ("train", "val", "test") if f"{split}_images" in pack.files]
    shapes = [_image_shape(file, f"{split}_images") for split in splits]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise DataError(f"{file}: the splits hold images of different sizes")
    codes = [np.asarray(pack[f"{split}_labels"]) for split in splits]
    for split, shape, code in zip(splits, shapes, codes, strict=True):
        if len(code) != shape[0]:
            raise DataError(
                f"{file}: '{split}_labels' has {len(code)} entries for {shape[0]} images"
            )
    labels, names, exclusive = _labels(file, np.concatenate(codes), card.get("labels"))
    count = len(labels)
    return _source(
        file,
        [(f"{split}_images", shape) for split, shape in zip(splits, shapes, strict=True)],
        card,
        labels=labels,
        label_names=names,
        exclusive=exclusive,
        patients=np.full(count, ""),
        institutions=np.full(count, name),
        given=np.repeat(splits, [shape[0] for shape in shapes]),
        names=np.array(
            [f"{s}/{i}" for s, shape in zip(splits, shapes, strict=True) for i in range(shape[0])],
            dtype=str,
        ),
    )


def _source(
    file: Path,
    members: Sequence[tuple[str, tuple[int, ...]]],
    card: Mapping[str, Any],
    **columns: Any,
) -> Source:
    def images() -> Iterator[np.ndarray]:
        for key, _ in members:
            yield from _stream(file, key)

    shape = members[0][1]
    licence = card.get("licence", card.get("license", ""))
    licences = dict.fromkeys(
        np.unique(columns["institutions"]).tolist(), licence if isinstance(licence, str) else ""
    )
    for entry in card.get("provenance", []) if isinstance(card.get("provenance"), list) else []:
        if isinstance(entry, dict) and entry.get("institution") in licences:
            licences[entry["institution"]] = str(entry.get("data_licence", licence))
    return Source(
        title=str(card.get("title", file.name)),
        images=images,
        size=(shape[2], shape[1]),
        colour=len(shape) == 4 and shape[3] == 3,
        licences=licences,
        skip_duplicates=False,  # packs are curated: duplicates are kept and counted in the card
        **columns,
    )


# --- codes and names -----------------------------------------------------------------------------


def _card(file: Path, pack: _Pack) -> dict[str, Any]:
    """Read the names of the codes from the JSON beside the pack, else from its arrays."""
    beside = file.with_suffix(".json")
    card: dict[str, Any] = {}
    if beside.is_file():
        try:
            card = parse_json(beside.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{beside} (the card of {file.name}) is damaged: {error}") from None
        if not isinstance(card, dict):
            raise DataError(f"{beside} (the card of {file.name}) must hold a JSON object")
    for key in ("labels", "institutions", "split_codes"):
        if key not in card and key in pack.files:
            card[key] = [str(value) for value in np.atleast_1d(pack[key])]
    for key in ("labels", "institutions", "split_codes"):
        if isinstance(card.get(key), dict):  # MedMNIST: {"0": "name", …}
            try:
                card[key] = [card[key][str(code)] for code in range(len(card[key]))]
            except KeyError:
                raise DataError(
                    f"{beside}: '{key}' must name the codes 0, 1, 2, … without a gap"
                ) from None
        if key in card:
            card[key] = [str(value) for value in card[key]]
    return card


def _labels(
    file: Path, codes: np.ndarray | None, names: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Multi-hot labels (N, K), names, whether they are exclusive; K = 0 without labels."""
    if codes is None:
        return np.zeros((_image_shape(file, "images")[0], 0), np.uint8), (), True
    if codes.dtype.kind in "US":
        found, codes = np.unique(codes.astype(str), return_inverse=True)
        if names is None:
            names = found.tolist()
        outside = [value for value in found.tolist() if value not in names]
        if outside:
            raise DataError(
                f"{file}: the label '{outside[0]}' is not in the card: add it to \"labels\" or "
                "correct the pack"
            )
        codes = np.array([names.index(value) for value in found.tolist()])[codes]
    if codes.dtype.kind not in "iub":
        raise DataError(f"{file}: labels must be whole numbers or texts, not {codes.dtype}")
    if codes.ndim == 2 and codes.shape[1] > 1:
        names = names or [f"class-{code}" for code in range(codes.shape[1])]
        if len(names) != codes.shape[1] or codes.min(initial=0) < 0 or codes.max(initial=0) > 1:
            raise DataError(
                f"{file}: {codes.shape[1]} label columns of 0 and 1 must match the {len(names)} "
                "labels of the card"
            )
        return codes.astype(np.uint8), tuple(names), False
    codes = codes.reshape(len(codes)).astype(np.int64)
    most = int(codes.max(initial=0)) + 1 if names is None else len(names)
    if most > MAX_LABELS or len(codes) * most > MAX_COLUMN_BYTES:
        raise DataError(
            f"{file}: {most} labels for {len(codes)} images, at most {MAX_LABELS} are possible: "
            "is 'label' a column of label codes?"
        )
    names = names or [f"class-{code}" for code in range(most)]
    if len(codes) and (codes.min() < 0 or codes.max() >= len(names)):
        wrong = int(((codes < 0) | (codes >= len(names))).sum())
        raise DataError(
            f"{file}: {wrong} images have a label code outside the card's {len(names)} labels: "
            "correct the card or the pack"
        )
    labels = np.zeros((len(codes), len(names)), np.uint8)
    labels[np.arange(len(codes)), codes] = 1
    return labels, tuple(names), True


def _decode(
    file: Path,
    key: str,
    codes: np.ndarray | None,
    names: list[str] | None,
    count: int,
    default: str,
) -> np.ndarray:
    if codes is None:
        return np.full(count, default)
    if codes.dtype.kind in "US":
        return codes.astype(str)
    if names is None:
        return np.char.add(f"{key}-", codes.astype(str))
    if (
        codes.dtype.kind not in "iub"
        or codes.min(initial=0) < 0
        or codes.max(initial=0) >= len(names)
    ):
        raise DataError(
            f"{file}: '{key}' holds a code outside the card's {len(names)} names: correct the card "
            "or the pack"
        )
    return np.array(names, dtype=str)[codes]


def _splits(file: Path, codes: np.ndarray, names: list[str] | None) -> np.ndarray:
    texts = _decode(file, "split", codes, names or ["train", "test", "val"], len(codes), "")
    names_of = {text: read_split(text) for text in np.unique(texts).tolist()}
    return np.array([names_of[text] for text in texts.tolist()], dtype=str)


def _texts(values: np.ndarray | None, count: int) -> np.ndarray:
    return np.full(count, "") if values is None else values.astype(str)


# --- the archive ---------------------------------------------------------------------------------


class _Pack:
    """The arrays of an archive by name, each of at most `MAX_COLUMN_BYTES`. No pickle is read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        self.files = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]

    def __getitem__(self, key: str) -> np.ndarray:
        with zipfile.ZipFile(self.file) as archive, archive.open(f"{key}.npy") as stream:
            shape, fortran, dtype = _header(archive, stream, key)
            size = math.prod(shape) * dtype.itemsize
            if size > MAX_COLUMN_BYTES:
                raise DataError(f"{self.file}: '{key}' has {size} bytes, too many for a column")
            array = np.frombuffer(stream.read(size), dtype)
        return array.reshape(shape, order="F" if fortran else "C")


def _header(
    archive: zipfile.ZipFile, stream: Any, key: str
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype. Raises `EOFError` unless they give the size."""
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("Object arrays are not read")
    if dtype.kind not in "biufUS":
        raise ValueError(f"an array of {dtype}")
    size = stream.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or archive.getinfo(f"{key}.npy").file_size != size:
        raise EOFError("the array's size is not that of its header")
    return shape, fortran, dtype


def _open_images(
    file: Path, archive: zipfile.ZipFile, stream: Any, key: str
) -> tuple[tuple[int, ...], bool]:
    """Shape of an array of images, and whether it is in Fortran order; `DataError` for others."""
    shape, fortran, dtype = _header(archive, stream, key)
    if (
        dtype != np.uint8
        or len(shape) not in (3, 4)
        or (len(shape) == 4 and shape[3] not in (1, 3))
    ):
        raise DataError(
            f"{file}: '{key}' is {dtype} {shape}: images must be uint8 of (N, H, W), "
            "(N, H, W, 1) or (N, H, W, 3)"
        )
    if shape[0] > MAX_IMAGES or not 0 < shape[1] * shape[2] <= MAX_PIXELS:
        raise DataError(
            f"{file}: '{key}' is {shape}: at most {MAX_IMAGES} images of 1 to {MAX_PIXELS} pixels "
            "are read"
        )
    return shape, fortran


def _image_shape(file: Path, key: str) -> tuple[int, ...]:
    with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
        return _open_images(file, archive, stream, key)[0]


def _stream(file: Path, key: str) -> Iterator[np.ndarray]:
    """Yield the images of one array of the archive, (H, W) or (H, W, 3) uint8."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
            shape, fortran = _open_images(file, archive, stream, key)
            if fortran:  # the first axis is the fastest, so rows cannot be streamed
                yield from (_squeeze(image) for image in _Pack(file)[key])
                return
            size = math.prod(shape[1:])
            for _ in range(shape[0]):
                data = stream.read(size)
                if len(data) < size:
                    raise EOFError("the array ends early")
                yield _squeeze(np.frombuffer(data, np.uint8).reshape(shape[1:]))
    except FedganError:
        raise
    except Exception as error:
        raise _damage_error(file, error) from None


def _squeeze(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _damage_error(file: Path, error: Exception) -> DataError:
    if "allow_pickle" in str(error) or "Object arrays" in str(error):
        return DataError(
            f"{file} holds Python objects (pickle), which are not read: save its arrays as numbers "
            "and fixed-width text"
        )
    return DataError(f"{file} is truncated or damaged ({type(error).__name__}): download it again")
