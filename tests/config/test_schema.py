"""The schema's defaults are the published values, and its rules hold."""

from typing import Any

import pytest
from pydantic import ValidationError

from rtdmd_cli.config import keys
from rtdmd_cli.config.schema import DistillConfig, ModelConfig, Preset, SamplerConfig
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.config.tune_reward import TuneRewardConfig, split_paths, split_weights


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


def test_stage_2_defaults_are_the_published_values() -> None:
    """method.md, sections 4 and 5."""
    t = preset().tune_reward
    assert t.rewards == ("clipscore", "hpsv2", "pickscore", "geneval-soft")
    assert (t.epochs, t.images_per_epoch, t.images_per_prompt, t.subset_steps) == (1000, 512, 16, 2)
    assert (t.generator_lr, t.fake_lr, t.generator_weight_decay, t.fake_weight_decay) == (
        3e-6,
        3e-5,
        1e-4,
        0.0,
    )
    assert (t.policy_weight, t.policy_clip, t.logprob, t.advantage_clip) == (1.0, 1e-5, "reduced", 5.0)
    assert (t.dmd_weight, t.backprop_weight, t.backprop_margin, t.backprop_steps) == (1e-3, 1e-4, 3.0, 1)
    assert (t.matching, t.matching_images, t.tilt) == ("last", None, 0.0)
    assert t.matching_backprop_steps is None
    assert (t.kl_weight, t.consistency_weight, t.ema_decay, t.grad_clip, t.seed) == (0.0, 0.01, 0.74, 1.0, 42)
    assert (t.lora.rank, t.lora.alpha, len(t.lora.targets), t.lora.dtype) == (32, 64, 8, "float32")
    assert t.ema_decay / (1 - t.ema_decay) == pytest.approx(2.8, abs=0.05)  # epochs, the published mean age


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rewards": []}, "at least one"),
        ({"rewards": ["a", "a=2"]}, "each reward once"),
        ({"rewards": ["=2"]}, "each reward once"),
        ({"rewards": ["a="]}, "must give a a number as weight, not ''"),
        ({"rewards": ["a=b"]}, "must give a a number as weight, not 'b'"),
        ({"rewards": ["a=1=2"]}, "must give a a number as weight, not '1=2'"),
        ({"rewards": ["a=0"]}, "above 0"),
        ({"rewards": ["a=-1"]}, "above 0"),
        ({"rewards": ["a=nan"]}, "above 0"),
        ({"rewards": ["a=inf"]}, "above 0 and at most"),
        ({"rewards": ["a\nb"]}, "each reward once"),
        ({"rewards": [3]}, "string"),
        ({"held_out": ["a", "a"]}, "each reward once"),
        ({"held_out": [" "]}, "each reward once"),
        ({"rewards": ["a=2"], "held_out": ["a"]}, "names a, which `tune_reward.rewards` trains on"),
        ({"reward_paths": ["a"]}, "NAME=FOLDER"),
        ({"reward_paths": ["a="]}, "NAME=FOLDER"),
        ({"reward_paths": ["=b"]}, "NAME=FOLDER"),
        ({"reward_paths": ["a=b", "a=c"]}, "each reward once"),
        ({"images_per_epoch": 6, "images_per_prompt": 4}, "images_per_prompt` .4. must divide"),
        ({"images_per_epoch": 8, "images_per_prompt": 4, "micro_batch": 3}, "micro_batch` .3. must divide"),
        ({"images_per_prompt": 1}, "greater than or equal to 2"),
        ({"policy_weight": 0, "dmd_weight": 0, "backprop_weight": 0}, "are all 0"),
        ({"matching": "first"}, "'last' or 'distill'"),
        ({"tilt": -0.1}, "greater than or equal to 0"),
        ({"matching_images": 8}, "matching_images` .8. needs `tune_reward.matching: distill`"),
        (
            {"matching_backprop_steps": 2},
            "matching_backprop_steps` .2. needs `tune_reward.matching: distill`",
        ),
        ({"policy_clip": 0.0}, "greater than 0"),
        ({"backprop_steps": 0}, "greater than or equal to 1"),
        ({"rewards_in_memory": "some"}, "'all' or 'one'"),
        ({"prompts": "two\nlines"}, "prompts"),
        ({"eval_prompts": ""}, "eval_prompts"),
        ({"max_bad_share": 1.0}, "less than 1"),
        ({"reward_seconds": 0.0}, "greater than 0"),
        ({"watch": {"images_per_prompt": 1}}, "greater than or equal to 2"),
        ({"watch": {"features": "two\nlines"}}, "line breaks"),
        ({"watch": {"max_held_out_fall": 0.0}}, "greater than 0"),
        ({"watch": {"limit": 1}}, "Extra inputs"),
    ],
)
def test_tune_reward_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TuneRewardConfig.model_validate(values)


def test_a_single_term_may_be_on() -> None:
    off = {"policy_weight": 0.0, "dmd_weight": 0.0, "backprop_weight": 0.0}
    for term in off:
        assert TuneRewardConfig.model_validate(off | {term: 1.0}).kl_weight == 0


def test_weights_and_paths() -> None:
    assert split_weights(["hpsv2=0.5", "pickscore", "my.module:Mine=2"]) == {
        "hpsv2": 0.5,
        "pickscore": 1.0,
        "my.module:Mine": 2.0,
    }
    assert split_paths(["a=/models/x=1", "b=owner/name"]) == {"a": "/models/x=1", "b": "owner/name"}


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_quantised_weights_are_not_trained(base: str) -> None:
    """One sentence that names both keys; adapters on such a base are allowed."""
    with pytest.raises(ValidationError, match=rf"`distill.train: full` needs .*weights in {base} can't"):
        preset(distill={"train": "full"}, hardware={"base": base})
    assert preset(hardware={"base": base}).distill.train == "lora"


def test_gradients_through_several_steps_need_one_backward_pass() -> None:
    with pytest.raises(
        ValidationError, match=r"`distill.backprop_steps` .2. needs .*boundaries_batched: true"
    ):
        preset(distill={"backprop_steps": 2, "boundaries": "every"})
    assert preset(distill={"backprop_steps": 2}).distill.boundaries == "one"
    with pytest.raises(ValidationError, match=r"`distill.backprop_steps` is 5; the sampler has 4 steps"):
        preset(distill={"backprop_steps": 5})
    assert preset().distill.backprop_steps == 1


def test_so_do_those_of_stage_2s_matching() -> None:
    def matched(steps: int, **distill: Any) -> Preset:
        return preset(distill=distill, tune_reward={"matching": "distill", "matching_backprop_steps": steps})

    with pytest.raises(
        ValidationError, match=r"`tune_reward.matching_backprop_steps` .2. needs .*boundaries_batched: true"
    ):
        matched(2, boundaries="every")
    with pytest.raises(
        ValidationError, match=r"`tune_reward.matching_backprop_steps` is 5; the sampler has 4"
    ):
        matched(5)
    assert matched(1, boundaries="every").tune_reward.matching_backprop_steps == 1
    assert matched(4, boundaries="every", boundaries_batched=True).distill.backprop_steps == 1
