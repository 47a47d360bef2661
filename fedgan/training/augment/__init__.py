"""Differentiable image augmentation for ADA (arXiv 2006.06676, appendix B)."""

from fedgan.training.augment.pipe import PIPES, AugmentPipe

__all__ = ["PIPES", "AugmentPipe"]
