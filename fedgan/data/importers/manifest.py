"""CSV manifest: one row per image with path, label column(s), patient, institution, split."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgan.data.importers.folder import decode_images, read_headers, refuse_outside
from fedgan.data.importers.source import Skipped, Source, read_split
from fedgan.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Column names of the manifest. Empty: the column `patient`, `institution`, `split`, if any.

    One label column contains a class name per row, several contain 0 or 1 each; without a label
    column the data is unconditional.
    """

    path: str = "path"
    labels: tuple[str, ...] = ("label",)
    patient: str = ""
    institution: str = ""
    split: str = ""


def read_manifest(
    file: str | Path,
    columns: Columns | None = None,
    root: str | Path | None = None,
    name: str = "",
    outside: bool = False,
) -> Source:
    """Read the rows of the CSV (or .tsv) `file`.

    Image paths are relative to `root` (default: the folder of `file`). `name` is the institution if
    no column names it (default: the file stem). Rows without a label, with a cell that is neither 0
    nor 1, or without a split if there is a split column are skipped. `outside`: paths and links may
    lead out of `root`. Raises `DataError` for a missing file or column, and for such a path.
    """
    file, columns = Path(file).expanduser(), columns or Columns()
    base = Path(root).expanduser() if root else file.parent
    table = _read(file)
    count = len(table[next(iter(table))])
    reasons: list[str] = [""] * count
    paths = _column(file, table, columns.path, "--path-column")
    labels, label_names, exclusive = _labels(file, table, columns.labels, reasons)
    institutions = _optional(file, table, columns.institution, "institution")
    patients = _optional(file, table, columns.patient, "patient")
    splits = _optional(file, table, columns.split, "split")
    given = None if splits is None else np.array([read_split(text) for text in splits], dtype=str)
    for row in range(count):
        if not paths[row]:
            reasons[row] = reasons[row] or "no path"
        if given is not None and not given[row]:
            reasons[row] = reasons[row] or "no split"
    if given is not None:
        given[given == ""] = "train"  # a placeholder: these rows are skipped
    files: list[Path | Skipped] = [
        Skipped(reason) if reason else base / path
        for path, reason in zip(paths, reasons, strict=True)
    ]
    if not outside:
        refuse_outside(base, files)
    size, colour = read_headers(files)
    return Source(
        title=file.name,
        labels=labels,
        label_names=label_names,
        exclusive=exclusive,
        patients=np.array(patients or [""] * count, dtype=str),
        institutions=np.array(institutions or [name or file.stem] * count, dtype=str),
        given=given,
        names=np.array(paths, dtype=str),
        images=lambda: decode_images(files),
        size=size,
        colour=colour,
    )


def _read(file: Path) -> dict[str, list[str]]:
    """Read the table as columns of stripped text."""
    if not file.is_file():  # a pipe would block
        raise DataError(f"no file at {file}: give the path of a CSV manifest")
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(
                csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no readable CSV: {error}") from None
    header, body = (
        [cell.strip() for cell in rows[0]] if rows else [],
        [row for row in rows[1:] if any(row)],
    )
    if not body:
        raise DataError(f"{file} has no row below its header")
    if len(set(header)) != len(header):
        raise DataError(f"{file}: the header repeats a column name: rename one")
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise DataError(
                f"{file}: row {number} has {len(row)} cells for {len(header)} columns: correct the "
                "row or quote its commas"
            )
    return {
        name: [cell.strip() for cell in column]
        for name, column in zip(header, zip(*body, strict=True), strict=True)
    }


def _column(file: Path, table: dict[str, list[str]], name: str, option: str) -> list[str]:
    if name not in table:
        near = difflib.get_close_matches(name, list(table), n=1)
        hint = (
            f"; did you mean '{near[0]}'?"
            if near
            else f": name one of {', '.join(table)} with {option}"
        )
        raise DataError(f"{file} has no column '{name}'{hint}")
    return table[name]


def _optional(file: Path, table: dict[str, list[str]], name: str, default: str) -> list[str] | None:
    """The column `name`, which must exist; if it is empty the column `default` or None."""
    return _column(file, table, name, f"--{default}-column") if name else table.get(default)


def _labels(
    file: Path, table: dict[str, list[str]], names: Sequence[str], reasons: list[str]
) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Labels (N, K), their names, whether they are exclusive; fills `reasons` of skipped rows."""
    columns = [_column(file, table, name, "--label-column") for name in names]
    count = len(reasons)
    if not columns:
        return np.zeros((count, 0), np.uint8), (), True
    if len(columns) == 1:
        classes = sorted({cell for cell in columns[0] if cell})
        labels = np.zeros((count, len(classes)), np.uint8)
        for row, cell in enumerate(columns[0]):
            if cell:
                labels[row, classes.index(cell)] = 1
            else:
                reasons[row] = "no label"
        return labels, tuple(classes), True
    values = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "": -1}
    cells = np.array([[values.get(cell, -2) for cell in column] for column in columns], np.int64).T
    for row in np.flatnonzero((cells < 0).any(axis=1)).tolist():
        reasons[row] = "label neither 0 nor 1" if (cells[row] == -2).any() else "no label"
    usable = (cells >= 0).all(axis=1)
    # One-hot columns (HAM10000, ISIC 2019) are exclusive classes.
    exclusive = bool(usable.any() and (cells[usable].sum(axis=1) == 1).all())
    return np.clip(cells, 0, 1).astype(np.uint8), tuple(names), exclusive
