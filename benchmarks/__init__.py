"""Speed and memory as fractions of this machine's own limits: `python -m benchmarks`."""
