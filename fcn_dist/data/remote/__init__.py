"""Files in a store elsewhere, kept on the node while they are needed."""
