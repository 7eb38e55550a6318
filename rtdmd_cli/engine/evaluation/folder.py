"""The folder of an evaluation: what it holds, which one is taken, and who may write to it.

    evaluation.json    what is measured, and how its pictures are made: what makes two evaluations the same one
    00000/ ...         pictures (`picture_store`)     scores/     (`score_phase`)     timing.jsonl
    results.json  report.html  report.md

Nothing is overwritten: without --resume a folder that holds anything is left alone and the next free name is taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.sampling.pictures import free_folder
from rtdmd_cli.engine.storage import files, strict_json
from rtdmd_cli.engine.storage.disk_errors import os_errors
from rtdmd_cli.engine.storage.files import make_folder, write_json
from rtdmd_cli.errors import DataError, UsageError

ABOUT, RESULTS, TIMING = "evaluation.json", "results.json", "timing.jsonl"
SCORES = "scores"
REPORT, REPORT_TEXT = "report.html", "report.md"
DEFAULT = Path("evals")
FREE = (
    "version",
    "model",
)  # of the conditions: may differ where an evaluation is continued; the hash says which model


def default_folder(benchmark: str, label: str) -> Path:
    """evals/<benchmark>-<model>, in characters that any system takes."""
    plain = re.sub(r"[^\w.-]+", "-", label.removesuffix(" (base model)")).strip("-.")
    return DEFAULT / f"{benchmark}-{plain[:80] or 'model'}"


def choose_folder(out: Path, identity: Mapping[str, Any], resume: bool) -> tuple[Path, bool]:
    """The folder to write to, and whether it is continued. identity: JSON values.

    resume: the first of `out`, `out`-2, ... that holds the same evaluation; `out` itself where none of them exists.
    UsageError for a file in the place of the folder; DataError where they hold other evaluations only.
    """
    with os_errors(out, "read"):
        if not resume:
            return free_folder(out, _is_empty), False
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file, not a folder.", "Choose a folder with --out.")
        differing: list[str] = []
        for number in count(1):
            folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
            if not folder.is_dir():
                break
            found = read_about(folder)
            theirs = found["identity"] if found else {}
            unlike = [key for key, value in identity.items() if key not in FREE and theirs.get(key) != value]
            if found is not None and not unlike:
                return folder, True
            differing = differing or (unlike if found else ["nothing that an evaluation left"])
    if not differing or (out.is_dir() and _is_empty(out)):
        return out, False
    raise DataError(
        f"{out} holds another evaluation: it differs in {', '.join(differing[:6])}.",
        "Give the same options as before, or leave --resume out to begin another one.",
    )


def write_about(folder: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Begin an evaluation's folder. about: what is of interest but makes no other evaluation."""
    write_json(folder / ABOUT, {"identity": dict(identity), "about": dict(about)})


def is_evaluation(folder: Path) -> bool:
    """Whether `write_about` was here."""
    return os.path.isfile(folder / ABOUT)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What `write_about` wrote; None where the folder is no evaluation's. DataError where it is damaged."""
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        found = strict_json.read(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged.", "Begin another evaluation, without --resume.") from error
    if not isinstance(found, dict) or not {"identity", "about"} <= found.keys():
        raise DataError(f"{path} is damaged.", "Begin another evaluation, without --resume.")
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made if need be, for this process. BusyError as `files.locked`."""
    make_folder(folder)

    def inner() -> list[Path]:
        return [folder / SCORES, *folder.glob("[0-9]*/"), *folder.glob("[0-9]*/*/")]

    with files.locked(folder, "Wait for it, or choose another --out.", inner):
        yield


def _is_empty(folder: Path) -> bool:
    """But for what a kill left of the first file, which goes when the folder is locked."""
    return not any(path for path in folder.iterdir() if not path.name.startswith(files.TMP_PREFIX))
