"""Generator, discriminator and classifiers: nn.Modules only."""
