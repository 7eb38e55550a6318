"""Teacher, fake score, generator and its average (EMA): adapters on one base, or full copies of its weights."""
