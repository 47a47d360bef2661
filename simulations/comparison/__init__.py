"""A comparison of arms: plan, training, evaluation, results."""
