"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The program sets variables for the libraries it loads; each test finds the environment of the first."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
