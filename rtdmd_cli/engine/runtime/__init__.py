"""What a run needs beside formulas: files, random streams, optimisers, checkpoints, run folder, device."""
