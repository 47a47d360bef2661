"""A run without Flower: preparation, budget, round state, evaluator, rules of settings."""
