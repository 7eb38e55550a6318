"""What a system or a disk that refuses means to a person."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rtdmd_cli.errors import HINTS, EnvironmentFailure

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the messages of safetensors' writer


@contextmanager
def os_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an OSError of the block into EnvironmentFailure: "Cannot <doing> <path>: <reason>.".

    So too what safetensors' own writer raises where the disk refuses.
    """
    try:
        yield
    except OSError as error:
        raise _failure(path, doing, error) from error
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise _failure(path, doing, OSError(number, os.strerror(number))) from error


def _failure(path: Path, doing: str, error: OSError) -> EnvironmentFailure:
    reason = (error.strerror or str(error)).lower()
    hint = HINTS.get(error.errno or 0, "Check this path, or choose another folder.")
    return EnvironmentFailure(f"Cannot {doing} {path}: {reason}.", hint)
