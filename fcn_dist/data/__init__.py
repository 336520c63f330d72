"""Scenes in, batches out."""
