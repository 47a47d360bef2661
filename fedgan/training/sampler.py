"""Seeded, resumable samplers of rows, for training without privacy.

With privacy the rows are drawn from a secret (fedgan/privacy/step.py).
"""

from __future__ import annotations

import numpy as np


class Sampler:
    """Rows of a dataset of `size` images in shuffled passes; a pass shows every image once."""

    def __init__(self, size: int, seed: int, stream: int) -> None:
        self.size, self.seed, self.stream = size, seed, stream
        self.epoch, self.position = 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        # Each pass has its own generator: epoch and position are the whole state.
        return np.random.Generator(
            np.random.PCG64([self.seed, self.stream, self.epoch])
        ).permutation(self.size)

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows (int64); passes follow each other without a gap."""
        taken = []
        while count:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.position : self.position + count]
            taken.append(part)
            self.position += len(part)
            count -= len(part)
        return np.concatenate(taken)

    def state(self) -> dict[str, int]:
        return {"size": self.size, "epoch": self.epoch, "position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()


class PoissonSampler(Sampler):
    """Poisson samples, as DP-SGD draws them: each row independently, `count` rows on average."""

    def take(self, count: int) -> np.ndarray:
        """Rows (int64) of one draw; their number varies around `count` and may be 0."""
        self.epoch += 1  # counts draws here
        rng = np.random.Generator(np.random.PCG64([self.seed, self.stream, self.epoch]))
        return np.flatnonzero(rng.random(self.size) < count / self.size)
