"""Keeps third-party libraries to their part: no reports to others, no remarks that nobody can act on, no other attention.

Errors and all other warnings stay.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

TELEMETRY = {
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime, which diffusers imports where it is installed
    "PYDANTIC_DISABLE_PLUGINS": "__all__",  # logfire's reports what is validated
    "WANDB_ERROR_REPORTING": "false",  # to its maker, also of runs that are sent nowhere
}
"""The switches of libraries that would report to somebody, and their values that turn that off."""
NOISE = {
    "huggingface_hub.hf_api": "offline mode is enabled",  # by the user
    "diffusers.pipelines.pipeline_utils": "Couldn't connect to the Hub",  # what is not in the cache is our own error
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # it takes its own substitute
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",  # diffusers says it truncates
}
"""Logger name -> text of the message to drop."""
ATTENTION, NATIVE = "DIFFUSERS_ATTN_BACKEND", "native"
_chosen: list[str] = []
"""The attention that the shell has chosen for this process."""
OWN = logging.getLogger("rtdmd_cli")
"""What the engine warns of: comments in a prompt file, prompts that are cut off. Python prints it on stderr."""


@contextmanager
def own_warnings() -> Iterator[None]:
    """Around a command: afterwards our own warnings are printed again, whatever it silenced."""
    level = OWN.level
    try:
        yield
    finally:
        OWN.setLevel(level)


def no_telemetry() -> None:
    """Call before the libraries are imported. What the user has set is kept."""
    for name, off in TELEMETRY.items():
        os.environ.setdefault(name, off)


def torch_attention() -> None:
    """Let diffusers compute attention by torch's own function, whatever the shell has chosen.

    Sage and others that are made for sampling have no backward pass, and say nothing: the layers that lead to queries,
    keys and values would not be trained. A training says so: `attention_left_out`.
    """
    _chosen[:] = [os.environ.get(ATTENTION, NATIVE)]
    os.environ[ATTENTION] = NATIVE


def attention_left_out() -> str:
    """What is said of another attention that the shell has chosen; "" without one."""
    other = [each for each in _chosen if each != NATIVE]
    return f"{ATTENTION}={other[0]} is left out: not every attention can be trained through" if other else ""


def is_wanted(record: logging.LogRecord) -> bool:
    """A filter for the loggers of NOISE: False for the message named there."""
    return NOISE[record.name] not in record.getMessage()


def quiet_libraries(warnings: bool = False) -> None:
    """Call before the libraries are imported; warnings: silence those as well, as --quiet wants, and our own.

    The user's own HF_HUB_DISABLE_PROGRESS_BARS=0 and *_VERBOSITY are kept.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if warnings:
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        os.environ.setdefault("WANDB_SILENT", "true")
        OWN.setLevel(logging.ERROR)
    for name in NOISE:
        logging.getLogger(name).addFilter(is_wanted)
