"""Rewards: what a picture is worth for its prompt. `registry.REWARDS` lists them, `base.Reward` is their protocol."""
