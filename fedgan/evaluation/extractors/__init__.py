"""Networks that turn images into features, one module each. `fedgan.evaluation.features` chooses among them."""
