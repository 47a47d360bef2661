"""Metrics as short pure functions, each with its paper."""
