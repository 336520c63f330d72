"""The network, its loss, and the weights it starts from."""
