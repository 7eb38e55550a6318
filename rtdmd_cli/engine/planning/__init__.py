"""What a run takes, known before it starts: memory, time and disk, computed on shapes alone."""
