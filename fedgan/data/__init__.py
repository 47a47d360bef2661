"""Shards on disk, importers, phantoms, partitions and patient-safe splits."""
