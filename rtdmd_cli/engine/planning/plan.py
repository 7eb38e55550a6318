"""What a preset's training takes: memory of card and host, disk, and hours, from its phases on shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.tune_reward import split_weights
from rtdmd_cli.engine.backbones.locating import BUILTIN
from rtdmd_cli.engine.compute.device import DTYPES, resolve_device, resolve_dtype
from rtdmd_cli.engine.planning.configs import find_configs
from rtdmd_cli.engine.planning.depth import depths, extrapolated, with_depths
from rtdmd_cli.engine.planning.encoding import Encoding, encoding
from rtdmd_cli.engine.planning.gpus import UTILISATION, find_gpu, probe
from rtdmd_cli.engine.planning.host import BASES, NOTE, ON_A_CPU, PROCESS, loading
from rtdmd_cli.engine.planning.phases import GENERATOR_TURN, RUNS, Phase, phases_of
from rtdmd_cli.engine.planning.rewards import RewardCost, reward_cost
from rtdmd_cli.engine.planning.skeleton import Configs, prompt_shape
from rtdmd_cli.engine.planning.work import GRADIENT, REWARD, stage_flops
from rtdmd_cli.engine.prompts.public_sets import DATA, PREFIX
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.engine.rewards.scoring import SCORE_BATCH

StageName = Literal["distill", "tune-reward"]
STAGES: tuple[StageName, ...] = ("distill", "tune-reward")
ENCODE = "encode prompts"
GIB = 2**30
WORKSPACE = 3 * GIB // 4
"""Beside what torch allocates: the CUDA context and the libraries' workspaces. An allowance, not counted."""
PUBLISHED_PROMPTS = 25_432
"""Of PickScore's training set (method, section 5), whose file says it only once it is fetched."""
PRELOADED = 2_000_000_000
"""Encoded prompts that are held in the host's memory, bytes (`training.assembly`)."""
CACHE = 20_000_000_000
"""Bound of the cache of encoded prompts where a preset sets none, bytes."""


@dataclass(frozen=True)
class StagePlan:
    """One stage. host: bytes by phase; disk: bytes by what; flops: of the whole stage; again: a sentence on prompts that are
    encoded more than once, "" where none is."""

    stage: StageName
    phases: tuple[Phase, ...]
    host: Mapping[str, int]
    disk: Mapping[str, int]
    flops: float
    again: str = ""

    @property
    def deciding(self) -> Phase:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def card(self) -> int:
        """The card's peak, bytes, the workspace included."""
        return self.deciding.peak + WORKSPACE


@dataclass(frozen=True)
class Facts:
    """What a stage is planned with. prompts: how many there are."""

    preset: Preset
    stage: StageName
    dtype: torch.dtype
    configs: Configs
    prompts: int
    encoding: Encoding

    @property
    def row(self) -> int:
        """Bytes of an encoded prompt."""
        tokens, width, pooled = prompt_shape(self.preset.model, self.configs)
        return (tokens * width + (pooled or 0)) * self.dtype.itemsize

    @property
    def cache(self) -> int:
        """Bound of the cache, bytes."""
        bound = self.preset.hardware.cache_gb
        return CACHE if bound is None else int(bound * 1e9)

    @property
    def drawn(self) -> int:
        """How often the run takes a prompt: stage 1 for each sample, stage 2 for each group of an epoch."""
        if self.stage == "distill":
            return self.preset.distill.iterations * self.preset.distill.batch
        tuned = self.preset.tune_reward
        return tuned.epochs * tuned.images_per_epoch // tuned.images_per_prompt

    @property
    def needed(self) -> int:
        """Prompts that the run trains on, expected."""
        if self.stage == "distill":
            return round(self.prompts * (1 - (1 - 1 / self.prompts) ** self.drawn))
        return min(self.prompts, self.drawn)

    @property
    def again(self) -> str:
        """What it costs that the cache can't take all prompts: by the time a prompt comes again, it has left the cache."""
        if not self.stay:
            return ""
        where = "card" if self.encode_on_card else "CPU"
        return (
            f"{self.stage}: the cache takes {self.cache // self.row:,} of {self.prompts:,} prompts, so that one is encoded "
            f"nearly each time it is drawn, {self.drawn:,} times in all: {self.drawn * self.encoding.flops / 1e15:,.0f} "
            f"PFLOP on the {where}, of which the hours count {self.needed:,} prompts. All are encoded once with "
            f"hardware.cache_gb={math.ceil(self.prompts * self.row / 1e9)} and hardware.text_encoder=auto"
        )

    @property
    def ahead(self) -> bool:
        """Whether the cache can't take all prompts, so that they are encoded ahead, as the run comes to them."""
        return self.prompts * self.row > self.cache

    @property
    def stay(self) -> bool:
        """Whether the encoders stay while the run trains: its own prompts are too many to be encoded in one go."""
        return self.ahead and self.needed * self.row > self.cache

    @property
    def encode_on_card(self) -> bool:
        """`auto` moves encoders that stay to the CPU."""
        where = self.preset.hardware.text_encoder
        return where != "cpu" and not (where == "auto" and self.ahead)

    @property
    def rewards(self) -> dict[str, RewardCost]:
        """Of stage 2, those held out last."""
        if self.stage == "distill":
            return {}
        config, side = self.preset.tune_reward, self.preset.model.resolution
        return {name: reward_cost(name, side) for name in (*split_weights(config.rewards), *config.held_out)}


