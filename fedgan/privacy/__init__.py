"""Differential privacy: DP-SGD, accounting, the ledger of each hospital, client-level noise."""
