"""Measurements: the loader next to its peers, the making of shards, and resuming."""
