"""`rtdmd eval`: benchmarks, their two phases (make pictures, score them), figures with intervals, reports."""
