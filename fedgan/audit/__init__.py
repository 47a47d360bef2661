"""Attacks on a finished run with their controls, and the release filter."""
