"""Statistics over the arms of a comparison."""
