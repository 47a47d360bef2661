"""Attacks that would notice a leak: copies of training images, membership, projection. Arrays in, numbers out."""
