"""The schema's defaults are the published values, and its rules hold."""

import pytest
from pydantic import ValidationError

from rtdmd_cli.config import keys
from rtdmd_cli.config.schema import DistillConfig, LoraConfig, ModelConfig, Preset, SamplerConfig


def preset(**sections: object) -> Preset:
    model = {"family": "sd3", "path": "builtin:shapes", "resolution": 32}
    return Preset.model_validate({"name": "x", "model": model, **sections})


def test_defaults_are_the_published_values() -> None:
    """method.md, section 5 and section 3."""
    p = preset()
    d, lora = p.distill, p.distill.lora
    assert (d.iterations, d.batch, d.fake_per_generator) == (15_000, 72, 10)
    assert (d.generator_lr, d.fake_lr, d.weight_decay) == (3e-5, 3e-5, 0.0)
    assert (d.betas, d.eps, d.grad_clip, d.seed) == ((0.9, 0.999), 1e-8, 1.0, 42)
    assert (d.consistency_weight, d.consistency_max_step, d.max_weight) == (0.01, 200, 10.0)
    assert (d.t_margin, d.t_min, d.t_max, d.ema_decay, d.ema_warmup) == (0.01, 0.02, 0.98, 0.904, False)
    assert (d.boundaries, d.consistency_batched, d.normaliser) == ("one", False, "published")
    assert (lora.rank, lora.alpha, len(lora.targets)) == (32, 64, 8)
    assert (p.sampler.raw_steps, p.sampler.eta) == ((1000, 750, 500, 250), 0.9)
    assert (p.model.guidance, p.model.text_length, p.model.teacher_steps) == (7.0, 128, 50)


def test_every_key_has_a_description() -> None:
    for path, field in keys().items():
        assert field.description and not field.description.endswith("."), path


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        preset().distill.batch = 3


def test_a_whole_number_is_a_number_but_not_the_reverse() -> None:
    assert DistillConfig(grad_clip=2).grad_clip == 2.0
    with pytest.raises(ValidationError):
        DistillConfig.model_validate({"batch": 2.0})


@pytest.mark.parametrize("steps", [(1000,), (1000, 1), (1000, 750, 500, 250, 1)])
def test_raw_steps_that_fall(steps: tuple[int, ...]) -> None:
    assert SamplerConfig.model_validate({"raw_steps": list(steps)}).raw_steps == steps


@pytest.mark.parametrize("steps", [(), (999, 500), (1000, 1000), (1000, 250, 500), (1000, 0), (1000, 500.0)])
def test_raw_steps_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        SamplerConfig.model_validate({"raw_steps": list(steps)})


@pytest.mark.parametrize("targets", [[], ["to_q", "to_q"], ["to q"], [""], ["_"], [3]])
def test_targets_refused(targets: list[object]) -> None:
    with pytest.raises(ValidationError):
        LoraConfig.model_validate({"targets": targets})


@pytest.mark.parametrize(
    "values",
    [
        {"batch": 8, "micro_batch": 3},
        {"t_min": 0.5, "t_max": 0.5},
        {"betas": [0.9, 1.0]},
        {"generator_lr": 0.0},
        {"generator_lr": float("nan")},
        {"grad_clip": float("inf")},
        {"ema_decay": 1.0},
        {"iterations": 0},
        {"iterations": True},
        {"boundaries": "all"},
        {"prompts": "two\nlines"},
        {"seed": -1},
        {"sample_every": -1},
        {"keep": 0},
    ],
)
def test_distill_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DistillConfig.model_validate(values)


def test_micro_batch_that_divides() -> None:
    assert DistillConfig(batch=8, micro_batch=2).micro_batch == 2


@pytest.mark.parametrize("resolution", [8, 33, 2056])
def test_resolution_refused(resolution: int) -> None:
    with pytest.raises(ValidationError):
        ModelConfig(family="sd3", path="builtin:shapes", resolution=resolution)


@pytest.mark.parametrize("name", ["", "a b", "../a", "-a", "a" * 65, "a\n"])
def test_name_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        preset(name=name)
