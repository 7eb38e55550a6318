"""What is planned, against what is there: the built-in model's real turns, and counting every block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute.device import resolve_dtype
from rtdmd_cli.engine.distill.recipe import update_fake_score, update_generator
from rtdmd_cli.engine.distill.run import build_trainer
from rtdmd_cli.engine.planning import configs, fitting, gpus
from rtdmd_cli.engine.planning.account import Account
from rtdmd_cli.engine.planning.depth import extrapolated
from rtdmd_cli.engine.planning.host import ON_A_CPU
from rtdmd_cli.engine.planning.phases import DECODE_GRADIENT, FAKE_TURN, GENERATOR_TURN, Phase, distill_run
from rtdmd_cli.engine.planning.plan import ENCODE, GIB, Plan, StageName, StagePlan, plan_stage
from rtdmd_cli.engine.planning.skeleton import tensors_of
from rtdmd_cli.engine.tune_reward.pull import latent_gradient
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError

CPU = torch.device("cpu")
PLAIN = ("hardware.float32_matmul=highest", "hardware.mixed_precision=none", "distill.batch=4")


def built_in(*settings: str) -> Preset:
    return load_preset("shapes-4step-lora", [*PLAIN, *settings], {}).preset


def really_held(preset: Preset) -> dict[str, int]:
    """Peaks of live storages in both turns of stage 1, with optimiser states and gradients there, in bytes."""
    dtype = resolve_dtype(preset.hardware.dtype, CPU)
    backbone = load_backbone(preset.model, CPU, dtype, preset.hardware)
    cond, empty = (backbone.encode([text]) for text in ("a photo of a red ring", ""))
    backbone.drop_text_encoders()
    account, peaks, prompts = Account(), {}, [0] * preset.distill.batch
    vae: Any = backbone
    account.hold(tensors_of([backbone.transformer, vae._pipe.vae]))
    with account:
        trainer = build_trainer(backbone, preset, 1, cond.select, empty)
        for _ in range(2):
            for name, update in ((FAKE_TURN, update_fake_score), (GENERATOR_TURN, update_generator)):
                account.restart()
                update(trainer, 0, prompts)
                peaks[name] = account.peak
    return peaks


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("distill.micro_batch=2", "hardware.gradient_checkpointing=true"),
        ("distill.train=full", "hardware.dtype=bf16"),
    ],
    ids=["at once", "in parts", "every weight, on a bf16 base"],
)
def test_the_built_in_model_takes_what_was_planned(settings: tuple[str, ...]) -> None:
    """Within 10%, in both turns of stage 1."""
    preset = built_in(*settings)
    planned = {phase.name: phase.peak for phase in plan_stage(preset, "distill").phases}
    for name, peak in really_held(preset).items():
        assert planned[name] == pytest.approx(peak, rel=0.1), name


def test_a_cpu_is_planned_as_it_computes() -> None:
    """In bf16 its VAE is in float32, and its layers multiply so where the processor has no bf16 products."""
    preset = built_in("hardware.dtype=bf16", "hardware.device=cpu", "tune_reward.micro_batch=4")
    planned = {phase.name: phase.kinds["activations"] for phase in plan_stage(preset, "tune-reward").phases}
    backbone: Any = load_backbone(preset.model, CPU, torch.bfloat16, preset.hardware)
    backbone.drop_text_encoders()
    side, account = preset.model.resolution, Account()
    latents, pictures = torch.zeros(4, *backbone.latent_shape(side, side)), torch.zeros(4, 3, side, side)
    before = account.hold([*tensors_of([backbone._pipe.vae]), latents, pictures])
    with account:
        latent_gradient(backbone, latents, pictures)
    assert (
        Plan(preset, (plan_stage(preset, "tune-reward"),), rate=1e9).figures()["assumptions"][-1] == ON_A_CPU
    )
    assert planned[DECODE_GRADIENT] == pytest.approx(account.peak - before, rel=0.1)


def test_a_few_blocks_tell_of_all() -> None:
    """Peaks and operations of six blocks, from two and three, are those of counting six."""
    preset, found = built_in(), configs.find_configs(built_in().model)

    def count(few: Any) -> dict[str, int]:
        deep = found | {"transformer": found["transformer"] | {"num_layers": few["num_layers"]}}
        return distill_run(preset, torch.float32, deep).quantities()

    told, counted = extrapolated({"num_layers": 6}, count), count({"num_layers": 6})
    assert told.keys() == counted.keys()
    for name, value in counted.items():
        assert told[name] == pytest.approx(value, rel=0.01, abs=1e5), name


def test_the_transformer_lies_beside_the_encoders_only_where_prompts_are_encoded_ahead() -> None:
    """Else it comes when they have left; what the cache takes decides."""
    settings = "hardware.text_encoder=int8", "distill.iterations=1", "distill.batch=1"
    alone, beside = (
        plan_stage(built_in(*settings, f"hardware.cache_gb={size}"), "distill").phases for size in (20, 1e-3)
    )
    assert alone[0].name == beside[0].name == ENCODE and alone[1].kinds == beside[1].kinds
    vae = alone[1].kinds["weights"] - (beside[0].kinds["weights"] - alone[0].kinds["weights"])
    backbone: Any = load_backbone(built_in().model, CPU, torch.float32, built_in().hardware)
    assert vae == pytest.approx(sum(tensor.nbytes for tensor in tensors_of([backbone._pipe.vae])), rel=0.01)


def test_a_cache_that_is_too_small_is_told_with_what_it_costs() -> None:
    settings = "distill.iterations=1000", "distill.batch=10", "hardware.text_encoder=auto"
    small, large = (
        plan_stage(built_in(*settings, f"hardware.cache_gb={size}"), "distill", 500) for size in (1e-3, 20)
    )
    assert (
        "of 500 prompts" in small.again
        and "10,000 times in all" in small.again
        and "on the CPU" in small.again
    )
    assert Plan(built_in(), (small,), rate=1e9).figures()["assumptions"].count(small.again) == 1
    assert large.again == ""


def test_figures() -> None:
    plan = Plan(built_in(), (plan_stage(built_in(), "distill"),), rate=1e9)
    found = plan.figures()
    peaks = [row["peak_gib"] for row in found["phases"] if row["where"] == "card"]
    assert found["card_peak_gib"] == max(peaks) and found["decides"].startswith("distill: ")
    assert found["hours"] > 0 and found["host_peak_gib"] > 1
    assert sum(plan.stages[0].disk.values()) > 0
    for row in found["phases"]:
        if row["where"] == "card":
            assert sum(row["kinds_gib"].values()) == pytest.approx(row["peak_gib"], abs=0.05)


def test_a_card_that_is_not_known_names_the_nearest() -> None:
    assert gpus.find_gpu("RTX 4090").memory == 24
    with pytest.raises(UsageError, match="no GPU `4091`") as caught:
        gpus.find_gpu("4091")
    assert "`4090`" in caught.value.hint


def test_a_folder_that_lacks_a_config_says_which(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text("{}", encoding="utf-8")
    model = built_in().model.model_copy(update={"path": str(tmp_path)})
    with pytest.raises(DataError, match=r"lacks vae/config\.json"):
        configs.find_configs(model)


def test_a_model_that_is_not_here_is_told() -> None:
    model = built_in().model.model_copy(update={"path": "someone/something"})
    with pytest.raises(EnvironmentFailure, match="not known here"):
        configs.find_configs(model)


def simple_plan(preset: Preset, stage: StageName) -> StagePlan:
    """Four GiB of weights in the plain base, and one of activations a picture, half of it where they are recomputed."""
    hardware = preset.hardware
    weights = {"plain": 4.0, "int8": 2.0, "nf4": 1.0}[hardware.base]
    each = 0.5 if hardware.gradient_checkpointing else 1.0
    kinds = {"weights": weights * GIB, "activations": each * (preset.distill.micro_batch or 1) * GIB}
    kinds["optimiser"] = (1.0 if hardware.optimizer == "adamw" else 0.25) * GIB
    phase = Phase(FAKE_TURN, {name: int(size) for name, size in kinds.items()}, 1)
    return StagePlan(stage, (phase,), {"load": 0}, {}, 1.0)


def test_a_saving_that_helps_later_comes_before_a_dearer_one() -> None:
    """Decoding is the largest phase only once activations are computed again; then tiles come before 8 bits."""

    def two_phases(preset: Preset, stage: StageName) -> StagePlan:
        turn, hardware = simple_plan(preset, stage), preset.hardware
        taken = {"weights": (1.0 if hardware.vae_tiling else 5.5) * GIB}
        decode = Phase("decode", {name: int(size) for name, size in taken.items()}, 1)
        return StagePlan(stage, (*turn.phases, decode), {"load": 0}, {}, 1.0)

    found = fitting.fit(built_in(), ("distill",), 6.25, two_phases).preset.hardware
    assert (found.gradient_checkpointing, found.vae_tiling, found.base) == (True, True, "plain")


def test_fitting_gives_up_what_costs_least_and_fills_the_card(tmp_path: Path) -> None:
    preset, said = built_in("distill.batch=8"), list[str]()
    roomy = fitting.fit(preset, ("distill",), 24.0, simple_plan)
    assert roomy.preset.hardware.base == "plain" and not roomy.preset.hardware.gradient_checkpointing
    assert roomy.preset.distill.micro_batch == 8 == roomy.preset.distill.batch
    tight = fitting.fit(preset, ("distill",), 6.25, simple_plan, said.append)  # 5.75 GiB without the spare
    hardware = tight.preset.hardware
    assert (hardware.optimizer, hardware.gradient_checkpointing, hardware.base) == (
        "adamw8bit",
        True,
        "plain",
    )
    assert not hardware.vae_tiling  # it would save nothing
    assert tight.preset.distill.micro_batch == 1 and len(tight.reasons) == 3
    assert said[-2] == tight.reasons[1] and "counting with hardware.base: nf4" not in said
    with pytest.raises(EnvironmentFailure, match=r"0\.\d+ GiB too much"):
        fitting.fit(preset, ("distill",), 2.0, simple_plan)
    path = tmp_path / "own.yaml"
    fitting.write(tight, "shapes-4step-lora", path)
    again = load_preset(str(path), [], {}).preset
    assert again.hardware == hardware and again.distill == tight.preset.distill
