"""A run's folder in, a page about it out."""
