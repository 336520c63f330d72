"""A scenes folder: its pairs found, and each file read, checked and converted for packing."""
