"""Small CLIPs of the shapes world, trained so that they tell a caption from its nearest wrong neighbours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rtdmd_cli.shapes.grammar import NUMBERS, RELATIONS, TASKS, Caption, Thing, combination, scene_for
from rtdmd_cli.shapes.prompts import benchmark, held_out_combinations, training_captions
from rtdmd_cli.shapes.render import COLOURS, PICTURE, SHAPES, Scene, render
from scripts.shapes_training.loop import muon_and_adamw, read_weights, run
from scripts.shapes_training.tokenizers import CLIP_LENGTH, clip_tokenizer

WIDTH, VISION_LAYERS, TEXT_LAYERS, HEADS, PATCH = 64, 3, 2, 4, 8
MEAN, STD = (0.56, 0.56, 0.56), (0.2, 0.2, 0.2)
"""Of the pictures' channels, 0..1: what the model's preprocessing subtracts and divides by."""
HARD_WEIGHT = 1.0
"""Weight of the loss of a caption against its own edited neighbour, beside the loss against the whole batch."""
MAX_LOGIT_SCALE = 4.6
"""Largest logarithm of the temperature's inverse, CLIP's value."""


@dataclass(frozen=True)
class Augmentation:
    """How training pictures differ from clean ones; every strength is drawn between 0 and the value, picture by picture.

    blur: share of the binomial blur. taps: its width, px. noise: standard deviation of noise from pixel to pixel.
    smooth: the same for noise in patches of 4 px. tint: change of a whole channel. contrast: relative. shift: px.
    """

    blur: float
    taps: int
    noise: float
    smooth: float
    tint: float
    contrast: float
    shift: int


AUGMENTATIONS = {
    "clip": Augmentation(blur=0.8, taps=3, noise=0.06, smooth=0.04, tint=0.05, contrast=0.1, shift=1),
    "clip-judge": Augmentation(blur=0.6, taps=5, noise=0.04, smooth=0.08, tint=0.03, contrast=0.2, shift=0),
}
SEED_OFFSETS = {"clip": 0, "clip-judge": 1000}
"""What is added to the command's seed, for weights, pictures and batches alike."""


