"""The Flower ClientApp of one hospital: thin glue round the Trainer."""
