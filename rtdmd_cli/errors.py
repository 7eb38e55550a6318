"""The errors a person sees: one sentence of cause, one of what to do next, and an exit code."""

import errno
import os
import re
from collections.abc import Iterator

OUT_OF_MEMORY = re.compile(
    r"out of memory|can(no|')t allocate memory|not enough memory|failed to map segment|_ALLOC_FAILED"
    # how cuDNN and cuBLAS, which have memory of their own, often find a card that is nearly full
    r"|unable to find an engine to execute this|CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_SUPPORTED",
    re.IGNORECASE,
)
DEVICE_FAULT = re.compile(r"(CUDA|HIP)( driver)? error", re.IGNORECASE)
COMPANIONS = ("torchvision", "torchao")
"""Libraries that transformers and peft import where they are there, and that fit one version of torch or peft alone."""
UNMAPPED = re.compile(r"(/\S+): failed to map segment")
FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""errno of a disk or a system that fails, whatever the file holds."""
HINTS = {
    errno.ENOSPC: "Free some disk space, or choose a folder on another disk.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose a folder on another disk.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f unlimited), or choose a disk that takes larger ones.",
    errno.EACCES: "Change the permissions, or choose another folder.",
    errno.EPERM: "Change the permissions, or choose another folder.",
    errno.EROFS: "The disk is mounted read-only: choose another folder.",
    errno.EIO: "Check the disk.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ELOOP: "A link is in the way: remove it, or choose another path.",
    errno.ESTALE: "Check the network disk.",
    errno.ETIMEDOUT: "Check the network disk.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "Close other programs.",
    errno.ENOMEM: "Close other programs.",
}
"""errno of a failure that is the machine's -> hint."""


class RtdmdError(Exception):
    """An expected failure. The command line prints it without a traceback.

    message: the cause, one sentence. hint: the next step, one sentence, or "".
    exit_code: the process's exit code.
    """

    exit_code: int = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RtdmdError):
    """A wrong command line, preset or environment variable of ours."""

    exit_code = 2


class EnvironmentFailure(RtdmdError):
    """The machine is in the way: device, memory, disk, network, permission."""

    exit_code = 3


class BusyError(RtdmdError):
    """Another process is working on the same folder."""

    exit_code = 6


class DataError(RtdmdError):
    """Bad or incompatible data: prompts, checkpoints, models."""

    exit_code = 4


class NumericalError(RtdmdError):
    """A loss, gradient or weight is not finite."""

    exit_code = 5


class PictureFailure(NumericalError):
    """Pictures are not finite; what was trained is not touched by that."""


class RewardFailure(NumericalError):
    """Rewards have no usable answer for too many pictures; nothing has moved because of them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, and by name and text those of torch, which may not have been imported, and of the dynamic loader."""
    if isinstance(error, MemoryError) or "OutOfMemoryError" in {cls.__name__ for cls in type(error).__mro__}:
        return True
    known = isinstance(error, RuntimeError | ImportError) and OUT_OF_MEMORY.search(str(error)) is not None
    return known and no_programs(error) is None


def no_programs(error: BaseException) -> str | None:
    """The library that can't be loaded as its disk is mounted noexec; the loader has the words of full memory for it."""
    found = UNMAPPED.search(str(error))
    if found is None or not os.path.exists(found[1]):
        return None
    return found[1] if os.statvfs(found[1]).f_flag & os.ST_NOEXEC else None


def is_device_fault(error: BaseException) -> bool:
    """What the GPU's driver reports but for full memory: by name and text, as torch may not have been imported."""
    named = "AcceleratorError" in {cls.__name__ for cls in type(error).__mro__}
    return named or (isinstance(error, RuntimeError) and DEVICE_FAULT.match(str(error)) is not None)


def companion_at_fault(error: BaseException) -> tuple[str, str] | None:
    """Of the libraries that others import where they are installed, the one whose version an error is about, and its words."""
    for each in chain(error):
        name = _companion_named(each)
        if name is not None:
            return name, str(each).partition("\n")[0].rstrip(".")
    return None


def _companion_named(error: BaseException) -> str | None:
    """As above, of this error alone. Not of one that is not installed, nor of a file in a folder of that name."""
    if not isinstance(error, ImportError | RuntimeError | OSError):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name in COMPANIONS:
        return None
    if isinstance(error, OSError) and error.errno is not None:  # the dynamic loader's have none
        return None
    return next((name for name in COMPANIONS if name in str(error)), None)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        yield current
        seen.append(current)
        current = current.__cause__ or current.__context__


def companion_hint(name: str) -> str:
    """How such a library is mended."""
    return f"rtdmd does without it, so update or remove it: pip install -U {name}, or pip uninstall {name}"


def is_nccl(error: BaseException) -> bool:
    """What torch reports where processes on several cards can't reach each other; by name and text, as above."""
    named = "DistBackendError" in {cls.__name__ for cls in type(error).__mro__}
    return named or (isinstance(error, RuntimeError) and "NCCL error" in str(error))


def machine_fault(error: BaseException) -> BaseException | None:
    """Of an error and those that it came from, the first that is the machine's.

    That is full memory, a disk or a GPU that fails, a library that doesn't fit. Libraries raise errors of their own over
    it, in the words of a damaged file.
    """
    for each in chain(error):
        failing = isinstance(each, OSError) and each.errno in FAILING
        if failing or is_out_of_memory(each) or is_device_fault(each) or _companion_named(each):
            return each
    return None
