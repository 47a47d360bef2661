"""How the updates of a round become one model."""
