"""What `--dry-run` checks beside the preset: everything at once that would stop the run before it trains. No torch."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rtdmd_cli.cli import console
from rtdmd_cli.config.loader import Resolved
from rtdmd_cli.config.places import is_single_file, where_to_look
from rtdmd_cli.config.schema import SHARED_BASE, ModelConfig, Preset
from rtdmd_cli.engine.compute.driver import cuda_at_hand
from rtdmd_cli.errors import DataError, EnvironmentFailure, RtdmdError, UsageError, companion_hint

HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
TORCHAO_BOUND = re.compile(r"TORCHAO_MINIMUM_VERSION = [\w.]+\(\"([\d.]+)\"\)")
OTHER_DEVICE = "Use --device cpu, or --device auto to take what is there."


def findings(resolved: Resolved, stage_2: bool, prompts: Sequence[str]) -> list[RtdmdError]:
    """What would stop the run, in the order in which it would meet it.

    prompts: what the preset names them by, those of measurements too.
    """
    from rtdmd_cli.engine.prompts.reading import read_prompt_set
    from rtdmd_cli.engine.training.trackers import require_tracker

    preset = resolved.preset
    checks: list[Callable[[], Any]] = [partial(read_prompt_set, source) for source in prompts]
    checks += [
        lambda: require_device(preset.hardware.device),
        lambda: require_tracker(preset.hardware.tracker),
        lambda: require_adapters(preset),
        lambda: require_folders(preset.model),
    ]
    found = []
    for check in checks:
        try:
            check()
        except RtdmdError as error:
            found.append(error)
    if not (stage_2 or names_the_hub(preset.model)):
        return found
    from rtdmd_cli.engine.rewards import needed  # and with it the hub's client

    missing = [*(needed.of_stage_2(preset) if stage_2 else []), *needed.models(preset.model)]
    return [*found, *needed.failures(missing)]


def downloads(resolved: Resolved, stage_2: bool) -> list[str]:
    """What the hub would send first, with sizes and licences; one sentence each."""
    preset = resolved.preset
    if not (stage_2 or names_the_hub(preset.model)):
        return []
    from rtdmd_cli.engine.rewards import needed

    missing = [*(needed.of_stage_2(preset) if stage_2 else []), *needed.models(preset.model)]
    return [needed.sentence(each) for each in missing]


def names_the_hub(model: ModelConfig) -> bool:
    """Whether a part of the model may be a repository of the hub."""
    parts = (model.path, model.components or "", model.generator_init)
    return any(re.fullmatch(HUB_ID, part) for part in parts)


def report(result: dict[str, object], found: Sequence[RtdmdError], as_json: bool) -> None:
    """Print the plan, then everything that was found; raises the first of it."""
    console.show(result | {"findings": [each.message for each in found] or None}, as_json)
    for each in found[1:]:
        console.say(f"error: {each.message}\nhint: {each.hint}")
    if found:
        raise found[0]


def device_of(name: str) -> str:
    """The device that a preset's word stands for: "cuda", "cpu" or "mps"."""
    return ("cuda" if cuda_at_hand() else "cpu") if name == "auto" else name


def require_device(name: str) -> None:
    """EnvironmentFailure where the device isn't there, as `engine.compute.device` would find with torch."""
    if name == "cuda" and not cuda_at_hand():
        raise EnvironmentFailure(
            "No cuda device can be used: there is none, or this torch is built without it.", OTHER_DEVICE
        )
    if name == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise EnvironmentFailure("No mps device was found on this machine.", OTHER_DEVICE)


def require_adapters(preset: Preset) -> None:
    """EnvironmentFailure where adapters are trained beside a torchao older than peft takes, which makes no layer then."""
    if preset.distill.train != "lora" or find_spec("torchao") is None:
        return
    from importlib import metadata

    from packaging.version import Version

    try:
        found = metadata.version("torchao")
    except metadata.PackageNotFoundError:  # peft then does without it, too
        return
    bound = torchao_bound()
    if bound is not None and Version(found) < Version(bound):
        raise EnvironmentFailure(
            f"torchao {found} doesn't fit: peft, which makes the adapters, takes {bound} or newer.",
            companion_hint("torchao"),
        )


def torchao_bound() -> str | None:
    """The oldest torchao that peft takes, read from its source: importing it takes seconds.

    None where it is written otherwise; peft then says so itself once it makes a layer.
    """
    peft = find_spec("peft")
    if peft is None or peft.origin is None:
        return None
    source = Path(peft.origin).parent / "import_utils.py"
    bound = TORCHAO_BOUND.search(source.read_text(encoding="utf-8")) if source.is_file() else None
    return None if bound is None else bound[1]


def require_folders(model: ModelConfig) -> None:
    """DataError for a model's folder or file that does not exist, as the run would raise it; hub ids are not looked at."""
    named = [("model.path", model.path), ("model.components", model.components or "")]
    if model.generator_init != SHARED_BASE:
        named.append(("model.generator_init", model.generator_init))
    for key, text in named:
        _require_folder(key, text)
    if is_single_file(model.path) and model.components is None:
        raise UsageError(
            f"{model.path} holds a transformer, and nothing says where the rest of the model is.",
            "Name the model it was tuned from, as in --set model.components=FOLDER_OR_HUB_ID",
        )


def _require_folder(key: str, text: str) -> None:
    path = Path(text).expanduser()
    hub = re.fullmatch(HUB_ID, text) is not None and not is_single_file(text)
    if not text or text.startswith("builtin:") or path.exists() or hub:
        if path.is_dir() and key == "model.path" and not (path / "model_index.json").is_file():
            raise DataError(f"{path} holds no model: model_index.json is missing.", f"Check {key}.")
        return
    kind = "file" if is_single_file(text) else "folder"
    raise DataError(f"There is no model {kind} {json.dumps(text)[1:-1]}.", where_to_look(key, text))
