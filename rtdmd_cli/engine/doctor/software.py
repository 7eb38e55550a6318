"""Python, rtdmd, the libraries and the extras."""

import importlib
import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement

from rtdmd_cli import __version__
from rtdmd_cli.engine.doctor.check import Check
from rtdmd_cli.errors import companion_at_fault, companion_hint

PYTHON = ((3, 11), (3, 14))
"""The versions of Python that rtdmd is for: from the first on, below the second."""
EXTRAS = {
    "ocr": ("onnxruntime", "rapidocr"),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Extra of the package -> what it brings."""
SHOWN = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")


def python() -> Check:
    """Its version and where it lies."""
    lowest, above = PYTHON
    found = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    facts = {"version": platform.python_version(), "executable": sys.executable}
    if lowest <= sys.version_info[:2] < above:
        return Check("python", "PASS", found, facts=facts)
    wanted = f"{lowest[0]}.{lowest[1]} to {above[0]}.{above[1] - 1}"
    return Check("python", "FAIL", found, f"Install rtdmd under Python {wanted}.", facts)


def libraries() -> Check:
    """The versions of the libraries, against the bounds that the package states."""
    versions = {name: _version(name) for name in SHOWN}
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    wrong = unmet(_stated())
    wrong += [name for name, version in versions.items() if version is None and name not in wrong]
    facts = {"rtdmd": __version__, **versions}
    if wrong:
        fix = "pip install --upgrade " + " ".join(f"'{each}'" for each in wrong)
        return Check("libraries", "FAIL", f"{found}; not as needed: {', '.join(wrong)}", fix, facts)
    return Check("libraries", "PASS", f"rtdmd {__version__}, {found}", facts=facts)


def companions() -> Check:
    """torchvision and torchao, which rtdmd does without, but not with ones that don't fit: other libraries import them."""
    facts = {name: _version(name) for name in ("torchvision", "torchao")}
    try:
        if facts["torchvision"]:
            importlib.import_module("torchvision")
        from peft.import_utils import is_torchao_available

        is_torchao_available()  # raises for a version that it can't use
    except (ImportError, RuntimeError, OSError) as error:
        name, words = companion_at_fault(error) or ("torchvision", str(error).partition("\n")[0])
        found = f"{name} {facts[name]} doesn't fit: {words}"
        return Check("companions", "FAIL", found, companion_hint(name), facts)
    found = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts.items())
    return Check("companions", "PASS", found, facts=facts)


def unmet(requirements: list[Requirement]) -> list[str]:
    """The requirements, as text, that what is installed here does not meet; extras are left out."""
    wrong = []
    for wanted in requirements:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name}{wanted.specifier}")
    return wrong


def extras() -> Check:
    """Which extras are installed. One that is missing is no fault."""
    there = {name: all(_version(each) for each in parts) for name, parts in EXTRAS.items()}
    missing = [name for name, installed in there.items() if not installed]
    found = ", ".join(name for name, installed in there.items() if installed) or "none"
    if not missing:
        return Check("extras", "PASS", found, facts=there)
    fix = f"Only where they are wanted: pip install 'rtdmd[{','.join(missing)}]'"
    return Check("extras", "PASS", f"{found}; not installed: {', '.join(missing)}", fix, there)


def _stated() -> list[Requirement]:
    """What the package says it needs; nothing where it runs from its source without being installed."""
    try:
        return [Requirement(line) for line in metadata.requires("rtdmd") or []]
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
