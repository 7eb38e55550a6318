"""The public benchmark prompts, where a checkout has them beside it; they are no part of the project."""

from pathlib import Path

import pytest


def public_prompts(name: str) -> Path:
    """The file of that name; skips the test where it isn't there."""
    for parent in Path(__file__).resolve().parents:
        path = parent / "shared/data/benchmarks" / name
        if path.is_file():
            return path
    pytest.skip(f"the public prompts {name} are not on this machine")
