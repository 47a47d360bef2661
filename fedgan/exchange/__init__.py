"""What travels between hospitals and server: number formats, bundles, masking, the outbound log."""
