"""The Flower ClientApp of one hospital: thin glue around the Trainer."""
