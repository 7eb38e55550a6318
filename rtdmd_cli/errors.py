"""The errors a person sees: one sentence of cause, one of what to do next, and an exit code."""


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
