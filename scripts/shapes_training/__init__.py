"""Training of the built-in shapes models; `scripts/train_shapes.py` is the command."""
