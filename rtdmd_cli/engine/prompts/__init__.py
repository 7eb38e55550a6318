"""Prompt files, public sets of prompts, and the cache of encoded prompts."""