@cache
def plan_stage(preset: Preset, stage: StageName, prompts: int | None = None) -> StagePlan:
    """Plan one stage. prompts: training prompts, where it is known how many. Errors as `find_configs`."""
    configs, dtype = find_configs(preset.model), planned_dtype(preset)
    facts = Facts(
        preset,
        stage,
        dtype,
        configs,
        prompts or prompt_count(preset, stage),
        encoding(preset.model, preset.hardware, dtype, configs),
    )
    names: list[str] = []

    def count(few: Mapping[str, int]) -> dict[str, int]:
        shallow = {**configs, "transformer": with_depths(configs["transformer"], few)}
        run = RUNS[stage](preset, dtype, shallow)
        names[:] = [phase.name for phase in run.phases]
        return run.quantities()

    found = extrapolated(depths(configs["transformer"]), count)
    phases = with_rewards(facts, with_encoders(facts, phases_of(found, names), found["loaded/vae"]))
    flops = {phase.name: phase.flops for phase in phases}
    return StagePlan(
        stage,
        tuple(phases),
        host_bytes(facts, found),
        disk_bytes(facts, found),
        stage_flops(
            preset, stage, flops, (facts.needed if facts.ahead else facts.prompts) * facts.encoding.flops
        ),
        facts.again,
    )


def planned_dtype(preset: Preset) -> torch.dtype:
    """Of the base: bf16 where the preset leaves it open, but for the built-in model, which is made for the CPU."""
    name = preset.hardware.dtype
    if name == "auto":
        name = "fp32" if preset.model.path in BUILTIN else "bf16"
    return DTYPES[name]


def prompt_count(preset: Preset, stage: StageName) -> int:
    """Of the training prompts, as far as it is known without reading them."""
    source = preset.distill.prompts if stage == "distill" else preset.tune_reward.prompts
    known = DATA.get(source.removeprefix(PREFIX)) if source.startswith(PREFIX) else None
    return (known.prompts if known else None) or PUBLISHED_PROMPTS


def with_encoders(facts: Facts, phases: Sequence[Phase], vae: int) -> list[Phase]:
    """The phase of encoding before the others, and the encoders beside all of them where they stay on the card.

    vae: its bytes. It is there while prompts are encoded; the transformer is too where they are encoded ahead of the
    iterations.
    """
    cost, on_card = facts.encoding, facts.encode_on_card
    if not on_card:
        return list(phases)
    base = phases[0].kinds["weights"] if facts.ahead else vae
    first = Phase(ENCODE, {"weights": base + cost.weights, "activations": cost.activations}, cost.flops)
    beside = cost.weights if facts.stay else 0
    return [first, *(heavier(phase, beside, 0) for phase in phases)]


