"""HPSv3 on a tiny Qwen2-VL, against the published network: padded batches, the library's image processor."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rtdmd_cli.engine.rewards.hpsv3 import TEMPLATE, HpsV3
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_hub import offline_hub, publish
from tests.tiny_vlm import as_pil, picture, save_hpsv3

CPU = torch.device("cpu")
AREA = 200704  # of config/HPSv3_7B.yaml
PROMPTS = ["a red circle", "two rings, {braces} and a much longer text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> HpsV3:
    return HpsV3.load(CPU, str(folder))


def published_pixels(folder: Path, images: Sequence[Tensor]) -> Any:
    """First to the area of the configuration, then through the processor with its own limits."""
    processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
    resized = []
    for image in images:
        height, width = smart_resize(*image.shape[1:], 28, min_pixels=AREA, max_pixels=AREA)  # type: ignore[misc]
        resized.append(as_pil(image).resize((width, height), Image.Resampling.BICUBIC))
    return processor(resized, return_tensors="pt")


def published(folder: Path, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
    """mu and sigma [B,2]: forward pass of the published class, padded on the right, without position ids."""
    tokenizer: Any = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    tensors = load_file(folder / "HPSv3.safetensors")
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    network: Any = Qwen2VLForConditionalGeneration(config).float().eval()
    network.model.visual.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("visual.")})
    network.model.language_model.load_state_dict(
        {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    )
    seen = published_pixels(folder, images)
    texts = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (int(grid.prod()) // 4)
        + f"<|vision_end|>{TEMPLATE.replace('{prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
        for grid, prompt in zip(seen.image_grid_thw, prompts, strict=True)
    ]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    embeds = network.model.language_model.embed_tokens(batch.input_ids)
    features = network.model.visual(seen.pixel_values, grid_thw=seen.image_grid_thw).pooler_output
    embeds[batch.input_ids == config.image_token_id] = features
    hidden = network.model(inputs_embeds=embeds, attention_mask=batch.attention_mask)[0]
    x = hidden[batch.input_ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    for place in (0, 3, 5):
        x = F.linear(x, tensors[f"rm_head.{place}.weight"], tensors[f"rm_head.{place}.bias"])
        x = x.relu() if place < 5 else x
    return x


def test_the_file_has_published_names(folder: Path) -> None:
    """Those of Qwen/Qwen2-VL-7B-Instruct's index and of HPSv3's head."""
    names = load_file(folder / "HPSv3.safetensors").keys()
    assert names >= {
        "visual.patch_embed.proj.weight",
        "visual.blocks.1.attn.qkv.bias",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.2.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.weight",
        "lm_head.weight",
        "rm_head.0.weight",
        "rm_head.5.bias",
    }


def test_the_text_is_the_published_one() -> None:
    """sha256 of INSTRUCTION.format(text_prompt="PROMPT") + prompt_with_special_token of the published collator."""
    text = TEMPLATE.format(prompt="PROMPT").encode()
    assert (
        hashlib.sha256(text).hexdigest() == "4ffa57dabd39e7e05048a57901bc99ad4e0ab75467c12eff7fa600faf200bd32"
    )


@torch.no_grad()
def test_score_is_the_published_mean(folder: Path, reward: HpsV3) -> None:
    images = torch.stack([picture(448, 448, seed) for seed in range(2)])  # no resizing
    expected = published(folder, list(images), PROMPTS)
    scores = reward.score(images, PROMPTS, [{}, {}])
    assert scores.dtype == torch.float32 and scores.shape == (2,)
    torch.testing.assert_close(scores, expected[:, 0], rtol=1e-4, atol=1e-5)
    assert (scores - expected[:, 1]).abs().min() > 0.01 and (scores[0] - scores[1]).abs() > 0.01
    single = reward.score(images[1:], PROMPTS[1:], [{}])
    torch.testing.assert_close(single, scores[1:])


@torch.no_grad()
def test_a_picture_that_is_resized(folder: Path, reward: HpsV3) -> None:
    image = picture(300, 210)
    expected = published(folder, [image], ["a ring"])[0, 0]
    assert reward.score(image[None], ["a ring"], [{}]).item() == pytest.approx(expected.item(), abs=5e-3)


@pytest.mark.parametrize("size", [(32, 32), (448, 448), (512, 512), (768, 1024), (1024, 1024)])
def test_patches_are_the_published_ones(size: tuple[int, int], folder: Path, reward: HpsV3) -> None:
    image = picture(*size)
    patches, grid = reward.preprocess(image[None])
    theirs = published_pixels(folder, [image])
    assert torch.equal(grid, theirs.image_grid_thw)
    assert (patches - theirs.pixel_values).abs().max() < 1.1 / 255 / 0.26  # theirs is rounded to 8 bits
    if size[0] == size[1]:
        assert grid.tolist() == [[1, 32, 32]]


def test_the_gradient_reaches_the_pixels(reward: HpsV3) -> None:
    """The directional derivative along the gradient is its length; the picture is resized on the way."""
    assert reward.differentiable
    image = (0.2 + 0.6 * picture(60, 90))[None].requires_grad_()
    reward.score(image, PROMPTS[:1], [{}]).sum().backward()
    assert image.grad is not None
    length = image.grad.norm()
    direction, step = image.grad / length, 0.02
    with torch.no_grad():
        up, down = (
            reward.score(image + sign * step * direction, PROMPTS[:1], [{}]).double() for sign in (1, -1)
        )
    assert ((up - down) / (2 * step)).item() == pytest.approx(length.item(), rel=2e-2)
    assert all(
        parameter.grad is None for parameter in (*reward.model.parameters(), *reward.head.parameters())
    )


def test_half_precision_with_a_full_precision_head(folder: Path, tmp_path: Path, reward: HpsV3) -> None:
    """The published file: bfloat16, rm_head in float32."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "HPSv3.safetensors")
    half = {key: value if "rm_head" in key else value.bfloat16() for key, value in tensors.items()}
    save_file(half, copy / "HPSv3.safetensors")
    loaded = HpsV3.load(CPU, str(copy))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.head.parameters()} == {torch.float32}
    image = picture(448, 448)[None]
    score, exact = (r.score(image, PROMPTS[:1], [{}]) for r in (loaded, reward))
    assert score.dtype == torch.float32 and (score - exact).abs() < 0.2


