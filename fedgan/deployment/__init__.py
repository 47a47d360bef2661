"""What a federation of separate machines needs beside the training: keys and certificates."""
