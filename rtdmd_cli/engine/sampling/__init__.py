"""Pictures from a model, and what `--from` names."""
