"""Features, fidelity and utility: numbers in, numbers out."""
