"""The Flower ServerApp: strategy glue and the central evaluator."""