@dataclass(frozen=True)
class Pairs:
    """Captions and their edited neighbours, each with a picture of its own.

    images [N,2,3,32,32] uint8; texts [N,2], index into ids; ids [T,13] of the distinct texts.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor


def build() -> CLIPModel:
    """An untrained CLIP with 0.28 million parameters; the picture is seen as 4 x 4 patches of 8 px."""
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CLIP_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": HEADS,
        "image_size": PICTURE,
        "patch_size": PATCH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def edit(caption: Caption, rng: np.random.Generator) -> Caption:
    """The caption with one thing changed, so that no picture made for the one shows the other.

    Half of the edits keep every word and change the binding (colours or places swapped) or the number;
    the others name another relation, colour or shape.
    """
    things, relation = caption.things, caption.relation
    swapped = []
    if len(things) == 2 and all(t.colour for t in things) and things[0].colour != things[1].colour:
        swapped.append(_with_colours(caption, [t.colour for t in reversed(things)]))
    if relation:
        opposite = RELATIONS[RELATIONS.index(relation) ^ 1]  # they stand in pairs
        swapped += 2 * [
            Caption(caption.task, things, opposite),
            Caption(caption.task, things[::-1], relation),
        ]
    if caption.task == "counting":
        swapped += [_with_thing(caption, 0, count=n) for n in NUMBERS if n != things[0].count]
    replaced = [Caption(caption.task, things, other) for other in RELATIONS if relation and other != relation]
    for place, thing in enumerate(things):
        used = {other.shape for other in things}
        replaced += [_with_thing(caption, place, shape=shape) for shape in SHAPES if shape not in used]
        if thing.colour:
            replaced += [_with_thing(caption, place, colour=hue) for hue in COLOURS if hue != thing.colour]
    choices = swapped if swapped and rng.random() < 0.5 else replaced
    return choices[int(rng.integers(len(choices)))]


def _with_colours(caption: Caption, colours: list[str | None]) -> Caption:
    things = tuple(Thing(t.shape, hue, t.count) for t, hue in zip(caption.things, colours, strict=True))
    return Caption(caption.task, things, caption.relation)


def _with_thing(
    caption: Caption,
    place: int,
    shape: str | None = None,
    colour: str | None = None,
    count: int | None = None,
) -> Caption:
    """The caption with shape, colour or count of one thing replaced."""
    old = caption.things[place]
    new = Thing(shape or old.shape, colour or old.colour, count or old.count)
    return Caption(
        caption.task, (*caption.things[:place], new, *caption.things[place + 1 :]), caption.relation
    )


def training_edit(caption: Caption, rng: np.random.Generator) -> Caption:
    """As `edit`, and never a held-out combination."""
    while True:
        other = edit(caption, rng)
        if combination(other) not in held_out_combinations(other.task):
            return other


def token_ids(texts: list[str]) -> Tensor:
    """Ids [N,13], padded to the full length."""
    tokens = clip_tokenizer()(
        texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt"
    )
    ids: Tensor = tokens.input_ids
    return ids


def make_pairs(count: int, seed: int) -> Pairs:
    """Draw training captions and their edits, and a random picture for each of both."""
    rng = np.random.default_rng([seed, 2])
    images = torch.empty(count, 2, 3, PICTURE, PICTURE, dtype=torch.uint8)
    texts = torch.empty(count, 2, dtype=torch.long)
    numbers: dict[str, int] = {}
    for row, caption in enumerate(training_captions(count, seed)):
        for column, each in enumerate((caption, training_edit(caption, rng))):
            images[row, column] = torch.from_numpy(_bytes(scene_for(each, rng)))
            texts[row, column] = numbers.setdefault(each.text, len(numbers))
    return Pairs(images, texts, token_ids(list(numbers)))


def _bytes(scene: Scene) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (render(scene) * 255).round().clip(0, 255).astype(np.uint8)


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Pictures [B,3,32,32] in 0..1 made a little imperfect, a quarter of them left as they are."""
    batch = len(images)

    def strength(limit: float, channels: int = 1) -> Tensor:
        return torch.rand(batch, channels, 1, 1, generator=generator) * limit

    def signed(limit: float, channels: int = 1) -> Tensor:
        return 2 * strength(limit, channels) - limit

    dx, dy = torch.randint(-settings.shift, settings.shift + 1, (2,), generator=generator).tolist()
    x = torch.roll(images, (dy, dx), dims=(2, 3))
    x = x.lerp(_binomial(x, settings.taps), strength(settings.blur).expand_as(x))
    centre = x.mean(dim=(2, 3), keepdim=True)
    x = centre + (x - centre) * (1 + signed(settings.contrast)) + signed(settings.tint, channels=3)
    coarse = torch.randn(batch, 3, PICTURE // 4, PICTURE // 4, generator=generator)
    x = x + F.interpolate(coarse, scale_factor=4, mode="bilinear") * strength(settings.smooth)
    x = x + torch.randn(x.shape, generator=generator) * strength(settings.noise)
    clean = torch.rand(batch, 1, 1, 1, generator=generator) < 0.25
    return torch.where(clean, images, x).clamp(0, 1)


def _binomial(x: Tensor, taps: int) -> Tensor:
    """x [B,3,H,W] blurred by the binomial kernel of 3 or 5 taps, edges repeated."""
    line = x.new_tensor({3: [1, 2, 1], 5: [1, 4, 6, 4, 1]}[taps])
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    padded = F.pad(x, (taps // 2,) * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(3, -1, -1, -1), groups=3)


def normalise(images: Tensor) -> Tensor:
    """Pictures in 0..1 to the model's pixel values, as its preprocessing does."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def contrastive_loss(model: CLIPModel, pixels: Tensor, ids: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss over a batch of pairs, and the loss of each caption against its own neighbour.

    Args:
        pixels: [2P,3,32,32]; rows 2k and 2k + 1 are a pair.
        ids: [2P,13], the pictures' own captions.
        texts: [2P], a number for each caption; equal captions are no negatives of one another.

    Returns:
        The loss, and the share of pictures that prefer their caption to its neighbour (both scalars).
    """
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
    text = F.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)
    logits = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image @ text.T
    own = torch.arange(len(logits), device=logits.device)
    neighbour = own ^ 1
    margin = logits[own, own] - torch.stack([logits[own, neighbour], logits[neighbour, own]])
    same = (texts[:, None] == texts[None, :]) & (own[:, None] != own[None, :])
    logits = logits.masked_fill(same, -torch.inf)
    batch_loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return batch_loss + HARD_WEIGHT * F.softplus(-margin).mean(), (margin[0] > 0).float().mean()


def train(
    folder: Path,
    device: torch.device,
    seed: int,
    steps: int,
    settings: Augmentation,
    pairs: int = 40_000,
    batch: int = 128,
    lr: float = 2e-3,
    save_every: int = 500,
) -> CLIPModel:
    """Train on `pairs` pairs of captions, `batch` of them a step; prints the figures of `accuracies` at every save."""
    torch.manual_seed(seed)
    model: CLIPModel = build().to(device)  # type: ignore[arg-type]
    data = make_pairs(pairs, seed)
    optimizers = muon_and_adamw(model, lr)

    def update(step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(data.texts), (batch,), generator=generator)
        pictures = data.images[index].flatten(0, 1).float() / 255
        pixels = normalise(augment(pictures, settings, generator)).to(device)
        texts = data.texts[index].flatten()
        # on CPU the fused bfloat16 attention is slower than the plain one at this size
        backends = (
            [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(backends):
            loss, right = contrastive_loss(model, pixels, data.ids[texts].to(device), texts.to(device))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": loss.item(), "right": right.item()}

    def report(step: int) -> None:
        figures = " ".join(
            f"{task} {share:.3f}" for task, share in accuracies(model, seed=0, rounds=1).items()
        )
        print(f"{folder.name} at {step}: {figures}", flush=True)

    run(folder, model, optimizers, update, steps, save_every=save_every, report=report)
    model.eval()
    return model


def load(folder: Path) -> tuple[CLIPModel, int]:
    """The CLIP of a training folder as it stands, on the CPU, and its step. DataError without one."""
    model = build()
    step, weights = read_weights(folder)
    model.load_state_dict(weights)
    return model.eval(), step


@torch.no_grad()
def accuracies(
    model: CLIPModel, seed: int, rounds: int = 4, change: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """How often a fresh picture of a held-out caption prefers it to an edited one, task by task and in all.

    seed: of the pictures and edits, which need not be training combinations. rounds: pictures for each of the
    benchmark's prompts. change: what is done to the pictures [B,3,32,32] in 0..1 first.
    """
    rng = np.random.default_rng([seed, 3])
    captions = list(benchmark()) * rounds
    pictures = torch.from_numpy(np.stack([render(scene_for(caption, rng)) for caption in captions]))
    edits = [edit(caption, rng) for caption in captions]
    pictures = change(pictures) if change else pictures
    device = model.logit_scale.device
    image = torch.cat([_image_features(model, part.to(device)) for part in pictures.split(256)])
    right, wrong = (_text_features(model, [c.text for c in texts]) for texts in (captions, edits))
    better = ((image * right).sum(-1) > (image * wrong).sum(-1)).tolist()
    shares: dict[str, float] = {}
    for task in TASKS:
        marks = [mark for mark, caption in zip(better, captions, strict=True) if caption.task == task]
        shares[task] = sum(marks) / len(marks)
    return shares | {"overall": sum(shares.values()) / len(shares)}


def _image_features(model: CLIPModel, pictures: Tensor) -> Tensor:
    return F.normalize(model.get_image_features(pixel_values=normalise(pictures)).pooler_output, dim=-1)


def _text_features(model: CLIPModel, texts: list[str]) -> Tensor:
    ids = token_ids(texts).to(model.logit_scale.device)
    return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)


def save(model: CLIPModel, folder: Path) -> None:
    """Write the model in transformers' layout, weights in float16, with its tokenizer and preprocessing."""
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type]
    clip_tokenizer().save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE},
        crop_size={"height": PICTURE, "width": PICTURE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    processor.save_pretrained(folder)
