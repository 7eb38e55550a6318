"""The SD3 backbone against the stock pipeline of diffusers, on the same tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from rtdmd_cli.config.schema import ModelConfig
from rtdmd_cli.engine.backbones import layout, locating, sd3
from rtdmd_cli.engine.backbones.base import Backbone, Conditioning
from rtdmd_cli.engine.backbones.families import FAMILIES, load_backbone
from rtdmd_cli.engine.sampling.sample import euler, guided
from rtdmd_cli.errors import DataError, EnvironmentFailure, RtdmdError, UsageError
from tests.tiny_models import (
    CLIP_LENGTH,
    PROMPTS,
    RESOLUTION,
    TEXT_LENGTH,
    load_sd3,
    save_sd3,
    sd3_config,
    sd3_folder,
)

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(sd3_config(), CPU, torch.float32)


@pytest.fixture(scope="module")
def stock() -> Any:
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


# --- the same numbers as the stock pipeline


def test_prompts_are_encoded_as_in_the_stock_pipeline(backbone: Backbone, stock: Any) -> None:
    def expected(prompts: list[str]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            found: tuple[torch.Tensor, ...] = stock.encode_prompt(
                prompt=prompts, prompt_2=None, prompt_3=None, max_sequence_length=TEXT_LENGTH
            )
        return found

    cond = backbone.encode(PROMPTS)
    assert cond.embeds.shape == (len(PROMPTS), CLIP_LENGTH + TEXT_LENGTH, 40)
    embeds, _, pooled, _ = expected(PROMPTS)
    assert torch.equal(cond.embeds, embeds) and torch.equal(cond.pooled, pooled)
    empty = backbone.encode([""])
    _, negative, _, negative_pooled = expected(PROMPTS[:1])  # the stock pipeline's negative prompt is ""
    assert torch.equal(empty.embeds, negative) and torch.equal(empty.pooled, negative_pooled)
    assert not torch.allclose(cond.embeds[0], cond.embeds[1], atol=1e-3)


def test_many_prompts_are_encoded_in_parts(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = backbone.encode(PROMPTS)
    monkeypatch.setattr(sd3, "ENCODE_BATCH", 3)
    parts = backbone.encode(PROMPTS)
    torch.testing.assert_close(parts.embeds, whole.embeds)
    torch.testing.assert_close(parts.pooled, whole.pooled)


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_stock_schedule(backbone: Backbone, stock: Any, steps: int) -> None:
    stock.scheduler.set_timesteps(steps)
    assert torch.equal(backbone.stock_sigmas(steps, SHAPE), stock.scheduler.sigmas)


def test_few_step_schedule_is_what_the_pipeline_makes_of_the_raw_steps(
    backbone: Backbone, stock: Any
) -> None:
    raw = [1.0, 0.75, 0.5, 0.25]
    sigmas = backbone.sigmas(raw, SHAPE)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    cond = backbone.encode(PROMPTS[:1])
    stock(
        prompt_embeds=cond.embeds,
        pooled_prompt_embeds=cond.pooled,
        guidance_scale=1.0,
        sigmas=raw,
        output_type="latent",
        max_sequence_length=TEXT_LENGTH,
    )
    assert torch.equal(sigmas, stock.scheduler.sigmas)


def test_shift_comes_from_the_saved_scheduler(tmp_path: Path) -> None:
    backbone = sd3.load(sd3_config(save_sd3(tmp_path / "m", shift=2.0)), CPU, torch.float32)
    torch.testing.assert_close(backbone.sigmas([1.0, 0.5], SHAPE), torch.tensor([1, 2 / 3, 0]))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("raw", [None, [1.0, 0.75, 0.5, 0.25]])
def test_pictures_equal_the_stock_pipeline(
    backbone: Backbone, stock: Any, guidance: float, raw: list[float] | None
) -> None:
    x = noise(2)
    call = {"num_inference_steps": 5} if raw is None else {"sigmas": raw}
    expected = stock(
        PROMPTS[:2],
        guidance_scale=guidance,
        latents=x,
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
        **call,
    ).images
    sigmas = backbone.stock_sigmas(5, SHAPE) if raw is None else backbone.sigmas(raw, SHAPE)
    velocity = guided(backbone, backbone.encode(PROMPTS[:2]), backbone.encode([""]), guidance)
    with torch.no_grad():
        pictures = backbone.decode(euler(velocity, x, sigmas.tolist()))
    assert pictures.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert expected.std() > 0.05
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


# --- what the interface promises


def test_velocity_reads_prompt_and_noise_level(backbone: Backbone) -> None:
    cond, x = backbone.encode(PROMPTS[:2]), noise(1).expand(2, -1, -1, -1)
    with torch.no_grad():
        v = backbone.velocity(x, torch.full((2,), 0.5), cond)
        other = backbone.velocity(x, torch.full((2,), 0.9), cond)
    assert (v[0] - v[1]).abs().max() > 1e-3
    assert (v - other).abs().max() > 1e-3


def test_timestep_is_a_thousand_sigma(backbone: Backbone) -> None:
    cond, x = backbone.encode(PROMPTS[:1]), noise(1)
    with torch.no_grad():
        expected = backbone.transformer(
            hidden_states=x,
            timestep=torch.tensor([250.0]),
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
        ).sample
        assert torch.equal(backbone.velocity(x, torch.tensor([0.25]), cond), expected)


def test_bf16_takes_and_returns_float32() -> None:
    backbone = load_sd3(torch.bfloat16)
    assert {p.dtype for p in backbone.transformer.parameters()} == {torch.bfloat16}
    cond = backbone.encode(PROMPTS[:1])
    with torch.no_grad():
        v = backbone.velocity(noise(1), torch.tensor([0.5]), cond)
        pictures = backbone.decode(noise(1))
        exact = load_sd3().velocity(noise(1), torch.tensor([0.5]), cond.to(dtype=torch.float32))
    assert (cond.embeds.dtype, v.dtype, pictures.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(v, exact, atol=0.05, rtol=0.05)


def test_everything_is_frozen_and_in_eval_mode(backbone: Backbone) -> None:
    opened = load_sd3()
    opened.encode(["a ring"])
    pipe = opened._pipe
    for module in (opened.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(backbone.encode(PROMPTS).embeds, backbone.encode(PROMPTS).embeds)


def test_decode_has_a_gradient_and_stays_in_range(backbone: Backbone) -> None:
    latents = noise(1).requires_grad_()
    pictures = backbone.decode(latents)
    assert pictures.min() >= 0 and pictures.max() <= 1
    (gradient,) = torch.autograd.grad(pictures.sum(), latents)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        risen = backbone.decode(latents + step).sum() - backbone.decode(latents - step).sum()
    torch.testing.assert_close(risen, 2 * 1e-2 * gradient.norm(), rtol=0.02, atol=0)


def test_decode_undoes_the_encoding(backbone: Backbone, stock: Any) -> None:
    latents = noise(1)
    with torch.no_grad():
        raw = stock.vae.decode(latents / 1.5305 + 0.0609).sample
        torch.testing.assert_close(backbone.decode(latents), (raw / 2 + 0.5).clamp(0, 1))


def test_dropped_text_encoders_are_gone() -> None:
    backbone = load_sd3()
    backbone.drop_text_encoders()
    assert backbone._pipe.text_encoder_3 is None
    with pytest.raises(RtdmdError, match="text encoders have been freed"):
        backbone.encode(["a ring"])


def test_latent_shape(backbone: Backbone) -> None:
    assert backbone.latent_shape(32, 16) == (4, 8, 4)
    for height, width in ((36, 32), (32, 12), (128, 32), (0, 32)):
        with pytest.raises(UsageError, match=f"{width} x {height}") as caught:
            backbone.latent_shape(height, width)
        assert "multiples of 8 px, 64 px" in caught.value.hint


def test_conditioning_rows() -> None:
    cond = Conditioning(torch.arange(6.0).view(3, 2, 1), torch.arange(3.0).view(3, 1))
    picked = cond.select([2, 0, 2])
    assert len(picked) == 3 and picked.pooled.flatten().tolist() == [2, 0, 2]
    assert picked.embeds[:, 0, 0].tolist() == [4, 0, 4]
    assert picked.to(dtype=torch.bfloat16).embeds.dtype == torch.bfloat16


def test_the_table_of_families_matches_the_presets() -> None:
    assert set(FAMILIES) == set(ModelConfig.model_fields["family"].annotation.__args__)  # type: ignore[union-attr]
    assert all(name == family.name for name, family in FAMILIES.items())


# --- identity


def test_model_hash_follows_the_contents(tmp_path: Path) -> None:
    first, same, other = (save_sd3(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1)))
    (same / "README.md").write_text("not part of the model")
    hashes = [layout.folder_hash(sd3.LAYOUT, folder) for folder in (first, same, other)]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 64
    (first / "scheduler/scheduler_config.json").write_text("{}")
    assert layout.folder_hash(sd3.LAYOUT, first) != hashes[0]


def test_encoder_key_tells_dtypes_apart() -> None:
    assert load_sd3().encoder_key != load_sd3(torch.bfloat16).encoder_key


# --- failures


def break_file(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    """Cut the file in half, or replace its content."""

    def apply(folder: Path) -> None:
        path = folder / name
        old = path.read_bytes()
        path.write_bytes(old[: len(old) // 2] if content is None else content)

    return apply


def remove(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def drop_weight(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        del tensors[sorted(tensors)[3]]
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return apply


def shift_by_resolution(folder: Path) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))


def rename_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


NETWORK = "diffusion_pytorch_model.safetensors"
DAMAGE = {
    "transformer cut": (break_file(f"transformer/{NETWORK}"), "can't be loaded"),
    "vae cut": (break_file(f"vae/{NETWORK}"), "can't be loaded"),
    "clip cut": (break_file("text_encoder/model.safetensors"), "can't be loaded"),
    "t5 garbled": (break_file("text_encoder_3/model.safetensors", b"{}"), "can't be loaded"),
    "transformer lacks a weight": (drop_weight(f"transformer/{NETWORK}"), "transformer are incomplete"),
    "vae lacks a weight": (drop_weight(f"vae/{NETWORK}"), "vae are incomplete"),
    "clip lacks a weight": (drop_weight("text_encoder_2/model.safetensors"), "encoder_2 are incomplete"),
    "t5 lacks a weight": (drop_weight("text_encoder_3/model.safetensors"), "encoder_3 are incomplete"),
    "no weights": (remove(f"transformer/{NETWORK}"), "can't be loaded"),
    "config garbled": (break_file("transformer/config.json"), "can't be loaded"),
    "scheduler missing": (remove("scheduler"), "can't be loaded"),
    "component missing": (remove("text_encoder"), "lacks text_encoder/config.json"),
    "tokenizer missing": (remove("tokenizer_3"), "lacks tokenizer_3/tokenizer.json"),
    "vocabulary missing": (remove("tokenizer/tokenizer.json"), "lacks tokenizer/tokenizer.json"),
    "tokenizer garbled": (break_file("tokenizer/tokenizer.json"), "can't be loaded"),
    "index missing": (remove("model_index.json"), "model_index.json is missing"),
    "index garbled": (break_file("model_index.json"), "can't be read"),
    "another scheduler": (shift_by_resolution, "shifts by resolution"),
    "another pipeline": (rename_pipeline, "holds a FluxPipeline"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_a_data_error(tmp_path: Path, name: str) -> None:
    apply, message = DAMAGE[name]
    folder = Path(shutil.copytree(sd3_folder(), tmp_path / "model"))
    apply(folder)
    with pytest.raises(DataError, match=message) as caught:
        backbone = sd3.load(sd3_config(folder), CPU, torch.float32)
        assert "encoder" in message  # all else is known before anything is encoded
        backbone.encode(["a ring"])
    assert str(folder) in caught.value.message and caught.value.hint


def test_the_transformer_comes_when_it_is_asked_for() -> None:
    """Until then it has its configuration alone, and the encoders can be freed before."""
    backbone = load_sd3()
    assert all(parameter.is_meta for parameter in backbone._pipe.transformer.parameters())
    assert backbone._pipe.text_encoder is None and backbone.latent_shape(32, 32) == (4, 8, 8)
    backbone.encode(["a ring"])
    assert backbone._pipe.text_encoder is not None and next(backbone._pipe.transformer.parameters()).is_meta
    backbone.drop_text_encoders()
    assert not any(parameter.is_meta for parameter in backbone.transformer.parameters())
    assert backbone.transformer is backbone._pipe.transformer is backbone.transformer


def test_a_model_without_t5_loads_as_in_the_stock_pipeline(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd3_folder(), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    without = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | without))
    shutil.rmtree(folder / "text_encoder_3")
    cond = sd3.load(sd3_config(folder), CPU, torch.float32).encode(["a ring"])
    assert cond.embeds.shape == (1, CLIP_LENGTH + TEXT_LENGTH, 40)
    assert cond.embeds[:, CLIP_LENGTH:].abs().max() == 0


def test_missing_folder_and_unknown_built_in() -> None:
    for path in ("/no/such/folder", "./nowhere", "nowhere", "~/nowhere/at/all"):
        with pytest.raises(DataError, match="no model folder"):
            sd3.load(sd3_config(path), CPU, torch.float32)
    with pytest.raises(UsageError, match="no built-in model builtin:circles") as caught:
        sd3.load(sd3_config("builtin:circles"), CPU, torch.float32)
    assert "builtin:shapes" in caught.value.hint


def test_the_built_in_model_lies_in_the_package() -> None:
    folder = locating.find_folder(sd3.LAYOUT, "builtin:shapes", None)
    assert folder.parts[-4:] == ("rtdmd_cli", "shapes", "weights", "sd3")


def hub_error(kind: type[Exception]) -> Exception:
    """As diffusers raises it: an OSError caused by the hub's error."""
    cause = kind.__new__(kind)
    cause.args = ("the hub says no",)
    error = OSError("Cannot load model")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (hub_error(GatedRepoError), "is gated", "hf auth login"),
        (GatedRepoError.__new__(GatedRepoError), "is gated", "hf auth login"),
        (hub_error(RepositoryNotFoundError), "no public model", "model.path"),
        (hub_error(RevisionNotFoundError), "no revision v7", "model.revision"),
        (hub_error(OfflineModeIsEnabled), "switched off", "HF_HUB_OFFLINE"),
        (hub_error(ConnectionError), "the hub says no", "network"),
        (OSError(28, "No space left on device"), "No space left", "disk space"),
    ],
)
def test_hub_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, hint: str
) -> None:
    def download(*_: object, **__: object) -> Path:
        raise error

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    config = sd3_config("someone/some-model").model_copy(update={"revision": "v7"})
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        sd3.load(config, CPU, torch.float32)
    assert "someone/some-model" in caught.value.message and hint in caught.value.hint


def test_offline_without_a_cached_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real chain of diffusers and the hub's client, with no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match="not in the local cache"):
        sd3.load(sd3_config("someone/some-model-that-is-not-cached"), CPU, torch.float32)


def test_a_hub_model_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit, model = "c0ffee" * 6 + "c0ff", tmp_path / "models--someone--some-model"
    folder = Path(shutil.copytree(sd3_folder(), model / "snapshots" / commit))
    (model / "blobs").mkdir()
    asked = []

    def download(path: str, revision: str | None, use_safetensors: bool, local_files_only: bool) -> str:
        asked.append((path, revision, use_safetensors))
        return str(folder)

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    config = sd3_config("someone/some-model").model_copy(update={"revision": "main"})
    backbone = sd3.load(config, CPU, torch.float32)
    assert asked == [("someone/some-model", "main", True)]
    assert backbone.model_id.hash == commit and backbone.model_id.revision == "main"
