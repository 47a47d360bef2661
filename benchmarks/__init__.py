"""Speed and memory, as fractions of this machine's own limits measured in the same run: `python -m benchmarks`."""
