"""The internal engine: everything that computes."""
