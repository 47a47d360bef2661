"""Every error that fedgan raises on purpose, and the exit code that the command line ends with.

    FedganError                  1   anything below; also an unexpected failure
    ├── ConfigError              2   a scenario, a key or a value that cannot be used
    ├── DataError                3   a shard, a source or a label that cannot be used
    │   └── SplitError           3   a patient in two splits
    ├── CheckpointError          4   a checkpoint that is missing, truncated or of another model
    ├── FederationError          5   a hospital or the federation failed; the run can be resumed
    ├── StorageError             6   a disk that is full or not writable
    └── MachineError        7   a package, a port or a device that is missing or taken

    Ctrl-C                     130   stopped by the user; the run can be resumed

A message is one or two lines: what happened, to which file, key or hospital, and how to mend it.
"""

from __future__ import annotations

HOSPITAL_REASON = "hospital: "  # begins a reason that a hospital has scrubbed itself, so that the server may show it


class FedganError(Exception):
    """Base of all errors that fedgan raises on purpose."""

    exit_code = 1


class ConfigError(FedganError):
    """A scenario, a key or a value that cannot be used."""

    exit_code = 2


class DataError(FedganError):
    """A shard, a source file or a label that cannot be used."""

    exit_code = 3


class SplitError(DataError):
    """A patient whose images are in two splits."""


class CheckpointError(FedganError):
    """A checkpoint that is missing, truncated, or belongs to another model."""

    exit_code = 4


class FederationError(FedganError):
    """A hospital or the whole federation failed. The run folder is intact and can be resumed."""

    exit_code = 5


class StorageError(FedganError):
    """A disk that is full or a place that cannot be written."""

    exit_code = 6


class MachineError(FedganError):
    """A package, a port or a device that is missing or taken."""

    exit_code = 7
