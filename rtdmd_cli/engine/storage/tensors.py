"""Named tensors as they were read: whether they are those that are needed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rtdmd_cli.errors import DataError

AGAIN = "Fetch the file again from its publisher."
"""The hint for published weights that are damaged or foreign."""


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """DataError that names the first key that is missing, unexpected or of another shape than `shapes` says.

    what: the weights, for the message ("The weights of <what> ...").
    """
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    for kind, keys in (("lack", missing), ("have the unexpected", unexpected)):
        if keys:
            raise DataError(f"The weights of {what} {kind} {keys[0]} ({len(keys)} tensors in all).", AGAIN)
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            found = list(tensors[key].shape)
            raise DataError(f"{key} of the weights of {what} is {found}, not {list(shape)}.", AGAIN)
