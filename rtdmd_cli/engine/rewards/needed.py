"""What of a run the hub would have to send, said before anything is made: name, size, licence, command and folder.

A person without a network is told in one sentence for each thing, at once, and not after a minute of tries.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from rtdmd_cli.config.schema import ModelConfig, Preset
from rtdmd_cli.config.tune_reward import split_paths, split_weights
from rtdmd_cli.engine.families.table import MODELS
from rtdmd_cli.engine.rewards.fetch import Wanted, cached_model, wanted_of_model
from rtdmd_cli.engine.rewards.local import at_hand, cache_folder, readable
from rtdmd_cli.engine.rewards.registry import REWARDS
from rtdmd_cli.engine.storage.hub import REPOSITORY, TRANSFORMER_FILES
from rtdmd_cli.errors import EnvironmentFailure

PATIENCE = 3.0  # s, for the hub's first answer


def models(model: ModelConfig) -> list[Wanted]:
    """The hub models of a preset that are not on this machine."""
    found = [each for each in wanted_of_model(model) if _of_hub(each.source)]
    return [each for each in found if cached_model(each) is None]


def rewards(names: Iterable[str], paths: Iterable[str] = ()) -> list[Wanted]:
    """The weights of these rewards that are not on this machine. paths: of the rewards that have their own."""
    own = set(paths)
    needs = [need for name in names if name in REWARDS and name not in own for need in REWARDS[name].needs]
    return [Wanted("reward", need.source, None, need) for need in needs if not at_hand(need)]


def of_stage_2(preset: Preset) -> list[Wanted]:
    """The weights of the rewards that stage 2 trains on or measures, as `rewards`."""
    config = preset.tune_reward
    return rewards([*split_weights(config.rewards), *config.held_out], split_paths(config.reward_paths))


def _of_hub(source: str) -> bool:
    return re.fullmatch(REPOSITORY, source) is not None and not os.path.isdir(source)


def described(wanted: Wanted) -> str:
    """Its name, how large it is, and under which licence."""
    size = size_of(wanted)
    about = "of unknown size" if size is None else f"{'' if wanted.need else 'about '}{readable(size)}"
    return f"{wanted.source} ({about}; licence: {wanted.licence})"


def size_of(wanted: Wanted) -> int | None:
    """Bytes that have to be fetched, of a model roughly; None where nobody knows."""
    if wanted.need is not None:
        return wanted.need.size
    model = MODELS.get(wanted.source.lower())
    return None if model is None or model.size is None or wanted.part != "all" else int(model.size)


def sentence(wanted: Wanted) -> str:
    """What is missing, how large it is, and under which licence."""
    return f"{described(wanted)} is not on this machine."


def remedy(wanted: Wanted) -> str:
    """The command that fetches it, and the folder to copy it to."""
    files = wanted.need.files if wanted.need else TRANSFORMER_FILES if wanted.part == "transformer" else ()
    only = " ".join(f"--include '{file}'" for file in files)
    # `hf download` alone would take the single files of other tools too, twice the size
    command = f"hf download {wanted.source} {only}" if files else f"rtdmd fetch {wanted.source}"
    return (
        f"Where there is a network: {command}; then copy that repository's folder to {cache_folder(wanted.source)}, "
        "or name a folder that holds it in the preset."
    )


def reachable() -> bool:
    """Whether the hub answers within three seconds; taken for granted behind a proxy."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    there = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((there.hostname, there.port or 443), timeout=PATIENCE):
            return True
    except OSError:
        return False


def failures(missing: Sequence[Wanted]) -> list[EnvironmentFailure]:
    """One for each thing that is missing where the hub can't be reached, which is asked once; else none."""
    if not missing or reachable():
        return []
    return [EnvironmentFailure(sentence(each), remedy(each)) for each in missing]


def require(missing: Sequence[Wanted]) -> None:
    """Raise the first of `failures`, which names the others."""
    found = failures(missing)
    if found:
        others = ", ".join(each.source for each in missing[1:])
        also = f" Also missing: {others}." if others else ""
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "The hub can't be reached"
        raise EnvironmentFailure(f"{found[0].message} {why}.{also}", found[0].hint)
