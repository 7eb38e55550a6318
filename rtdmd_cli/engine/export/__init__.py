"""What other tools load: one LoRA, a ComfyUI workflow, a merged pipeline, and the card that goes with them."""

PICTURES = 4
"""Largest number of pictures that a card shows and the round trip compares, one a prompt."""
