"""The checkpoint artifact: committed folders, and what DeepSpeed's files in them say. Knows files, not engines."""
