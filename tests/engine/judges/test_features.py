"""The CLIP scorer against transformers' own processor and forward pass, and the distances against closed forms."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rtdmd_cli.engine.judges.features import (
    ClipScorer,
    Preprocess,
    frechet_distance,
    mean_pairwise_cosine_distance,
    pairwise_cosine_distances,
)
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_clip import PROMPTS, SIZE, as_pil, pictures, processor, save_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A CLIP folder to spoil."""
    return save_clip(tmp_path / "clip")


@pytest.mark.parametrize("shape", [(64, 64), (36, 36), (16, 16), (100, 50), (45, 77), (77, 45), (36, 53)])
def test_preprocessing_agrees_with_transformers(clip: Path, shape: tuple[int, int]) -> None:
    images = pictures(3, *shape)
    ours = ClipScorer.load(clip, "cpu").preprocess(images)
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(as_pil(images), return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (3, 3, SIZE, SIZE)
    # PIL rounds to 8 bits after each of its two passes: 1/255 over the smallest std is 0.015.
    assert (ours - theirs).abs().max() < 0.02
    assert (ours - theirs).abs().mean() < 0.005


def test_preprocessing_reads_the_older_file_layout(broken: Path) -> None:
    old: dict[str, Any] = {
        "size": SIZE,
        "crop_size": SIZE,
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
    }
    old |= {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (broken / "preprocessor_config.json").write_text(json.dumps(old))
    assert ClipScorer.load(broken, "cpu").preprocess == Preprocess(
        SIZE, SIZE, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    )


def test_scores_are_the_logits_of_transformers(clip: Path) -> None:
    """36 x 36 px needs no resize, so that both see the same pixels."""
    images = pictures(len(PROMPTS), 36, 36)
    scorer = ClipScorer.load(clip, "cpu")
    model: Any = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(as_pil(images), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(clip)(
        PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**tokens, **pixels)
    cosines: Tensor = out.logits_per_image / model.logit_scale.exp()
    assert cosines.std(0).min() > 0.01 and cosines.std(1).min() > 0.01
    torch.testing.assert_close(scorer.score(images, PROMPTS), cosines.diag(), atol=2e-6, rtol=0)
    torch.testing.assert_close(scorer.image_features(images), out.image_embeds, atol=2e-6, rtol=0)
    torch.testing.assert_close(scorer.text_features(PROMPTS), out.text_embeds, atol=2e-6, rtol=0)


def test_a_score_does_not_depend_on_its_batch(clip: Path) -> None:
    scorer, images = ClipScorer.load(clip, "cpu"), pictures(len(PROMPTS), 64, 48)
    alone = torch.cat([scorer.score(images[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)])
    torch.testing.assert_close(scorer.score(images, PROMPTS), alone, atol=2e-6, rtol=0)


def test_gradient_to_the_pixels(clip: Path) -> None:
    scorer = ClipScorer.load(clip, "cpu")
    images = (0.2 + 0.6 * pictures(2, 48, 48)).requires_grad_()
    prompts = PROMPTS[:2]
    (gradient,) = torch.autograd.grad(scorer.score(images, prompts).sum(), images)
    assert gradient.isfinite().all()
    assert all((g != 0).any() for g in gradient)
    assert not any(p.requires_grad for p in scorer.model.parameters())
    step = 3e-3 * gradient / gradient.norm()
    with torch.no_grad():
        difference = scorer.score(images + step, prompts).sum() - scorer.score(images - step, prompts).sum()
    assert difference.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.02)


def test_half_precision_weights_are_computed_in_float32(broken: Path) -> None:
    model: Any = CLIPModel.from_pretrained(broken)
    model.half().save_pretrained(broken)
    scorer = ClipScorer.load(broken, "cpu")
    assert all(p.dtype == torch.float32 for p in scorer.model.parameters())
    images = pictures(1, 64, 64).bfloat16()
    torch.testing.assert_close(
        scorer.image_features(images), scorer.image_features(images.float()), atol=0, rtol=0
    )


def test_bad_arguments(clip: Path) -> None:
    scorer = ClipScorer.load(clip, "cpu")
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        scorer.score(pictures(2, 36, 36), ["a"])
    for images in (
        pictures(1, 36, 36)[0],
        pictures(1, 36, 36)[:, :1],
        torch.zeros(1, 3, 36, 36, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="float images"):
            scorer.image_features(images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("preprocessor_config.json", "not a complete CLIP: .*image processor"),
        ("config.json", "not a complete CLIP: it has no config.json"),
        ("model.safetensors", "not a complete CLIP: .*model.safetensors"),
        ("tokenizer.json", "tokenizer .* has 2 tokens"),
    ],
)
def test_a_missing_file_is_named_or_its_part(broken: Path, name: str, message: str) -> None:
    (broken / name).unlink()
    with pytest.raises(DataError, match=message):
        ClipScorer.load(broken, "cpu")


def test_damaged_foreign_and_incomplete_weights(broken: Path) -> None:
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # not mapped into the file
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        ClipScorer.load(broken, "cpu")
    kept = {key: value for key, value in tensors.items() if key != "visual_projection.weight"}
    for changed, message in (
        (kept, "lack or do not fit visual_projection.weight"),
        (
            {**tensors, "visual_projection.weight": torch.zeros(24, 5)},
            "lack or do not fit visual_projection.weight",
        ),
        ({**tensors, "head.weight": torch.zeros(2)}, "unexpected head.weight"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(DataError, match=message):
            ClipScorer.load(broken, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "bicubic"),
        ({"do_center_crop": False}, "bicubic"),
        ({"rescale_factor": 1 / 127.5}, "1/255"),
        ({"crop_size": {"height": 24, "width": 24}}, "32 px"),
        ({"size": {"shortest_edge": 24}}, "32 px"),
        ({"size": {"height": 36, "width": 36}}, "32 px"),
    ],
)
def test_other_preprocessing_is_refused(broken: Path, changes: dict[str, Any], message: str) -> None:
    processor(**changes).save_pretrained(broken)
    with pytest.raises(DataError, match=message):
        ClipScorer.load(broken, "cpu")


def test_a_text_model_that_would_read_the_wrong_token_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path, eos_token_id=5)
    with pytest.raises(DataError, match="ends at token 5"):
        ClipScorer.load(tmp_path, "cpu")


def test_the_older_end_token_id_is_accepted(tmp_path: Path, clip: Path) -> None:
    """Published configs name token 2 and read the highest id."""
    save_clip(tmp_path, eos_token_id=2)
    old, new = ClipScorer.load(tmp_path, "cpu"), ClipScorer.load(clip, "cpu")
    torch.testing.assert_close(old.text_features(PROMPTS), new.text_features(PROMPTS))


def test_neither_folder_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither a folder nor a hub id"):
        ClipScorer.load("./no/such/folder", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match="cannot load rtdmd-tests/no-such-clip"):
        ClipScorer.load("rtdmd-tests/no-such-clip", "cpu")


def sample(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def whitened(count: int, width: int, seed: int) -> Tensor:
    """Rows whose mean is exactly 0 and whose covariance (divisor N - 1) is exactly the identity, float64."""
    x = sample(count, width, seed).double()
    x = x - x.mean(0)
    q: Tensor = torch.linalg.qr(x)[0]
    return q * math.sqrt(count - 1)


@pytest.mark.parametrize(("count", "width"), [(100, 8), (10, 64)])
def test_frechet_of_equal_sets_is_zero(count: int, width: int) -> None:
    """Also with fewer rows than columns, where the covariance is singular."""
    x = sample(count, width, 0)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-10)


def test_frechet_of_a_shifted_mean() -> None:
    x, shift = sample(50, 6, 1).double(), torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_frechet_of_diagonal_gaussians() -> None:
    """sum (sd_a - sd_b)^2 for axis-aligned Gaussians; unlike numbers of rows."""
    sd_a, sd_b = torch.tensor([1.0, 2.0, 0.5, 0.0]), torch.tensor([3.0, 1.0, 0.5, 1.0])
    expected = float((sd_a - sd_b).square().sum())
    assert frechet_distance(whitened(40, 4, 2) * sd_a, whitened(70, 4, 3) * sd_b) == pytest.approx(
        expected, rel=1e-9
    )


def test_frechet_of_gaussians_that_do_not_commute() -> None:
    """2 x 2: tr (S_a S_b)^1/2 = sqrt(tr(S_a S_b) + 2 sqrt(det(S_a S_b)))."""
    mix_a, mix_b = (
        torch.tensor([[1.0, 0.7], [0.0, 0.4]]).double(),
        torch.tensor([[0.3, -0.8], [1.1, 0.2]]).double(),
    )
    s_a, s_b = mix_a.T @ mix_a, mix_b.T @ mix_b
    product = s_a @ s_b
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = float(s_a.trace() + s_b.trace()) - 2 * cross
    found = frechet_distance(whitened(30, 2, 4) @ mix_a, whitened(31, 2, 5) @ mix_b)
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_scales_with_the_square_and_is_symmetric() -> None:
    a, b = sample(60, 5, 6).double(), 2 * sample(40, 5, 7).double() + 1
    distance = frechet_distance(a, b)
    assert distance > 1
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)


def test_frechet_is_computed_in_float64() -> None:
    """A mean of 1000 would drown a float32 covariance."""
    a, b = sample(200, 4, 8), 1.5 * sample(200, 4, 9)
    exact = frechet_distance(a.double(), b.double())
    assert frechet_distance(a.double() + 1000, b.double() + 1000) == pytest.approx(exact, rel=1e-6)


def test_frechet_bad_input() -> None:
    good = sample(5, 3, 0)
    for other in (sample(5, 4, 0), good[0], good[:1], good.index_fill(0, torch.tensor([2]), math.nan)):
        with pytest.raises(ValueError, match=r"features|two rows"):
            frechet_distance(good, other)


def test_diversity_averages_pairs_then_groups() -> None:
    east, north, west = torch.eye(3)[0], torch.eye(3)[1], -torch.eye(3)[0]
    features = torch.stack([east, 5 * east, north, east, 2 * west, north])
    # a: the three pairs of (east, east, north): 0, 1, 1; b: (east, west): 2; c: a single picture.
    groups = ["a", "a", "a", "b", "b", "c"]
    assert mean_pairwise_cosine_distance(features, groups) == pytest.approx((2 / 3 + 2) / 2)
    assert pairwise_cosine_distances(features, groups).tolist() == pytest.approx([2 / 3, 2])


def test_diversity_agrees_with_a_double_loop() -> None:
    features, groups = sample(12, 7, 10), [0, 1, 2] * 4
    x = features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    means = [
        np.mean([1 - x[i] @ x[j] for i in range(12) for j in range(i) if groups[i] == groups[j] == g])
        for g in range(3)
    ]
    assert mean_pairwise_cosine_distance(features, groups) == pytest.approx(float(np.mean(means)), rel=1e-12)


def test_diversity_bad_input() -> None:
    with pytest.raises(ValueError, match="3 features for 2"):
        mean_pairwise_cosine_distance(sample(3, 2, 0), [0, 0])
    with pytest.raises(ValueError, match="no group"):
        mean_pairwise_cosine_distance(sample(2, 2, 0), [0, 1])
