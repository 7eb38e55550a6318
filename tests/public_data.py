"""The public benchmark files, where the checkout lies beside them."""

from pathlib import Path

import pytest


def benchmark_file(name: str) -> Path:
    """The file of that name; skips the test where there is none."""
    paths = (parent / "shared/data/benchmarks" / name for parent in Path(__file__).resolve().parents)
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        pytest.skip(f"the public benchmark file {name} is not here")
    return found
