"""HPS v2.1 against an independent open_clip model, from the published file layout."""

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rtdmd_cli.engine.judges import open_clip
from rtdmd_cli.engine.rewards import hpsv2
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError
from tests.tiny_clip import LENGTH, PROMPTS, SIZE, as_pil, pictures, processor, tokenizer
from tests.tiny_hub import offline_hub, publish

CPU = torch.device("cpu")
NOTHING: list[dict[str, object]] = [{}] * len(PROMPTS)
HEADS = 16
PROJECTION = 24
PATCH = 8


class Block(nn.Module):
    """open_clip's residual attention block, pre-norm, with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, hidden)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(hidden, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, width: int = 48, hidden: int = 80, depth: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, hidden, depth)
        self.proj = nn.Parameter(torch.randn(width, PROJECTION))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The tensors and the forward pass of open_clip's CLIP; the towers differ in every size."""

    def __init__(self, vocabulary: int, width: int = 32, hidden: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.visual = Vision()
        self.transformer = Transformer(width, hidden, depth)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, PROJECTION))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def build() -> OpenClip:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OpenClip(len(tokenizer()))
        with torch.no_grad():
            for parameter in model.parameters():  # no gain or bias stays at 1 or 0, so that a mix-up shows
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval().requires_grad_(False)


def save_hps(folder: Path, model: OpenClip, change: Callable[[dict[str, Tensor]], object] = dict) -> Path:
    """As published: half precision, under "state_dict", beside the training's state."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    change(state)
    folder.mkdir(exist_ok=True)
    torch.save({"epoch": 1, "name": "HPSv2.1", "state_dict": state}, folder / hpsv2.FILE)
    tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hps(tmp_path_factory.mktemp("hps"), build())


def letterboxed(image: Image.Image) -> Tensor:
    """With PIL: longer edge to SIZE, centred on black, then CLIP's mean and std."""
    scale = SIZE / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIZE, SIZE))
    canvas.paste(small, ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
    pixels = torch.tensor(list(canvas.tobytes())).view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    return (pixels - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def published(images: Tensor, prompts: list[str]) -> Tensor:
    """The diagonal of image_features @ text_features.T, in the precision of the published weights."""
    model = build()
    model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
    rows = []
    for prompt in prompts:  # open_clip's tokens: padded with 0, cut with the end token kept
        ids = tokenizer()(prompt, truncation=True, max_length=LENGTH)["input_ids"]
        rows.append(ids + [0] * (LENGTH - len(ids)))
    with torch.no_grad():
        picture = F.normalize(
            model.visual(torch.stack([letterboxed(image) for image in as_pil(images)])), dim=-1
        )
        text = F.normalize(model.encode_text(torch.tensor(rows)), dim=-1)
    return (picture @ text.T).diag()


def test_scores_are_those_of_open_clip(hps: Path) -> None:
    images = pictures(len(PROMPTS), SIZE, SIZE)  # needs no resize, so that both see the same pixels
    scores = hpsv2.load(CPU, str(hps)).score(images, PROMPTS, NOTHING)
    expected = published(images, PROMPTS)
    assert scores.dtype == torch.float32 and expected.std() > 0.05
    torch.testing.assert_close(scores, expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (64, 40), (40, 77), (20, 31), (SIZE, 20)])
def test_scores_of_resized_pictures(hps: Path, shape: tuple[int, int]) -> None:
    """PIL's rounding to 8 bits moves the pixels by 1/255."""
    images = pictures(len(PROMPTS), *shape)
    scores = hpsv2.load(CPU, str(hps)).score(images, PROMPTS, NOTHING)
    torch.testing.assert_close(scores, published(images, PROMPTS), atol=4e-3, rtol=0)


@pytest.mark.parametrize("shape", [(64, 40), (40, 77), (45, 31), (SIZE, 20), (7, 100)])
def test_letterbox_agrees_with_pil(hps: Path, shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    ours = hpsv2.load(CPU, str(hps)).scorer.preprocess(images)
    theirs = torch.stack([letterboxed(image) for image in as_pil(images)])
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.02 and (ours - theirs).abs().mean() < 0.005


def test_square_pictures_are_prepared_as_clip_does(hps: Path) -> None:
    images = pictures(2, 71, 71)
    reference = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    theirs = reference(as_pil(images), return_tensors="pt")["pixel_values"]
    ours = hpsv2.load(CPU, str(hps)).scorer.preprocess(images)
    assert (ours - theirs).abs().max() < 0.02 and (ours - theirs).abs().mean() < 0.005


def test_gradient_to_the_pixels(hps: Path) -> None:
    reward = hpsv2.load(CPU, str(hps))
    images = (0.2 + 0.6 * pictures(2, 48, 40)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2], NOTHING[:2]).sum(), images)
    assert reward.differentiable and gradient.isfinite().all()
    assert all((each != 0).float().mean() > 0.9 for each in gradient)
    step = 3e-3 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (reward.score(images + s, PROMPTS[:2], NOTHING[:2]).sum() for s in (step, -step))
    assert (up - down).item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.02)


def test_the_pickle_is_opened_once(hps: Path, tmp_path: Path) -> None:
    folder = save_hps(tmp_path / "hps", build())
    images = pictures(len(PROMPTS), 36, 36)
    first = hpsv2.load(CPU, str(folder)).score(images, PROMPTS, NOTHING)
    (folder / hpsv2.FILE).unlink()
    assert torch.equal(hpsv2.load(CPU, str(folder)).score(images, PROMPTS, NOTHING), first)
    (folder / hpsv2.FILE).write_bytes(b"garbage")
    with pytest.raises(DataError, match="HPS_v2.1_compressed.pt are damaged"):
        hpsv2.load(CPU, str(folder))


