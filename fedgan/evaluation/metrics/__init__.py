"""Metrics as short pure functions, each with the paper it comes from."""
