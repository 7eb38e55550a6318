"""What lies on disk: files, checkpoints, run folders, exports, LoRA files, the hub's cache."""
