"""Training of the built-in models on tiny settings: each stage runs, resumes exactly, and is packaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from rtdmd_cli.engine.judges.features import ClipScorer
from rtdmd_cli.engine.judges.geneval import Detection, judge
from rtdmd_cli.errors import DataError, UsageError
from rtdmd_cli.shapes.grammar import Caption, Thing, combination, requirement, scene_for
from rtdmd_cli.shapes.prompts import benchmark, held_out_combinations, training_captions
from rtdmd_cli.shapes.render import Scene
from scripts import train_shapes
from scripts.shapes_training import clip, loop, stages, teacher, vae
from scripts.shapes_training.stages import Settings
from tests.commands import start_server

STEPS = (
    2  # of a few seconds each: the teacher's optimiser multiplies in bf16, which this CPU may have to emulate
)


def tiny(work: Path) -> Settings:
    """Two steps of everything, a state after each."""
    return Settings(
        work=work,
        vae_steps=STEPS,
        vae_pictures=16,
        vae_batch=4,
        teacher_steps=STEPS,
        teacher_pictures=16,
        teacher_batch=4,
        clip_steps=STEPS,
        clip_pairs=12,
        clip_batch=4,
        save_every=1,
        out=work / "weights",
    )


@pytest.fixture(scope="module", autouse=True)
def few_figures() -> Any:
    """Stages print figures of the whole benchmark; every 40th prompt will do here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (stages, clip):
            patch.setattr(module, "benchmark", lambda: benchmark()[::40])
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A work folder with every stage done."""
    settings = tiny(tmp_path_factory.mktemp("shapes"))
    for run in stages.STAGES.values():
        run(settings)
    return settings


def state(folder: Path) -> bytes:
    """The state in a training folder, which must be the last one and the only one."""
    assert json.loads((folder / "step.json").read_text()) == {"step": STEPS}
    (path,) = folder.glob("state-*")
    return path.read_bytes()


def break_off_at(step: int, run: Callable[[Settings], None], settings: Settings) -> None:
    """Run a stage until it has saved its state of that step."""
    write = loop.save_state

    def save(folder: Path, model: Any, optimizers: Any, extra: Any, at: int) -> None:
        write(folder, model, optimizers, extra, at)
        if at == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", save)
        with pytest.raises(KeyboardInterrupt):
            run(settings)


@pytest.mark.parametrize("stage", ["vae", "teacher", "clip"])
def test_a_stage_goes_on_exactly_where_it_was_broken_off(
    trained: Settings, tmp_path: Path, stage: str
) -> None:
    settings = tiny(tmp_path)
    if stage == "teacher":
        for name in ("vae", "latents.safetensors", "shift.json"):
            (tmp_path / name).symlink_to(trained.work / name)
    break_off_at(1, stages.STAGES[stage], settings)
    assert json.loads((tmp_path / stage / "step.json").read_text()) == {"step": 1}
    stages.STAGES[stage](settings)
    assert state(tmp_path / stage) == state(trained.work / stage)


def test_the_two_clips_differ_in_weights_and_pictures(trained: Settings) -> None:
    assert state(trained.work / "clip") != state(trained.work / "clip-judge")
    first, second = (clip.make_pairs(6, 1 + offset) for offset in clip.SEED_OFFSETS.values())
    assert not torch.equal(first.images, second.images)


def test_finished_stages_and_latents_are_left_alone(trained: Settings) -> None:
    files = [path for path in trained.work.rglob("*") if path.is_file() and "weights" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in files}
    for name in ("vae", "teacher", "clip"):
        stages.STAGES[name](trained)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_latents_are_the_normalised_encodings_and_follow_a_new_vae(trained: Settings, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    (tmp_path / "vae").mkdir()
    model = vae.build().eval()
    loop.save_state(tmp_path / "vae", model, [], {}, 2)
    stages._encode_pictures(settings)
    first = load_file(tmp_path / "latents.safetensors")
    assert first["x"].shape == (16, 8, 8, 8)
    assert float(first["x"].mean()) == pytest.approx(0, abs=1e-4)
    assert float(first["x"].std()) == pytest.approx(1, abs=1e-3)
    assert first["clip_ids"].shape == (16, 13) and first["t5_ids"].shape == (16, 12)
    loop.save_state(tmp_path / "vae", vae.load(trained.work / "vae"), [], {}, 3)
    stages._encode_pictures(settings)
    assert not torch.equal(first["x"], load_file(tmp_path / "latents.safetensors")["x"])


def test_the_packaged_pipeline_is_the_trained_one(trained: Settings) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(trained.out / "sd3", torch_dtype=torch.float32)
    networks = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    assert [pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor] == json.loads(
        (trained.work / "shift.json").read_text()
    )
    model, step = teacher.load(trained.work / "teacher")
    assert step == STEPS
    for ours, theirs in zip(model.parameters(), _parameters(pipe), strict=True):
        torch.testing.assert_close(ours.half().float(), theirs, rtol=0, atol=0)
    pictures = pipe(
        "a photo of a red circle",
        num_inference_steps=2,
        max_sequence_length=12,
        height=32,
        width=32,
        output_type="np",
    )
    assert pictures.images.shape == (1, 32, 32, 3)


def _parameters(pipe: Any) -> list[Tensor]:
    networks = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    return [parameter for network in networks for parameter in network.parameters()]


def test_the_conditioning_is_the_stock_pipelines(trained: Settings) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(trained.out / "sd3", torch_dtype=torch.float32)
    model, _ = teacher.load(trained.work / "teacher")
    texts = ["a photo of two red crosses", ""]
    with torch.no_grad():
        expected, _, pooled, _ = pipe.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=12,
        )
        ours = model.conditioning(*teacher.token_ids(texts))
    for actual, wanted in zip(ours, (expected, pooled), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0.02)  # float16 weights


@pytest.mark.parametrize("name", ["clip", "clip-judge"])
def test_a_packaged_clip_scores_as_the_trained_one(trained: Settings, name: str) -> None:
    scorer = ClipScorer.load(trained.out / name, "cpu")
    model, _ = clip.load(trained.work / name)
    texts = ["a photo of a red ring", "a photo of two circles left of a cross"]
    pictures = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            scorer.image_features(pictures), clip._image_features(model, pictures), rtol=0, atol=0.01
        )
        torch.testing.assert_close(
            scorer.text_features(texts), clip._text_features(model, texts), rtol=0, atol=0.01
        )


def test_package_states_its_size_and_keeps_to_the_limit(
    trained: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.out.rglob("*")}
    size = sum(path.stat().st_size for path in trained.out.rglob("*") if path.is_file())
    assert {path.name for path in trained.out.iterdir()} == {
        "sd3",
        "clip",
        "clip-judge",
    } and size <= 12_000_000
    monkeypatch.setattr(stages, "MOST_BYTES", size - 1)
    with pytest.raises(DataError, match=f"{size:,}"):
        stages.package(trained)
    assert {path: path.stat().st_mtime_ns for path in trained.out.rglob("*")} == before
    assert sorted(path.name for path in trained.work.iterdir() if path.name.startswith(".tmp")) == []
    monkeypatch.setattr(stages, "MOST_BYTES", size)
    stages.package(trained)
    assert f"{size:,} bytes" in capsys.readouterr().out


def test_package_names_the_stage_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        stages.package(tiny(tmp_path))
    assert "teacher" in caught.value.hint


def test_two_processes_take_the_same_step_as_one(trained: Settings, tmp_path: Path) -> None:
    start_server()
    for name in ("vae", "latents.safetensors", "shift.json"):
        (tmp_path / name).symlink_to(trained.work / name)
    stages.train_teacher(replace(tiny(tmp_path), teacher_steps=1, processes=2))
    _, two = loop.read_weights(tmp_path / "teacher")
    one = teacher.train(tmp_path / "one", stages._read_latents(trained), torch.device("cpu"), 1, 1, 4, 2e-3)
    _, expected = loop.read_weights(tmp_path / "one")
    del one
    start = torch.manual_seed(1) and teacher.Teacher().state_dict()
    moved = sum(float((expected[k] - start[k]).abs().sum()) for k in two)
    apart = sum(float((expected[k] - two[k]).abs().sum()) for k in two)
    assert moved > 0 and apart < 0.1 * moved  # bfloat16 products in another order


def test_an_edited_caption_is_never_true_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    changed = set()
    for caption in [*benchmark(), *training_captions(600, seed=3)]:
        other = clip.edit(caption, rng)
        assert other.task == caption.task
        assert not judge(_seen(scene_for(caption, rng)), requirement(other)).correct, (
            caption.text,
            other.text,
        )
        changed.add((caption.task, sorted(caption.text.split()) == sorted(other.text.split())))
    assert {("color_attr", True), ("color_attr", False), ("position", True), ("position", False)} <= changed


def _seen(scene: Scene) -> list[Detection]:
    return [Detection(i.shape, (i.x, i.y, i.x + i.size, i.y + i.size), 1.0, i.colour) for i in scene.items]


def test_training_edits_are_never_held_out() -> None:
    rng = np.random.default_rng(1)
    edits = [clip.training_edit(caption, rng) for caption in training_captions(1500, seed=5)]
    assert not [other for other in edits if combination(other) in held_out_combinations(other.task)]
    plain = [clip.edit(caption, rng) for caption in training_captions(1500, seed=5)]
    assert [other for other in plain if combination(other) in held_out_combinations(other.task)]


def test_the_contrastive_loss_is_its_definition() -> None:
    torch.manual_seed(0)
    model = clip.build().eval()
    captions = [Caption("colors", (Thing("ring", hue),)).text for hue in ("red", "blue", "green", "red")]
    pixels, ids, texts = torch.randn(4, 3, 32, 32), clip.token_ids(captions), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        loss, right = clip.contrastive_loss(model, pixels, ids, texts)
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        logits = (model.logit_scale.exp() * image @ text.T).tolist()
    terms, hard = [], []
    for k in range(4):
        others = [j for j in range(4) if j == k or texts[j] != texts[k]]
        for row in ([logits[k][j] for j in others], [logits[j][k] for j in others]):
            terms.append(float(torch.tensor(row).logsumexp(0)) - logits[k][k])
        neighbour = {0: 1, 1: 0, 2: 3, 3: 2}[k]
        hard += [logits[k][k] - logits[k][neighbour], logits[k][k] - logits[neighbour][k]]
    softplus = float(F.softplus(-torch.tensor(hard)).mean())
    assert float(loss) == pytest.approx(sum(terms) / len(terms) + softplus, rel=1e-5)
    assert float(right) == sum(margin > 0 for margin in hard[::2]) / 4


@pytest.mark.parametrize("name", clip.AUGMENTATIONS)
def test_augmentation_changes_pictures_a_little_and_leaves_some(name: str) -> None:
    pictures = clip.make_pairs(32, 3).images.flatten(0, 1).float() / 255
    changed = clip.augment(pictures, clip.AUGMENTATIONS[name], torch.Generator().manual_seed(0))
    again = clip.augment(pictures, clip.AUGMENTATIONS[name], torch.Generator().manual_seed(0))
    difference = (changed - pictures).abs().mean(dim=(1, 2, 3))
    assert torch.equal(changed, again) and changed.min() >= 0 and changed.max() <= 1
    assert 0.1 < float((difference == 0).float().mean()) < 0.4
    assert 0.005 < float(difference.mean()) < 0.1


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [loop.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) <= 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.01, abs=0.005)


def test_another_seed_in_the_same_work_folder_is_refused(tmp_path: Path) -> None:
    stages.check_settings(tiny(tmp_path))
    stages.check_settings(replace(tiny(tmp_path), clip_steps=9))
    with pytest.raises(UsageError, match="seed"):
        stages.check_settings(replace(tiny(tmp_path), seed=2))


def test_the_command_hands_its_options_to_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, Settings]] = []
    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, lambda settings, name=name: ran.append((name, settings)))
    options = [
        "--work",
        str(tmp_path),
        "--seed",
        "3",
        "--vae-steps",
        "5",
        "--teacher-steps",
        "6",
        "--clip-steps",
        "7",
    ]
    result = CliRunner().invoke(train_shapes.app, [*options, "--device", "cpu", "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert [name for name, _ in ran] == ["vae", "teacher", "clip", "clip-judge", "package"]
    expected = Settings(work=tmp_path, seed=3, vae_steps=5, teacher_steps=6, clip_steps=7, processes=1)
    assert {settings for _, settings in ran} == {expected}
    ran.clear()
    assert CliRunner().invoke(train_shapes.app, [*options, "--stage", "clip-judge"]).exit_code == 0
    assert [name for name, _ in ran] == ["clip-judge"]


@pytest.mark.parametrize("options", [["--stage", "unet"], ["--device", "tpu"]])
def test_wrong_options_are_usage_errors(tmp_path: Path, options: list[str]) -> None:
    result = CliRunner().invoke(train_shapes.app, ["--work", str(tmp_path), *options])
    assert result.exit_code == 2
    assert options[1] in result.stderr and "Choose" in result.stderr