def with_rewards(facts: Facts, phases: Sequence[Phase]) -> list[Phase]:
    """The phases of scoring and of the rewards' gradients; beside the others all reward models, or none of them."""
    costs, config = facts.rewards, facts.preset.tune_reward
    if not costs:
        return list(phases)
    keep = sum(cost.weights for cost in costs.values()) if config.rewards_in_memory == "all" else 0
    found = [heavier(phase, keep if phase.name != ENCODE else 0, 0) for phase in phases]
    count, size = min(SCORE_BATCH, config.images_per_epoch), config.micro_batch or config.images_per_epoch
    picture = 3 * facts.preset.model.resolution**2 * 4
    held = {kind: phases[-1].kinds[kind] for kind in ("weights", "adapters", "gradients", "optimiser")}

    def judged(name: str, cost: RewardCost, activations: int, flops: int) -> Phase:
        weights = held["weights"] + (keep or cost.weights)
        return Phase(name, held | {"weights": weights, "activations": activations}, flops)

    for name, cost in costs.items():
        found.append(judged(REWARD + name, cost, count * (cost.activations + picture), count * cost.flops))
    for name in split_weights(config.rewards) if config.backprop_weight else ():
        if find_reward(name).differentiable:  # a backward pass costs about as much as a forward one
            cost = costs[name]
            taken = size * (cost.graph + 2 * picture)
            found.append(judged(GRADIENT + name, cost, taken, 2 * size * cost.flops))
    return found


def heavier(phase: Phase, weights: int, activations: int) -> Phase:
    """A phase with more of both."""
    kinds = dict(phase.kinds)
    kinds["weights"] += weights
    kinds["activations"] += activations
    return Phase(phase.name, kinds, phase.flops)


def host_bytes(facts: Facts, found: Mapping[str, int]) -> dict[str, int]:
    """By phase: what loading takes, see `host`, and what is held while the stage trains."""
    preset, cost = facts.preset, facts.encoding
    bases = {name: found[key] for name in BASES if (key := f"loaded/{name}") in found}
    held = min(facts.prompts * facts.row, PRELOADED)
    held += cost.weights if facts.stay and not facts.encode_on_card else 0
    packed = preset.hardware.text_encoder == "int8"
    phases = loading(preset.model, facts.dtype, bases, cost.parts, packed, facts.encode_on_card, held)
    if facts.stage == "tune-reward":
        side = preset.model.resolution
        latents = (len(preset.sampler.raw_steps) + 1) * found["latent"] * 4
        pictures = 1 + bool(preset.tune_reward.backprop_weight)  # and as many numbers of their gradient
        held += preset.tune_reward.images_per_epoch * (latents + pictures * 3 * side * side * 4)
    return phases | {"train": PROCESS + held}


def disk_bytes(facts: Facts, found: Mapping[str, int]) -> dict[str, int]:
    """Downloads (of weights in the base's dtype), the cache of encoded prompts, and checkpoints."""
    preset = facts.preset
    config = preset.distill if facts.stage == "distill" else preset.tune_reward
    networks = sum(size for name, size in found.items() if name.startswith("loaded/"))
    downloads = 0 if preset.model.path in BUILTIN else networks + facts.encoding.loaded
    needs = {need for name in facts.rewards for need in find_reward(name).needs if need.source}
    downloads += sum({(need.source, need.files): need.size for need in needs}.values())
    frozen = 4 * found["trained"] if facts.stage == "tune-reward" else 0
    checkpoint = 6 * found["trained"] + found[f"{GENERATOR_TURN}/optimiser"] + frozen
    cache = min(facts.prompts * facts.row, facts.cache)
    return {"downloads": downloads, "cache": cache, "checkpoints": checkpoint * (config.keep + 1)}


