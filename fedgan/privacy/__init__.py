"""Differential privacy for the discriminator, the ledger of each hospital, and attacks that would notice a leak."""
