"""Atomic writes, by which a reader sees the old file or the new one; checked reads; locks.

An error of the operating system (disk full, no permission) becomes a `StorageError` with the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedgan.errors import ConfigError, StorageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: no lock, so no run
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in a folder


def _read_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


UMASK = _read_umask()  # once, before there are threads: reading sets it for all of them
MOST_BYTES = 2**25  # of a JSON text: far more than any file of a run, far less than the memory
MOST_LEVELS = 64  # of a JSON text: deeper ones would exhaust the stack of a recursive function


@contextlib.contextmanager
def atomic_path(path: str | Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed onto `path`.

    A `private` file has mode 0600 from its first byte on, others the mode of the umask. On any
    exception the temporary file is removed and `path` is unchanged. Raises `StorageError` for
    errors of the operating system (full disk, read-only folder).
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
    """Give a private file or folder of `tempfile` the mode of new ones under the umask."""
    os.chmod(temporary, (0o777 if temporary.is_dir() else 0o666) & ~UMASK)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename survives a power cut; ignored where a disk cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | Path, data: bytes, private: bool = False) -> None:
    """Write `data` to `path` atomically; `private`: with mode 0600."""
    with atomic_path(path, private) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def parse_json(data: bytes | str) -> Any:
    """Parse a JSON text (UTF-8).

    Raises `ValueError`, and nothing else, for any other text, for more than `MOST_BYTES` and for
    more than `MOST_LEVELS` levels.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    try:
        value = json.loads(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def read_bytes(path: Path) -> bytes:
    """Read a file of at most `MOST_BYTES`. Raises `ValueError` for a larger one, or `OSError`."""
    with open(path, "rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    return data


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSON-lines file; other lines (a killed writer) are left out."""
    return [row for row in scan_json_lines(path) if row is not None]


def scan_json_lines(path: str | Path) -> list[dict[str, Any] | None]:
    """One entry per line of a JSON-lines file: its object, or None where it holds none."""
    if not Path(path).is_file():
        return []
    rows: list[dict[str, Any] | None] = []
    with open(path, "rb") as stream:
        while line := stream.readline(MOST_BYTES):
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            rows.append(row if isinstance(row, dict) else None)
    return rows


# --- locks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(
    folder: Path, timeout: float, on_wait: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Hold the lock of a folder, which is created where it is missing.

    The lock is the system's (flock): it ends with the process, however that ends. `on_wait` is
    called once where another process holds it. Raises `ConfigError` when that still holds it after
    `timeout` seconds, `StorageError` where the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, timeout, on_wait)
    except OSError as error:
        raise storage_error(folder, error) from error
    if handle is None:
        raise ConfigError(f"{folder} is in use by another fedgan: wait for its end, or stop it")
    try:
        yield handle
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # succeeds only where nothing was written
        os.close(handle)


def _acquire(path: Path, timeout: float, on_wait: Callable[[], None]) -> int | None:
    """An open file that holds the lock; None after the timeout."""
    end, has_waited = time.monotonic() + timeout, False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not a file that its holder has just removed
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
        if time.monotonic() > end:
            return None
        if not has_waited:
            on_wait()
            has_waited = True
        time.sleep(0.1)


# --- errors --------------------------------------------------------------------------------------


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error for a path that cannot be written: which, why, and how to fix it."""
    fix = {
        errno.ENOSPC: "the disk is full: free some space or choose another folder with --output",
        errno.EROFS: "the disk is read-only: choose another folder with --output",
        errno.EACCES: "permission denied: choose a writable folder with --output",
        errno.ENOTDIR: "a part of the path is a file: choose another folder with --output",
    }.get(error.errno or 0, error.strerror or str(error))
    return StorageError(f"cannot write {path}: {fix}")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, recursively."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