@dataclass(frozen=True)
class Plan:
    """Stages of a preset. rate: operations a second that are taken to be reached; assumptions: how it comes about."""

    preset: Preset
    stages: tuple[StagePlan, ...]
    rate: float
    assumptions: Sequence[str] = field(default=())

    def hours(self, stage: StagePlan) -> float:
        """Of a stage."""
        return stage.flops / self.rate / 3600

    def totals(self, stage: StagePlan) -> dict[str, Any]:
        """Of one stage: `stored.TOTALS`."""
        return {
            "card_peak_gib": gib(stage.card),
            "decides": stage.deciding.name,
            "host_peak_gib": gib(max(stage.host.values())),
            "disk_gib": gib(sum(stage.disk.values())),
            "hours": round(self.hours(stage), 2),
            "hours_on": "; ".join(self.assumptions).removeprefix("hours: "),
        }

    def figures(self) -> dict[str, Any]:
        """For JSON: GiB, hours, and each phase with its kinds."""
        largest = max(self.stages, key=lambda stage: stage.card)
        on_cpu = self.preset.hardware.device == "cpu"
        shared = sum(max(stage.disk[name] for stage in self.stages) for name in ("downloads", "cache"))
        disk = shared + sum(stage.disk["checkpoints"] for stage in self.stages)
        return {
            "card_peak_gib": gib(largest.card),
            "decides": f"{largest.stage}: {largest.deciding.name}",
            "host_peak_gib": gib(max(max(stage.host.values()) for stage in self.stages)),
            "disk_gib": gib(disk),
            "hours": round(sum(self.hours(stage) for stage in self.stages), 2),
            "phases": [row for stage in self.stages for row in rows(stage)],
            "stages": {
                stage.stage: {
                    "card_peak_gib": gib(stage.card),
                    "host_peak_gib": gib(max(stage.host.values())),
                    "disk_gib": {name: gib(size) for name, size in stage.disk.items()},
                    "hours": round(self.hours(stage), 2),
                    "flops": stage.flops,
                }
                for stage in self.stages
            },
            "assumptions": [
                *self.assumptions,
                *(stage.again for stage in self.stages if stage.again),
                NOTE,
                *([ON_A_CPU] if on_cpu else []),
            ],
        }


def rows(stage: StagePlan) -> list[dict[str, Any]]:
    """A stage's phases: GiB on the card, or of the host."""
    workspace = {"workspace": gib(WORKSPACE)}
    card = [
        {
            "stage": stage.stage,
            "phase": phase.name,
            "where": "card",
            "peak_gib": gib(phase.peak + WORKSPACE),
            "kinds_gib": {name: gib(size) for name, size in phase.kinds.items()} | workspace,
        }
        for phase in stage.phases
    ]
    host = [
        {"stage": stage.stage, "phase": name, "where": "host", "peak_gib": gib(size)}
        for name, size in stage.host.items()
    ]
    return [*host[:-1], *card, *host[-1:]]


def gib(size: float) -> float:
    """Bytes as GiB, to a hundredth."""
    return round(size / GIB, 2)


def make_plan(
    preset: Preset, stages: Sequence[StageName], gpu: str | None = None, prompts: int | None = None
) -> Plan:
    """Plan these stages. gpu: a card's name; None for this machine, whose rate is measured for two seconds.

    UsageError for a card that is not in the table; else errors as `plan_stage`.
    """
    rate, assumptions = planned_rate(preset, gpu)
    return Plan(preset, tuple(plan_stage(preset, stage, prompts) for stage in stages), rate, assumptions)


def planned_rate(preset: Preset, gpu: str | None) -> tuple[float, list[str]]:
    """Operations a second that are taken to be reached, and how that number comes about."""
    if gpu is not None:
        card = find_gpu(gpu)
        rate = f"the dense bf16 rate of {card.name}, {card.tflops:g} TFLOP/s ({card.source})"
        return card.tflops * 1e12 * UTILISATION, [f"hours: {UTILISATION:.0%} of {rate}; an estimate"]
    device = resolve_device(preset.hardware.device)
    dtype = resolve_dtype(preset.hardware.dtype, device)
    found, short = probe(device, dtype), str(dtype).removeprefix("torch.")
    rate = f"{found / 1e12:.3g} TFLOP/s, the {short} products measured on this machine's {device}"
    return found * UTILISATION, [f"hours: {UTILISATION:.0%} of {rate}; an estimate"]
