"""Label vectors of `fedgan generate` from label names and vectors that the user gives."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedgan.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np


def named_vectors(names: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """One-hot vectors (len(names), K) uint8 of label names. Raises `DataError` for unknown ones."""
    import numpy as np

    vectors = np.zeros((len(names), len(label_names)), np.uint8)
    for row, name in enumerate(names):
        if name not in label_names:
            near = difflib.get_close_matches(name, label_names, n=1, cutoff=0.5)
            advice = (
                f"did you mean '{near[0]}'?"
                if near
                else f"its labels: {', '.join(label_names) or 'none'}"
            )
            raise DataError(f"the model has no label '{name}'; {advice}")
        vectors[row, list(label_names).index(name)] = 1
    return vectors


def parsed_vectors(texts: Sequence[str], label_names: Sequence[str], exclusive: bool) -> np.ndarray:
    """Vectors (len(texts), K) uint8 of texts such as `1,0,1`. Raises `ConfigError`."""
    import numpy as np

    vectors = np.zeros((len(texts), len(label_names)), np.uint8)
    for row, text in enumerate(texts):
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != len(label_names) or any(part not in ("0", "1") for part in parts):
            raise ConfigError(
                f"--vector {text}: give {len(label_names)} numbers 0 or 1 with commas, "
                f"in the order {', '.join(label_names) or '(this model has no labels)'}"
            )
        vectors[row] = [int(part) for part in parts]
        if exclusive and vectors[row].sum() != 1:
            raise ConfigError(
                f"--vector {text}: this model's classes exclude each other, "
                "so exactly one number must be 1"
            )
    return vectors


def spread_evenly(vectors: np.ndarray, images: int) -> np.ndarray:
    """Repeat vectors equally often to (images, K); the first ones get the remainder."""
    import numpy as np

    repeats = np.full(len(vectors), images // len(vectors))
    repeats[: images % len(vectors)] += 1
    return np.repeat(vectors, repeats, axis=0)
