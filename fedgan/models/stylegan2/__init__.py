"""StyleGAN2-ADA networks (arXiv 1912.04958, 2006.06676)."""

from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator

NETWORKS = {"generator": Generator, "discriminator": Discriminator}
