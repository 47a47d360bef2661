"""The Trainer, one training step per generator family, losses, ADA and EMA."""
