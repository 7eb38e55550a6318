"""Every check of `rtdmd doctor`, in the order in which they are printed."""

from collections.abc import Iterator
from dataclasses import replace

from rtdmd_cli.engine.doctor import device, presets, software, storage
from rtdmd_cli.engine.doctor.check import Check, examined
from rtdmd_cli.engine.storage.scrubbing import scrub

CHECKS = {
    "python": software.python,
    "libraries": software.libraries,
    "companions": software.companions,
    "extras": software.extras,
    "gpu": device.gpu,
    "shared": device.shared,
    "formats": device.formats,
    "compiler": device.compiler,
    "bitsandbytes": device.quantisation,
    "memory": storage.memory,
    "presets": presets.fitting,
    "cache": storage.cache,
    "models": storage.models,
    "runs": storage.runs,
    "hub": storage.hub,
}


def examine() -> Iterator[Check]:
    """The checks, one after another, without user name, host name, home folder and tokens in their words."""
    for name, look in CHECKS.items():
        found = examined(name, look)
        words, fix = scrub([found.found, found.fix])
        facts = {
            key: scrub([value])[0] if isinstance(value, str) else value for key, value in found.facts.items()
        }
        yield replace(found, found=words, fix=fix, facts=facts)