def test_a_folder_below_the_home_folder(hps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(hps.parent))
    images = pictures(1, 36, 36)
    scores = hpsv2.load(CPU, f"~/{hps.name}").score(images, PROMPTS[:1], NOTHING[:1])
    assert torch.equal(scores, hpsv2.load(CPU, str(hps)).score(images, PROMPTS[:1], NOTHING[:1]))


def test_weights_and_processor_from_two_repositories(
    hps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = offline_hub(tmp_path / "hub", monkeypatch)
    publish(root, "xswu/HPSv2", hps / hpsv2.FILE)
    others = [file for file in hps.iterdir() if file.name != hpsv2.FILE]
    publish(root, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", *others)
    images = pictures(len(PROMPTS), 36, 36)
    by_hub = find_reward("hpsv2").load(CPU, None).score(images, PROMPTS, NOTHING)
    assert torch.equal(by_hub, hpsv2.load(CPU, str(hps)).score(images, PROMPTS, NOTHING))


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(key)


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("visual.proj"), r"lack visual\.proj \(1 "),
        (drop("logit_scale"), "lack logit_scale"),
        (
            drop("transformer.resblocks.1.attn.in_proj_bias"),
            r"lack transformer\.resblocks\.1\.attn\.in_proj_bias",
        ),
        (
            drop("visual.transformer.resblocks.0.mlp.c_fc.weight"),
            r"resblocks\.0\.mlp\.c_fc\.weight .* is missing",
        ),
        (drop("token_embedding.weight"), "token_embedding.weight .* is missing"),
        (put("visual.conv1.weight", 3), r"visual\.conv1\.weight .* is \[3\]"),
        (put("attn_mask", 2), "unexpected attn_mask"),
        (put("visual.transformer.resblocks.3.ln_1.weight", 48), r"lack visual\.transformer\.resblocks\.3\."),
        (put("text_projection", 24, 32), r"is \[24, 32\], not|is \[48, 24\], not"),
        (put("visual.proj", 24, 48), r"visual\.proj .* is \[24, 48\], not \[48, 24\]"),
        (
            put("visual.positional_embedding", 16, 48),
            r"positional_embedding .* is \[16, 48\], not \[10, 48\]",
        ),
        (
            put("visual.transformer.resblocks.2.attn.in_proj_weight", 48, 48),
            r"in_proj_weight .* not \[144, 48\]",
        ),
    ],
)
def test_weights_of_another_layout_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = save_hps(tmp_path / "hps", build(), change)
    with pytest.raises(DataError, match=message):
        hpsv2.load(CPU, str(folder))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_checkpoint_without_its_entry(hps: Path, tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / hpsv2.FILE)
    with pytest.raises(DataError, match="no entry state_dict"):
        hpsv2.load(CPU, str(tmp_path))


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    folder = save_hps(tmp_path / "hps", build())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer of"):
        hpsv2.load(CPU, str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="image processor"):
        hpsv2.load(CPU, str(folder))


def test_the_configuration_is_read_off_the_tensors() -> None:
    """Against ViT-H/14's published sizes, without memory for them."""
    with torch.device("meta"):
        state = {
            "token_embedding.weight": torch.empty(49408, 1024),
            "positional_embedding": torch.empty(77, 1024),
            "text_projection": torch.empty(1024, 1024),
            "logit_scale": torch.empty(()),
            "ln_final.weight": torch.empty(1024),
            "ln_final.bias": torch.empty(1024),
            "visual.class_embedding": torch.empty(1280),
            "visual.conv1.weight": torch.empty(1280, 3, 14, 14),
            "visual.positional_embedding": torch.empty(257, 1280),
            "visual.proj": torch.empty(1280, 1024),
        }
        for norm in ("ln_pre", "ln_post"):
            state |= {f"visual.{norm}.{kind}": torch.empty(1280) for kind in ("weight", "bias")}
        for tower, width, depth in (("visual.transformer", 1280, 32), ("transformer", 1024, 24)):
            for layer in range(depth):
                block = Block(width, 4 * width)
                state |= {f"{tower}.resblocks.{layer}.{k}": v for k, v in block.state_dict().items()}
    assert sum(tensor.numel() for tensor in state.values()) == 986_109_441  # of the published model
    config = open_clip.clip_config(open_clip.to_transformers(state, "x"), HEADS, "gelu")
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (224, 14, 1280)
    assert (vision.num_hidden_layers, vision.intermediate_size) == (32, 5120)
    assert (text.num_hidden_layers, text.intermediate_size, text.hidden_size) == (24, 4096, 1024)
    assert (text.vocab_size, text.max_position_embeddings, config.projection_dim) == (49408, 77, 1024)
    assert vision.num_attention_heads == text.num_attention_heads == 16
    assert vision.hidden_act == text.hidden_act == "gelu" and vision.layer_norm_eps == 1e-5


def test_the_cached_file_keeps_the_published_precision(hps: Path, tmp_path: Path) -> None:
    hpsv2.load(CPU, str(hps))
    (path,) = tmp_path.rglob("*.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in load_file(path).values())
    assert all(p.dtype == torch.float32 for p in hpsv2.load(CPU, str(hps)).scorer.model.parameters())


def test_the_tiny_tokenizer_ends_with_its_highest_id() -> None:
    """As the published one does: what `published` and the converted model rely on."""
    tok: CLIPTokenizer = tokenizer()
    assert tok.eos_token_id == len(tok) - 1
