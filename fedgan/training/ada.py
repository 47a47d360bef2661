"""Adaptive discriminator augmentation: the controller of p (arXiv 2006.06676, section 3)."""

from __future__ import annotations

from typing import Any

import torch

from fedgan.config import AugmentSettings
from fedgan.errors import CheckpointError


class AdaController:
    """Augmentation strength p, moved so that r_t = E[sign(D(real))] reaches the target.

    The signs of D on real images are summed over a window of `interval` steps. At its end p rises
    (r_t above the target: D overfits) or falls by window images / (1000 * speed_kimg), within [0,
    1]: from 0 to 1 in `speed_kimg` thousand real images for any batch size. Mode `fixed` keeps p at
    its start, mode `none` at 0; both still measure r_t.
    """

    def __init__(self, settings: AugmentSettings) -> None:
        self.settings = settings
        self.p: float = 0.0 if settings.mode == "none" else settings.p
        self.r_t: float = 0.0
        self._steps = 0
        self._images = 0
        self._signs: torch.Tensor | float = 0.0

    def observe(self, logits_real: torch.Tensor) -> None:
        """Add D's logits on real images, of any shape, without waiting for the device."""
        logits = logits_real.detach()
        self._signs = self._signs + torch.sign(logits).sum(dtype=torch.float32)
        self._images += logits.numel()

    def observe_sum(self, signs: float, images: int) -> None:
        """Add a noisy sum of the signs of about `images` logits, as a private training releases."""
        self._signs = self._signs + signs
        self._images += images

    def step(self) -> None:
        """End one training step; at the end of a window set `r_t` and, in mode `ada`, move `p`.

        A window without observations changes nothing.
        """
        self._steps += 1
        if self._steps < self.settings.interval:
            return
        if self._images:
            self.r_t = float(self._signs) / self._images
            if self.settings.mode == "ada":
                gap = self.r_t - self.settings.target
                direction = (gap > 0) - (gap < 0)  # 0 for NaN: a broken D must not move p
                change = direction * self._images / (self.settings.speed_kimg * 1000)
                self.p = min(1.0, max(0.0, self.p + change))
        self._steps, self._images, self._signs = 0, 0, 0.0

    def state(self) -> dict[str, Any]:
        """The state as JSON values: p, r_t, steps, images, signs."""
        return {
            "p": self.p,
            "r_t": self.r_t,
            "steps": self._steps,
            "images": self._images,
            "signs": float(self._signs),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state()` returned; a value that is no such state is a `CheckpointError`."""
        try:
            p, r_t, signs = float(state["p"]), float(state["r_t"]), float(state["signs"])
            steps, images = int(state["steps"]), int(state["images"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                "the ADA state of the checkpoint is damaged or of another version: "
                "resume from an older one"
            ) from None
        if not 0.0 <= p <= 1.0 or steps < 0 or images < 0:
            raise CheckpointError(
                f"the ADA state of the checkpoint is out of range (p = {p:g}): "
                "resume from an older one"
            )
        self.p, self.r_t, self._steps, self._images, self._signs = p, r_t, steps, images, signs
