"""Privacy attacks: copies of training images, membership inference, projection."""
