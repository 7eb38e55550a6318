"""Public sets of prompts: what there is, how to get it, and GenEval training prompts made here."""
