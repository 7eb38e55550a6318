"""Optional experiment trackers, through accelerate; metrics.jsonl is always written besides."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rtdmd_cli.engine.compute.processes import launched
from rtdmd_cli.errors import EnvironmentFailure

_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes rows of metrics."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row, which has an "iteration"."""
        ...


class _Silent:
    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing to do."""


class _Accelerate:
    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def log(self, row: Mapping[str, Any]) -> None:
        values = {key: value for key, value in row.items() if key != "iteration"}
        self._accelerator.log(values, step=row["iteration"])


@contextmanager
def open_tracker(name: str, run: Path) -> Iterator[Tracker]:
    """The tracker "none", "tensorboard" (event files in the run folder) or "wandb", closed at the end.

    Raises EnvironmentFailure where its package is not installed.
    """
    if name == "none":
        yield _Silent()
        return
    if find_spec(_MODULES[name]) is None:
        raise EnvironmentFailure(
            f"The tracker {name} is not installed.", f"Run: pip install {_MODULES[name]}"
        )
    from accelerate import Accelerator  # seconds to import, and needed with a tracker alone

    accelerator = Accelerator(cpu=launched() == 1, log_with=name, project_dir=str(run))
    accelerator.init_trackers(project_name="rtdmd", init_kwargs={"wandb": {"name": run.name}})
    try:
        yield _Accelerate(accelerator)
    finally:
        accelerator.end_training()
