"""How long a training step takes, and what of it is not the network."""
