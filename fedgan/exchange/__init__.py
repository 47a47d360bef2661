"""What travels: number formats, bundles, masking, the metrics of a round, the outbound log."""
