"""What both stages share: the trainer, distribution matching, and the session around a recipe."""
