"""Stage 1, `rtdmd distill`: `recipe.py` is to be read from top to bottom."""
