"""Scenarios as TOML, and the code that runs them on one machine."""
