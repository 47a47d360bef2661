"""Losses, ADA, EMA and the one Trainer."""
