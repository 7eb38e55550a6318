"""Stage 2, `rtdmd tune-reward`: `recipe.py` is to be read from top to bottom."""
