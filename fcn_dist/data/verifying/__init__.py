"""Shards held against their index: everything that is wrong, by name."""