@pytest.mark.parametrize("mark", ["<|Reward|>", "<|image_pad|>"])
def test_prompts_with_the_marks_of_the_text_are_refused(mark: str, reward: HpsV3) -> None:
    with pytest.raises(DataError, match="A prompt holds"):
        reward.score(picture(28, 28)[None], [f"a {mark} circle"], [{}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"lack model\.norm\.weight"),
        ("head", r"lack rm_head\.5\.bias"),
        ("unexpected", r"have the unexpected model\.extra\.weight"),
        ("shape", r"visual\.merger\.ln_q\.weight .* is \[3\], not \[32\]"),
        ("vocabulary", r"model\.embed_tokens\.weight"),
        ("truncated", "are damaged"),
        ("absent", "don't exist"),
    ],
)
def test_weights_that_do_not_fit(change: str, message: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "HPSv3.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "head":
        del tensors["rm_head.5.bias"]
    elif change == "unexpected":
        tensors["model.extra.weight"] = torch.zeros(2)
    elif change == "shape":
        tensors["visual.merger.ln_q.weight"] = torch.zeros(3)
    elif change == "vocabulary":
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    save_file(tensors, file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "absent":
        file.unlink()
    with pytest.raises(DataError, match=message) as caught:
        HpsV3.load(CPU, str(copy))
    assert caught.value.hint


def test_settings_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text()) | {"hidden_size": "wide"}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"config\.json can't be read"):
        HpsV3.load(CPU, str(copy))


def test_the_default_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: HpsV3
) -> None:
    hub = offline_hub(tmp_path / "hub", monkeypatch)
    base = [file for file in folder.iterdir() if file.suffix != ".safetensors"]
    publish(hub, "Qwen/Qwen2-VL-7B-Instruct", *base)
    with pytest.raises(
        EnvironmentFailure, match=r"HPSv3\.safetensors of MizzenAI/HPSv3 is not in the local cache"
    ):
        HpsV3.load(CPU, None)
    publish(hub, "MizzenAI/HPSv3", folder / "HPSv3.safetensors")
    image = picture(448, 448)[None]
    assert torch.equal(*(r.score(image, PROMPTS[:1], [{}]) for r in (HpsV3.load(CPU, None), reward)))


def test_the_row_of_the_table(folder: Path) -> None:
    row = find_reward("hpsv3")
    assert row.differentiable and not row.metadata
    assert [need.source for need in row.needs] == ["MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"]
    assert row.load(CPU, str(folder)).differentiable
