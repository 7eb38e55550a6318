"""What holds for every test."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

from rtdmd_cli.engine.compute.importing import quick_imports

if "PYTEST_XDIST_WORKER" in os.environ:  # which will need them: all of them import less and sooner so
    with quick_imports():
        import bitsandbytes  # noqa: F401

DEAR = (
    "tests/cli/test_export.py",
    "tests/scripts/test_reproduce_shapes.py",
    "tests/cli/test_processes.py",
    "tests/engine/tune_reward/test_recipe.py",
    "tests/faults/test_calls.py",
    "tests/cli/test_on_a_device.py",
    "tests/cli/test_eval.py",
    "tests/faults/test_kills.py",
    "tests/engine/planning/test_plan.py",
    "tests/cli/test_families.py",
    "tests/cli/test_tune_reward.py",
    "tests/faults/test_terminal.py",
    "tests/scripts/test_train_shapes.py",
    "tests/engine/test_reference_steps.py",
    "tests/engine/distill/test_recipe.py",
    "tests/engine/planning/test_shapes_only.py",
    "tests/engine/distill/test_run.py",
    "tests/engine/compute/test_blocks.py",
    "tests/cli/test_distill.py",
    "tests/engine/training/test_hardware_runs.py",
    "tests/engine/tune_reward/test_overoptimised.py",
    "tests/scripts/test_rehearse.py",
)
"""The files that take 20 processor seconds and more. They come first, the dearest before the others, so that at the end no
worker has a long one left while another waits (`scripts/test`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dear files first, the others as they are."""
    place = {name: number for number, name in enumerate(DEAR)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(DEAR)))


for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # started by nohup, or in the background of a script
        signal.signal(number, usual)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The program sets variables for the libraries it loads, and --quiet silences our own warnings; each test finds both
    as the first did."""
    before, level = dict(os.environ), logging.getLogger("rtdmd_cli").level
    yield
    logging.getLogger("rtdmd_cli").setLevel(level)
    os.environ.clear()
    os.environ.update(before)
