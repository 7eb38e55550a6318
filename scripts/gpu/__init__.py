"""What a CUDA machine can do with rtdmd, measured: see `scripts/gpu_check --help`."""
