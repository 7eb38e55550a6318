"""What other tools load: one LoRA, a ComfyUI workflow, a merged pipeline, and the card that goes with them."""
