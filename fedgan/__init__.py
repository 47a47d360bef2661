"""fedgan: federated training of one generative model over hospitals (independent of Flower)."""

__version__ = "0.1.0"
