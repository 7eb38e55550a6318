"""PickScore, CLIPScore and the shapes world's CLIPs against transformers' own forward pass and processors."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rtdmd_cli.engine.rewards import clipscore, pickscore, shapes_clip
from rtdmd_cli.engine.rewards.registry import REWARDS, find_reward
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError
from tests.tiny_clip import PROMPTS, as_pil, pictures, save_clip
from tests.tiny_hub import offline_hub, publish

CPU = torch.device("cpu")
NOTHING: list[dict[str, Any]] = [{}] * len(PROMPTS)
LOGIT_SCALE = 1.7


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose temperature isn't 1, with the extra tensors of older files."""
    folder = save_clip(tmp_path_factory.mktemp("clip"))
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors["logit_scale"] = torch.tensor(LOGIT_SCALE)
    tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def published(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """exp(logit_scale) * cosine, [B]: the code on PickScore's card, one picture and prompt at a time."""
    model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor, tokenizer = (kind.from_pretrained(folder) for kind in (CLIPImageProcessorPil, CLIPTokenizer))
    scores = []
    for image, prompt in zip(as_pil(images), prompts, strict=True):
        pixels = processor(images=image, return_tensors="pt")
        tokens = tokenizer(prompt, padding=True, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            picture = model.get_image_features(**pixels).pooler_output
            text = model.get_text_features(**tokens).pooler_output
        picture /= picture.norm(dim=-1, keepdim=True)
        text /= text.norm(dim=-1, keepdim=True)
        scores.append((model.logit_scale.exp() * (text @ picture.T))[0, 0])
    return torch.stack(scores).detach()


def test_pickscore_is_the_scaled_cosine(clip: Path) -> None:
    images = pictures(len(PROMPTS), 36, 36)  # needs no resize, so that both see the same pixels
    scores = pickscore.load(CPU, str(clip)).score(images, PROMPTS, NOTHING)
    expected = published(clip, images, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (len(PROMPTS),)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores, expected, atol=2e-5, rtol=0)


def test_clipscore_is_the_cosine(clip: Path) -> None:
    images = pictures(len(PROMPTS), 36, 36)
    scores = clipscore.load(CPU, str(clip)).score(images, PROMPTS, NOTHING)
    cosines = published(clip, images, PROMPTS) / torch.tensor(LOGIT_SCALE).exp()
    torch.testing.assert_close(scores, cosines, atol=4e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 48), (45, 77), (24, 40)])
def test_scores_of_resized_pictures_agree_with_the_8_bit_processor(
    clip: Path, shape: tuple[int, int]
) -> None:
    """Not square, larger and smaller. PIL's rounding to 8 bits moves the pixels by 1/255."""
    images = pictures(len(PROMPTS), *shape)
    scores = clipscore.load(CPU, str(clip)).score(images, PROMPTS, NOTHING)
    cosines = published(clip, images, PROMPTS) / torch.tensor(LOGIT_SCALE).exp()
    assert cosines.std() > 0.02
    torch.testing.assert_close(scores, cosines, atol=4e-3, rtol=0)


def test_repeated_prompts_score_as_single_ones(clip: Path) -> None:
    """A prompt is encoded once, whatever the order of the batch."""
    reward, images = clipscore.load(CPU, str(clip)), pictures(5, 36, 36)
    prompts = [PROMPTS[i] for i in (1, 0, 1, 2, 0)]
    alone = [reward.score(images[i : i + 1], prompts[i : i + 1], [{}]) for i in range(5)]
    torch.testing.assert_close(reward.score(images, prompts, [{}] * 5), torch.cat(alone), atol=2e-6, rtol=0)


def test_gradient_to_the_pixels(clip: Path) -> None:
    images = (0.2 + 0.6 * pictures(2, 48, 40)).requires_grad_()
    gradients = []
    for module in (pickscore, clipscore):
        reward = module.load(CPU, str(clip))
        assert reward.differentiable
        (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2], NOTHING[:2]).sum(), images)
        assert gradient.isfinite().all() and all(each.abs().max() > 1e-5 for each in gradient)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], torch.tensor(LOGIT_SCALE).exp() * gradients[1])


