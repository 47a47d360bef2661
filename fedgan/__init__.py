"""fedgan: hospitals train one StyleGAN2-ADA together. This package knows nothing of Flower."""

__version__ = "0.1.0"
