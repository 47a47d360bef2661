"""StyleGAN2-ADA networks (arXiv 1912.04958, 2006.06676)."""
