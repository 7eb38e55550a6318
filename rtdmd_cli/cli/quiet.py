"""Silences the remarks of third-party libraries that nobody can act on. Errors and all other warnings stay."""

import logging
import os

NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel
    "transformers.utils.import_utils": "requires torchvision (not installed)",  # it takes its own substitute
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",  # diffusers says it truncates
}
"""Logger name -> text of the message to drop."""


def is_wanted(record: logging.LogRecord) -> bool:
    """A filter for the loggers of NOISE: False for the message named there."""
    return NOISE[record.name] not in record.getMessage()


def quiet_libraries(warnings: bool = False) -> None:
    """Call before the libraries are imported; warnings: silence those as well, as --quiet wants.

    The user's own HF_HUB_DISABLE_PROGRESS_BARS=0 and *_VERBOSITY are kept.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if warnings:
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in NOISE:
        logging.getLogger(name).addFilter(is_wanted)