def test_older_buffers_and_nothing_else_is_dropped(clip: Path, tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    tensors = {key: value.clone() for key, value in load_file(clip / "model.safetensors").items()}
    assert "text_model.embeddings.position_ids" in tensors  # and `clip` is loaded all the same
    path = folder / "model.safetensors"
    for extra in ("text_model.embeddings.extra", "text_model.position_ids_2"):
        save_file({**tensors, extra: torch.zeros(1)}, path, metadata={"format": "pt"})
        with pytest.raises(DataError, match=f"unexpected {extra}"):
            pickscore.load(CPU, str(folder))


def test_pickscore_takes_weights_and_processor_from_two_repositories(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, each repository with its own part of the files only."""
    root = offline_hub(tmp_path / "hub", monkeypatch)
    weights = [clip / name for name in ("config.json", "model.safetensors")]
    publish(root, "yuvalkirstain/PickScore_v1", *weights)
    with pytest.raises(EnvironmentFailure, match="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        pickscore.load(CPU)
    publish(
        root,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *(file for file in clip.iterdir() if file not in weights),
    )
    images = pictures(len(PROMPTS), 36, 36)
    one_folder = pickscore.load(CPU, str(clip)).score(images, PROMPTS, NOTHING)
    assert torch.equal(pickscore.load(CPU).score(images, PROMPTS, NOTHING), one_folder)
    publish(root, "openai/clip-vit-large-patch14", *clip.iterdir())
    cosines = clipscore.load(CPU).score(images, PROMPTS, NOTHING)
    torch.testing.assert_close(cosines * torch.tensor(LOGIT_SCALE).exp(), one_folder)


def test_the_shapes_rewards_are_the_packages_two_clips() -> None:
    """The cosine of a CLIP read with transformers alone; the held-out one is what `rtdmd eval shapes` judges with."""
    from rtdmd_cli.engine.evaluation.shapes import open_judge

    images, prompts = pictures(2, 32, 32), ["a photo of a red circle", "a photo of two blue rings"]
    found = []
    for load, name in ((shapes_clip.load, "clip"), (shapes_clip.load_held_out, "clip-judge")):
        folder = Path(shapes_clip.__file__).parents[2] / "shapes" / "weights" / name
        model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        expected = published(folder, images, prompts) / model.logit_scale.exp()
        found.append(load(CPU).score(images, prompts, NOTHING[:2]))
        torch.testing.assert_close(found[-1], expected.detach(), atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().min() > 1e-3
    judge = open_judge(CPU)
    assert judge is not None and torch.equal(judge.score(images, prompts), found[1])


def test_the_rows_of_the_table(clip: Path) -> None:
    names = ["pickscore", "clipscore", "hpsv2", "aesthetic", "shapes-clip", "shapes-clip-heldout"]
    assert set(names) <= REWARDS.keys()
    assert all(REWARDS[name].name == name and REWARDS[name].differentiable for name in names)
    assert [REWARDS[name].divisor for name in names] == [26, 1, 1, 1, 1, 1]
    for name in names:
        assert REWARDS[name].low < REWARDS[name].high and not REWARDS[name].extra + REWARDS[name].metadata
        assert all(need.size > 0 and need.files and need.licence for need in REWARDS[name].needs)
    images = pictures(1, 32, 32)
    for name in ("pickscore", "clipscore", "shapes-clip", "shapes-clip-heldout"):
        assert find_reward(name).load(CPU, str(clip)).score(images, PROMPTS[:1], [{}]).isfinite().all()
    with pytest.raises(UsageError) as caught:
        find_reward("pick-score")
    assert "pickscore" in caught.value.hint


def test_the_size_of_the_built_in_clips() -> None:
    package = Path(shapes_clip.__file__).parents[2]
    for name in ("shapes-clip", "shapes-clip-heldout"):
        (need,) = REWARDS[name].needs
        found = [path for pattern in need.files for path in package.glob(pattern)]
        assert len(found) == 5 and sum(path.stat().st_size for path in found) == need.size


def test_the_table_imports_no_torch() -> None:
    code = "import sys, rtdmd_cli.engine.rewards.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_is_not_there() -> None:
    for load in (pickscore.load, clipscore.load, shapes_clip.load, shapes_clip.load_held_out):
        with pytest.raises(DataError, match="neither a folder nor a hub id"):
            load(CPU, "./no/such/folder")
