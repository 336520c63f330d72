"""From a checkpoint to one file, and from that file to masks and pictures."""
