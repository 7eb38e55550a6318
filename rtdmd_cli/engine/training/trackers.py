"""Optional experiment trackers, through accelerate; metrics.jsonl and the sample grids are always written besides.

They get every metric line, learning rates, speed and memory among it, the sample grids, and the preset's values.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from packaging.version import Version

from rtdmd_cli.engine.rewards.printing import prints_nowhere, prints_on_stderr
from rtdmd_cli.errors import EnvironmentFailure

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names, each also of the package and of the extra."""
GRID = "samples"
"""Under which name a tracker shows the sample grids."""
OLDEST_WANDB = "0.31"
"""The first one that can be asked for its login without a question to the person."""
OFFLINE = ("offline", "dryrun", "disabled")
"""wandb's modes without a server."""
WITHOUT = "do without: --set hardware.tracker=none"


class Tracker(Protocol):
    """Takes rows of metrics, and grids."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row, which has an "iteration"."""
        ...

    def show(self, grid: Path, iteration: int) -> None:
        """Pass on a PNG file."""
        ...


class _Silent:
    def log(self, row: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def show(self, grid: Path, iteration: int) -> None:
        """Nothing to do."""


class _Accelerate:
    def __init__(self, accelerator: Any, name: str) -> None:
        self._accelerator, self._name = accelerator, name

    def log(self, row: Mapping[str, Any]) -> None:
        values = {key: value for key, value in row.items() if key != "iteration"}
        self._accelerator.log(values, step=row["iteration"])

    def show(self, grid: Path, iteration: int) -> None:
        if self._name == "trackio":  # accelerate passes no pictures on to it
            import trackio

            self._accelerator.log({GRID: trackio.Image(grid)}, step=iteration)
            return
        import numpy as np
        from PIL import Image

        with Image.open(grid, formats=["PNG"]) as source:
            image = np.asarray(source.convert("RGB"))
        tracker = self._accelerator.get_tracker(self._name)
        if self._name == "tensorboard":
            tracker.log_images({GRID: image[None]}, step=iteration, dataformats="NHWC")
        else:
            tracker.log_images({GRID: [image]}, step=iteration)


def require_tracker(name: str) -> None:
    """EnvironmentFailure where a tracker's package is not installed, or wandb has no login; nothing for "none".

    With a key, wandb's server is asked whether it takes it: without network, a run would fail after the model is loaded.
    """
    if name not in TRACKERS:
        return
    found = find_spec(name)
    if found is None or found.origin is None:  # a mere folder of that name, as wandb makes one where it runs
        raise EnvironmentFailure(
            f"The tracker {name} is not installed.", f"Run: pip install 'rtdmd[{name}]', or {WITHOUT}"
        )
    if name == "wandb":
        with prints_on_stderr():
            _require_login()


def _require_login() -> None:
    """As `require_tracker`, of wandb; `wandb.init` would wait for a key on a terminal, and fail without one."""
    if Version(version("wandb")) < Version(OLDEST_WANDB):
        raise EnvironmentFailure(
            f"wandb {version('wandb')} is older than {OLDEST_WANDB}.",
            f"Run: pip install --upgrade 'rtdmd[wandb]', or {WITHOUT}",
        )
    import wandb

    hint = "Run `wandb login`, or set WANDB_MODE=offline."
    try:
        there = wandb.setup().settings.mode in OFFLINE or wandb.login(prompt=False)
    except Exception as error:  # its own of many kinds, and those of what it calls
        raise EnvironmentFailure(f"The tracker wandb can't log in: {_words(error)}.", hint) from error
    if not there:
        raise EnvironmentFailure("The tracker wandb has no login on this machine.", hint)


def _words(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


@contextmanager
def open_tracker(
    name: str,
    run: Path,
    settings: Mapping[str, Any],
    quiet: bool = False,
    run_id: str | None = None,
    first: int = 0,
) -> Iterator[Tracker]:
    """The tracker "none", or one of TRACKERS, closed at the end.

    settings: the preset's values by their keys. tensorboard writes event files into the run folder, wandb and trackio
    keep their own. quiet: what their packages print is dropped. run_id: by it wandb goes on with a run that it has; it
    keeps what it was told of an iteration, and leaves out what a resume tells again. first: iteration; tensorboard hides
    what it was told of this and later ones. Raises as `require_tracker`, and EnvironmentFailure
    where the tracker fails to begin.
    """
    if name == "none":
        yield _Silent()
        return
    require_tracker(name)
    from accelerate import Accelerator  # seconds to import, and needed with a tracker alone

    from rtdmd_cli.engine.compute.processes import launched

    accelerator = Accelerator(cpu=launched() == 1, log_with=name, project_dir=str(run))
    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
    }
    printing = prints_nowhere if quiet else prints_on_stderr
    try:
        with printing():
            begin: dict[str, Any] = {"purge_step": first} if name == "tensorboard" else {"name": run.name}
            begin |= _known_again(run_id) if name == "wandb" else {}
            accelerator.init_trackers(project_name="rtdmd", config=plain, init_kwargs={name: begin})
    except Exception as error:  # whatever a tracker's package or its server may say
        reason = f"The tracker {name} could not begin: {_words(error)}."
        raise EnvironmentFailure(reason, f"Mend it, or {WITHOUT}") from error
    try:
        yield _Accelerate(accelerator, name)
    finally:
        with printing():
            _finish(accelerator, name)


def _known_again(run_id: str | None) -> dict[str, Any]:
    """What has wandb go on with a run that its server has; nothing without a server, where wandb can't look for one.

    Each part that is kept offline has an id of its own then: sent later, none can take the place of another.
    """
    import wandb

    if run_id is None or wandb.setup().settings.mode in OFFLINE:
        return {}
    return {"id": run_id, "resume": "allow"}


def _finish(accelerator: Any, name: str) -> None:
    if name == "trackio":  # accelerate leaves it open, so that it would print on stdout when Python ends
        import trackio

        trackio.finish()
    accelerator.end_training()
