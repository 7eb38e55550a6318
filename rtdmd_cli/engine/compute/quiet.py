"""Silence while the model libraries load: what matters in their reports is raised as an error by our own checks."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within the block, no progress bars and load reports of transformers and diffusers."""
    bars = transformers.logging.is_progress_bar_enabled()
    levels = transformers.logging.get_verbosity(), diffusers.utils.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        diffusers.utils.logging.set_verbosity(levels[1])
        if bars:
            transformers.logging.enable_progress_bar()
            diffusers.utils.logging.enable_progress_bar()
