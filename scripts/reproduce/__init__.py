"""The table of the shapes world, from the commands that make it."""
