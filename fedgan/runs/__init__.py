"""A run without Flower: preparation, budget, state of a round, evaluator, lock, rules of settings."""
