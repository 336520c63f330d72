"""A data set from its public address, as a checked scenes folder."""
