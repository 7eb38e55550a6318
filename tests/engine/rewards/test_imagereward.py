"""ImageReward on tiny random weights under their published names, against BLIP written out as formulas."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rtdmd_cli.engine.rewards.imagereward import ImageReward, preprocess
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_hub import offline_hub, publish
from tests.tiny_vlm import as_pil, picture

CPU = torch.device("cpu")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "circle",
    "ring",
    "and",
    "left",
    "of",
    "##s",
]
WIDTH, DEPTH, PATCH, SIZE = 128, 2, 4, 16  # of the vision transformer: two heads of 64
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}
PROMPTS = ["a red circle", "rings left of a red ring and a circle"]


def published_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}

    def matrix(key: str, *shape: int) -> None:
        made[key] = torch.randn(*shape, generator=generator) * math.prod(shape[1:]) ** -0.5

    def linear(key: str, rows: int, columns: int) -> None:
        matrix(f"{key}.weight", rows, columns)
        made[f"{key}.bias"] = 0.2 * torch.randn(rows, generator=generator)

    def norm(key: str, width: int) -> None:
        made[f"{key}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        made[f"{key}.bias"] = 0.2 * torch.randn(width, generator=generator)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    made[f"{vision}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    made[f"{vision}.pos_embed"] = torch.randn(1, 1 + (SIZE // PATCH) ** 2, WIDTH, generator=generator)
    matrix(f"{vision}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    made[f"{vision}.patch_embed.proj.bias"] = torch.randn(WIDTH, generator=generator)
    for number in range(DEPTH):
        block = f"{vision}.blocks.{number}"
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", 2 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
    norm(f"{vision}.norm", WIDTH)
    width, inner = 24, 40
    matrix(f"{text}.embeddings.word_embeddings.weight", len(WORDS) + 2, width)
    matrix(f"{text}.embeddings.position_embeddings.weight", 48, width)
    made[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    norm(f"{text}.embeddings.LayerNorm", width)
    for number in range(2):
        layer = f"{text}.encoder.layer.{number}"
        for attention, keys in (("attention", width), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", width, width)
            linear(f"{layer}.{attention}.self.key", width, keys)
            linear(f"{layer}.{attention}.self.value", width, keys)
            linear(f"{layer}.{attention}.output.dense", width, width)
            norm(f"{layer}.{attention}.output.LayerNorm", width)
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        norm(f"{layer}.output.LayerNorm", width)
    linear("blip.vision_proj", 8, WIDTH)
    linear("blip.text_proj", 8, width)
    for place, (columns, rows) in {
        0: (24, 1024),
        2: (1024, 128),
        4: (128, 64),
        6: (64, 16),
        7: (16, 1),
    }.items():
        linear(f"mlp.layers.{place}", rows, columns)
    return made


class Published:
    """The published network as formulas over its state dict."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x @ self.weights[f"{key}.weight"].T + self.weights[f"{key}.bias"]

    def norm(self, x: Tensor, key: str, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * self.weights[f"{key}.weight"] + self.weights[f"{key}.bias"]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def see(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder"
        kernel, bias = (self.weights[f"{root}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        patches = F.conv2d(pixels, kernel, bias, stride=PATCH).flatten(2).transpose(1, 2)
        start = self.weights[f"{root}.cls_token"].expand(len(pixels), -1, -1)
        x = torch.cat([start, patches], 1) + self.weights[f"{root}.pos_embed"]
        for number in range(DEPTH):
            block = f"{root}.blocks.{number}"
            q, k, v = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(q, k, v, 2), f"{block}.attn.proj")
            inner = self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            x = x + self.linear(F.gelu(inner), f"{block}.mlp.fc2")
        return self.norm(x, f"{root}.norm", 1e-6)

    def read(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        root = "blip.text_encoder"
        x = self.weights[f"{root}.embeddings.word_embeddings.weight"][ids]
        x = x + self.weights[f"{root}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, f"{root}.embeddings.LayerNorm", 1e-12)
        for number in range(2):
            layer = f"{root}.encoder.layer.{number}"
            hidden = (1.0 - mask[:, None, None].float()) * -10000.0
            for name, source, bias in (("attention", None, hidden), ("crossattention", seen, 0.0)):
                key = f"{layer}.{name}"
                source = x if source is None else source
                q, k, v = (
                    self.linear(values, f"{key}.self.{part}")
                    for values, part in ((x, "query"), (source, "key"), (source, "value"))
                )
                attended = self.linear(self.attend(q, k, v, 2, bias), f"{key}.output.dense")
                x = self.norm(attended + x, f"{key}.output.LayerNorm", 1e-12)
            inner = F.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(self.linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm", 1e-12)
        return x[:, 0]

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.read(ids, mask, self.see(pixels))
        for place in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{place}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    return save(tmp_path_factory.mktemp("imagereward"), weights)


@pytest.fixture
def reward(folder: Path) -> ImageReward:
    return ImageReward.load(CPU, str(folder))


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def tokens(prompt: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [1,35] of words that are all in the vocabulary; plurals are two tokens."""
    pieces = [
        piece for word in prompt.split() for piece in ([word[:-1], "##s"] if word[-1] == "s" else [word])
    ]
    ids = [WORDS.index(piece) for piece in ["[CLS]", *pieces[:33], "[SEP]"]]
    padded = torch.tensor([ids + [0] * (35 - len(ids))])
    return padded, (torch.arange(35) < len(ids))[None].long()


def published_pixels(image: Tensor) -> Tensor:
    """torchvision's Resize(16, bicubic), CenterCrop(16), ToTensor and Normalize on the picture of a file."""
    height, width = image.shape[1:]
    short = min(height, width)
    size = (int(SIZE * width / short), int(SIZE * height / short))
    pil = as_pil(image).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIZE) / 2.0), round((size[1] - SIZE) / 2.0)
    pil = pil.crop((left, top, left + SIZE, top + SIZE))
    raw = torch.frombuffer(bytearray(pil.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3)
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    return ((raw / 255 - mean) / std).permute(2, 0, 1)


def test_score_is_the_published_one(reward: ImageReward, weights: dict[str, Tensor]) -> None:
    images = torch.stack([picture(SIZE, SIZE, seed) for seed in range(2)])  # no resizing
    expected = torch.cat(
        [
            Published(weights).score(published_pixels(image)[None], *tokens(prompt))
            for image, prompt in zip(images, PROMPTS, strict=True)
        ]
    )
    scores = reward.score(images, PROMPTS, [{}, {}])
    assert scores.dtype == torch.float32 and scores.shape == (2,)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    swapped = reward.score(images, PROMPTS[::-1], [{}, {}])
    assert (scores - swapped).abs().min() > 0.01 and (scores[0] - scores[1]).abs() > 0.01
    singles = [reward.score(images[i : i + 1], PROMPTS[i : i + 1], [{}]) for i in range(2)]
    torch.testing.assert_close(torch.cat(singles), scores, rtol=1e-4, atol=1e-5)


def test_texts_are_cut_and_uncased(reward: ImageReward, weights: dict[str, Tensor]) -> None:
    image = picture(SIZE, SIZE)
    long = " ".join(["a red circle and"] * 12)
    expected = Published(weights).score(published_pixels(image)[None], *tokens(long))
    torch.testing.assert_close(reward.score(image[None], [long], [{}]), expected, rtol=1e-4, atol=1e-5)
    pair = reward.score(torch.stack([image, image]), ["a red circle", "A RED Circle"], [{}, {}])
    torch.testing.assert_close(pair[0], pair[1], rtol=0, atol=1e-6)  # rows of one batch differ by rounding


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (48, 33), (29, 60), (9, 12)])
def test_pixels_are_the_published_ones(size: tuple[int, int]) -> None:
    image = picture(*size)
    difference = (preprocess(image[None], SIZE)[0] - published_pixels(image)).abs()
    assert difference.max() < (
        1e-6 if size == (SIZE, SIZE) else 1.1 / 255 / 0.26
    )  # theirs is rounded to 8 bits


def test_the_gradient_reaches_the_pixels(reward: ImageReward) -> None:
    """The directional derivative along the gradient is its length; the picture is resized on the way."""
    assert reward.differentiable
    image = (0.2 + 0.6 * picture(20, 30))[None].requires_grad_()
    reward.score(image, PROMPTS[:1], [{}]).sum().backward()
    assert image.grad is not None
    length = image.grad.norm()
    direction, step = image.grad / length, 0.02
    with torch.no_grad():
        up, down = (
            reward.score(image + sign * step * direction, PROMPTS[:1], [{}]).double() for sign in (1, -1)
        )
    assert ((up - down) / (2 * step)).item() == pytest.approx(length.item(), rel=2e-2)
    assert all(parameter.grad is None for parameter in reward.network.parameters())


def test_half_precision_files_are_computed_in_float32(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save(
        tmp_path,
        {key: value.half() if value.is_floating_point() else value for key, value in weights.items()},
    )
    reward = ImageReward.load(CPU, str(tmp_path))
    assert {parameter.dtype for parameter in reward.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("unused", ["vision_proj", "text_proj", "position_ids"])
def test_what_the_score_does_not_need_may_be_missing(
    unused: str, tmp_path: Path, weights: dict[str, Tensor], reward: ImageReward
) -> None:
    save(tmp_path, {key: value for key, value in weights.items() if unused not in key})
    image = picture(SIZE, SIZE)[None]
    less = ImageReward.load(CPU, str(tmp_path)).score(image, PROMPTS[:1], [{}])
    assert torch.equal(less, reward.score(image, PROMPTS[:1], [{}]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias",
            None,
            r"lack text\..*crossattention.*key",
        ),
        ("blip.visual_encoder.blocks.1.norm2.weight", None, r"lack vision\.encoder\.layers\.1\.layer_norm2"),
        ("mlp.layers.7.bias", None, r"lack mlp\.7\.bias"),
        ("blip.visual_encoder.pos_embed", None, "lack its vision transformer"),
        ("blip.itm_head.weight", torch.zeros(2), r"unexpected blip\.itm_head\.weight"),
        ("blip.text_encoder.pooler.dense.bias", torch.zeros(2), r"unexpected text\.pooler"),
        ("mlp.layers.0.weight", torch.zeros(4, 24), r"mlp\.0\.weight .* is \[4, 24\], not \[1024, 24\]"),
        ("blip.visual_encoder.patch_embed.proj.weight", torch.zeros(100, 3, 4, 4), r"starts with \[100"),
    ],
)
def test_weights_that_do_not_fit(
    key: str, value: Tensor | None, message: str, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    changed = {name: tensor for name, tensor in weights.items() if name != key}
    save(tmp_path, changed if value is None else changed | {key: value})
    with pytest.raises(DataError, match=message) as caught:
        ImageReward.load(CPU, str(tmp_path))
    assert caught.value.hint


@pytest.mark.parametrize("missing", ["ImageReward.pt", "med_config.json", "vocab.txt"])
def test_folders_that_are_incomplete(missing: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / missing).unlink()
    with pytest.raises(DataError, match=missing.replace(".", r"\.")):
        ImageReward.load(CPU, str(copy))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.txt", "\n".join(WORDS[:-1]), "14 words, the network knows 15"),
        (
            "med_config.json",
            json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}),
            "hidden_size",
        ),
        ("med_config.json", json.dumps(CONFIG | {"hidden_size": "wide"}), "settings of a BERT"),
        ("med_config.json", "[]", "settings of a BERT"),
        ("med_config.json", "{", "settings of a BERT"),
    ],
)
def test_files_that_do_not_fit(file: str, content: str, message: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).write_text(content)
    with pytest.raises(DataError, match=message):
        ImageReward.load(CPU, str(copy))


def test_the_default_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: ImageReward
) -> None:
    hub = offline_hub(tmp_path / "hub", monkeypatch)
    with pytest.raises(
        EnvironmentFailure, match=r"med_config\.json of THUDM/ImageReward is not in the local cache"
    ):
        ImageReward.load(CPU, None)
    publish(hub, "THUDM/ImageReward", folder / "ImageReward.pt", folder / "med_config.json")
    publish(hub, "google-bert/bert-base-uncased", folder / "vocab.txt")
    image = picture(20, 20)[None]
    score = ImageReward.load(CPU, None).score(image, PROMPTS[:1], [{}])
    assert torch.equal(score, reward.score(image, PROMPTS[:1], [{}]))


def test_the_row_of_the_table(folder: Path) -> None:
    row = find_reward("imagereward")
    assert row.differentiable and not row.metadata
    files = {need.source: need.files for need in row.needs}
    assert files["THUDM/ImageReward"] == ("ImageReward.pt", "med_config.json")
    reward: Any = row.load(CPU, str(folder))
    assert reward.score(picture(20, 20)[None], ["a ring"], [{}]).isfinite().all()
