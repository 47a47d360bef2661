"""Atomic writes: a reader sees the old file or the new one, never a half.

Every file that a run leaves behind goes through `atomic_path`. An error of the operating system
(disk full, no permission) becomes one `StorageError` that names the place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedgan.errors import StorageError


def _read_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


UMASK = (
    _read_umask()
)  # read once, before there are threads: to read it is to set it for all of them


@contextlib.contextmanager
def atomic_path(path: str | Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed onto `path`.

    A `private` file has mode 0600 from its first byte on, others get the mode that the umask gives.
    On any exception the temporary file is removed and `path` is as it was. Raises `StorageError`
    when the operating system refuses (full disk, read-only folder).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise storage_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        if not private:
            publish(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path) -> None:
    """Give a file of `mkstemp` or a folder of `mkdtemp`, private so far, the mode that the user's umask gives to new ones."""
    os.chmod(temporary, (0o777 if temporary.is_dir() else 0o666) & ~UMASK)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it outlives a power cut; some network disks cannot, and their files are good."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | Path, data: bytes, private: bool = False) -> None:
    """Write `data` to `path` atomically, with mode 0600 where it is `private`."""
    with atomic_path(path, private) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically. NaN and infinity are written as null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a torn last line (a killed writer) is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def storage_error(path: Path, error: OSError) -> StorageError:
    """Say which place could not be written, why, and what to do."""
    mend = {
        errno.ENOSPC: "the disk is full: free some space or choose another place with --output",
        errno.EROFS: "the disk is read-only: choose another place with --output",
        errno.EACCES: "permission denied: choose a folder that you may write with --output",
        errno.ENOTDIR: "a part of the path is a file: choose another place with --output",
    }.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot write {path}: {mend}")


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by None, all the way down."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
