"""CLIP features and cosine scores that are differentiable to the pixels, and distances between sets of features."""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.errors import DataError, EnvironmentFailure

BICUBIC = 3  # PIL's number, as image processors store it
HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
LEGACY_EOS = 2  # in the text config of older CLIPs: the text feature is read at the highest token id instead


@dataclass(frozen=True)
class Preprocess:
    """How CLIP prepares pictures: shorter edge to `size` px, centre crop of `crop` px, mean and std per channel."""

    size: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in 0..1 -> pixel values [B,3,crop,crop], as CLIPImageProcessorPil but for its 8-bit rounding."""
        height, width = images.shape[-2:]
        short = min(height, width)
        if short != self.size:
            target_height, target_width = int(self.size * height / short), int(self.size * width / short)
            images = resize(images, target_height, target_width)
            height, width = target_height, target_width
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        images = images[..., top : top + self.crop, left : left + self.crop]
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, [B,3,H,W] -> [B,3,height,width] in 0..1: what PIL does, but for its 8-bit rounding.

    PIL goes along the rows, then along the columns, and clips where the filter overshoots at edges. (Pillow 13 takes
    some tall pictures the other way round, which shows only where the first pass was clipped.)
    """
    images = F.interpolate(images, (images.shape[-2], width), mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


@dataclass(frozen=True)
class ClipScorer:
    """A frozen CLIP in float32. D is its projection width. Scores are cosines, not scaled by the model's temperature."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    preprocess: Callable[[Tensor], Tensor]  # [B,3,H,W] in 0..1 -> pixel values; `Preprocess` as loaded
    device: torch.device

    @classmethod
    def load(
        cls, source: str | Path, device: torch.device | str, processor: str | Path | None = None
    ) -> "ClipScorer":
        """Loads model, tokenizer and preprocessor_config.json from a folder or hub id; weights as safetensors only.

        processor: the folder or hub id of tokenizer and preprocessor_config.json, None where the model's has them.
        Raises DataError for a folder that is missing, incomplete, damaged or does not hold a CLIP, and
        EnvironmentFailure where a hub id can be had neither from the hub nor from the cache.
        """
        name = str(Path(source).expanduser())
        # Without a config.json transformers would build a full-size CLIP.
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise DataError(f"{name} is not a complete CLIP: it has no config.json")
        reading = _load_processor(source if processor is None else processor)
        with _loading(name) as local:
            loaded: Any = CLIPModel.from_pretrained(
                name,
                local_files_only=local,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        return cls._assemble(name, loaded, reading, device)

    @classmethod
    def from_tensors(
        cls,
        name: str,
        config: CLIPConfig,
        tensors: dict[str, Tensor],
        processor: str | Path,
        device: torch.device | str,
    ) -> "ClipScorer":
        """As `load`, for weights at hand: tensors under the keys of transformers' CLIPModel. name: for messages."""
        reading = _load_processor(processor)
        with quiet_loading():
            loaded: Any = CLIPModel.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        return cls._assemble(name, loaded, reading, device)

    @classmethod
    def _assemble(
        cls, name: str, loaded: Any, reading: "_Reading", device: torch.device | str
    ) -> "ClipScorer":
        model, info = loaded
        _check_weights(name, info)
        _check_tokenizer(reading.name, model, reading.tokenizer)
        model = model.to(device).eval().requires_grad_(False)
        preprocess = _read_preprocess(reading.name, reading.processor, model.config.vision_config.image_size)
        return cls(model, reading.tokenizer, preprocess, torch.device(device))

    def image_features(self, images: Tensor) -> Tensor:
        """images [B,3,H,W], floating point in 0..1 -> features [B,D] of length 1, float32."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected float images [B,3,H,W], got {images.dtype} {list(images.shape)}")
        pixels = self.preprocess(images.to(self.device, torch.float32))
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features [B,D] of length 1, float32. Prompts are cut to the model's text length."""
        text_config: Any = self.model.config.text_config
        length = min(self.tokenizer.model_max_length, text_config.max_position_embeddings)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return F.normalize(self.model.get_text_features(**tokens.to(self.device)).pooler_output, dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [B] in -1..1 of each picture (images [B,3,H,W] in 0..1) with its own prompt."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}  # each is encoded once
        texts = self.text_features(list(rows))[[rows[prompt] for prompt in prompts]]
        return (self.image_features(images) * texts).sum(-1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians fitted to a [N,D] and b [M,D], computed in float64.

    ||mean_a - mean_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Dowson & Landau 1982, as in FID), S with divisor N - 1.
    (S_a S_b)^1/2 has the trace of (R S_b R)^1/2, R = S_a^1/2, whose eigenvalues are the singular values of R S_b^1/2.
    Raises ValueError for unlike widths, fewer than two rows or values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features [N,D] and [M,D], got {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("each set needs at least two rows, all finite")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = _covariance(a), _covariance(b)
    cross = torch.linalg.svdvals(_square_root(cov_a) @ _square_root(cov_b)).sum()
    return max(float(shift + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def mean_pairwise_cosine_distance(features: Tensor, groups: Sequence[Hashable]) -> float:
    """Diversity in 0..2: the mean of `pairwise_cosine_distances`. Arguments and errors as there."""
    return float(pairwise_cosine_distances(features, groups).mean())


def pairwise_cosine_distances(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """1 - cosine, averaged over the pairs within each group: [G] float64 in 0..2, in the order of first appearance.

    features [N,D]; groups: N labels, such as the prompt index. Groups with one row have no pair and are left out.
    Raises ValueError for another number of labels than rows, or if no group has two rows.
    """
    if len(features) != len(groups):
        raise ValueError(f"{len(features)} features for {len(groups)} group labels")
    rows: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        rows.setdefault(group, []).append(index)
    unit = F.normalize(features.detach().cpu().double(), dim=-1)
    distances = []
    for members in (m for m in rows.values() if len(m) > 1):
        n, cosines = len(members), unit[members] @ unit[members].T
        distances.append(1 - (cosines.sum() - cosines.trace()) / (n * (n - 1)))
    if not distances:
        raise ValueError("no group has two pictures to compare")
    return torch.stack(distances)


def _covariance(x: Tensor) -> Tensor:
    """x [N,D] -> [D,D], divisor N - 1."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _square_root(cov: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite [D,D] matrix."""
    values, vectors = torch.linalg.eigh(cov)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


@dataclass(frozen=True)
class _Reading:
    """What a model reads its pictures and texts with, and where it is from."""

    name: str
    processor: Any
    tokenizer: CLIPTokenizer


def _load_processor(source: str | Path) -> _Reading:
    name = str(Path(source).expanduser())
    with _loading(name) as local:
        processor = CLIPImageProcessorPil.from_pretrained(name, local_files_only=local)
        tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=local)
    return _Reading(name, processor, tokenizer)


@contextmanager
def _loading(name: str) -> Iterator[bool]:
    """Names the cause of what goes wrong while `name` is loaded; gives whether it is a folder."""
    local = Path(name).is_dir()
    if not local and not re.fullmatch(HUB_ID, name):
        raise DataError(f"{name} is neither a folder nor a hub id")
    try:
        with quiet_loading():
            yield local
    except SafetensorError as error:
        raise DataError(f"the weights of {name} are damaged: {error}") from error
    except OSError as error:
        if local:
            raise DataError(f"{name} is not a complete CLIP: {_first_line(error)}") from error
        raise EnvironmentFailure(
            f"cannot load {name}: {_first_line(error)}",
            "Check the network and the name, or give a folder that holds the model.",
        ) from error


def _check_weights(name: str, info: dict[str, Any]) -> None:
    """transformers fills missing tensors with random numbers and goes on; here that is an error.

    It drops one kind of unexpected tensor before it reports any: the `position_ids` of older CLIPs (OpenAI's too),
    which are 0, 1, 2, ... and no weights.
    """
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    for kind, keys in (
        ("lack or do not fit", missing),
        ("have the unexpected", sorted(info["unexpected_keys"])),
    ):
        if keys:
            raise DataError(f"the weights of {name} {kind} {keys[0]} ({len(keys)} tensors in all)")


def _check_tokenizer(name: str, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Without its files a CLIPTokenizer has its special tokens only; without its end token texts read position 0."""
    config: Any = model.config.text_config
    if not 3 < len(tokenizer) <= config.vocab_size:
        raise DataError(f"the tokenizer of {name} has {len(tokenizer)} tokens, its model {config.vocab_size}")
    read_at = len(tokenizer) - 1 if config.eos_token_id == LEGACY_EOS else config.eos_token_id
    if tokenizer.eos_token_id != read_at:
        raise DataError(
            f"the text model of {name} ends at token {read_at}, its tokenizer at {tokenizer.eos_token_id}"
        )


def _read_preprocess(name: str, processor: Any, image_size: int) -> Preprocess:
    """Takes the settings over, or raises DataError where `Preprocess` would not do the same."""
    edge, crop = processor.size.shortest_edge, processor.crop_size
    steps = (
        processor.do_resize and processor.do_center_crop and processor.do_rescale and processor.do_normalize
    )
    if not steps or processor.resample != BICUBIC or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise DataError(
            f"the preprocessing of {name} is not CLIP's bicubic resize, centre crop, 1/255 and normalise"
        )
    if not edge or edge < image_size or (crop.height, crop.width) != (image_size, image_size):
        raise DataError(
            f"the preprocessing of {name} does not make the {image_size} px pictures its model takes"
        )
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Preprocess(edge, image_size, mean, std)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
