"""Errors that fedgan raises on purpose, and the exit codes of the command line.

    FedganError                  1   any error below; also an unexpected failure
    ├── ConfigError              2   an invalid scenario, key or value
    ├── DataError                3   an invalid shard, source file or label
    │   └── SplitError           3   a patient in two splits
    ├── CheckpointError          4   a checkpoint that is missing, truncated or of another model
    ├── FederationError          5   a hospital or the federation failed; the run can be resumed
    ├── StorageError             6   a disk that is full or not writable
    └── MachineError             7   a package, port or device that is missing or in use

    Ctrl-C                     130   stopped by the user; the run can be resumed

A message is one or two lines: what happened, to which file, key or hospital, and how to fix it.
"""

from __future__ import annotations

# Prefix of a message that a hospital has redacted itself: the server may show it.
HOSPITAL_REASON = "hospital: "


class FedganError(Exception):
    """Base of all errors that fedgan raises on purpose."""

    exit_code = 1


class ConfigError(FedganError):
    """An invalid scenario, key or value."""

    exit_code = 2


class DataError(FedganError):
    """An invalid shard, source file or label."""

    exit_code = 3


class SplitError(DataError):
    """A patient whose images are in two splits."""


class CheckpointError(FedganError):
    """A checkpoint that is missing, truncated, or belongs to another model."""

    exit_code = 4


class FederationError(FedganError):
    """A hospital or the federation failed. The run folder is intact and can be resumed."""

    exit_code = 5


class StorageError(FedganError):
    """A disk that is full or not writable."""

    exit_code = 6


class MachineError(FedganError):
    """A package, port or device that is missing or in use."""

    exit_code = 7
