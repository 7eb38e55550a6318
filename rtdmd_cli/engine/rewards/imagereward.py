"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977): BLIP reads the prompt while it looks at the picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.judges.features import resize
from rtdmd_cli.engine.judges.pixels import check_batch, normalise
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.rewards.convert import converted_from
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.hub import hub_file
from rtdmd_cli.engine.storage.tensors import check_tensors
from rtdmd_cli.errors import DataError

SOURCE = "THUDM/ImageReward"
VOCABULARY_SOURCE = "google-bert/bert-base-uncased"
WEIGHTS, CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
CONVERSION = "imagereward-1"

TEXT_LENGTH = 35  # tokens
SHIFT, SCALE = 0.16717362830052426, 1.0333394966054072  # of the scores of the training data
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
ADDED_TOKENS = ("[DEC]", "[ENC]")  # BLIP's, after BERT's vocabulary
HEAD_WIDTH = 64  # of BLIP's vision transformers, base and large
HIDDEN = (1024, 128, 64, 16, 1)  # widths of the layers on top; they have no activations
MLP_PLACES = (0, 2, 4, 6, 7)  # of these layers among the published dropouts
_AGAIN = "Fetch the file again from its publisher."

# Published names -> ours. The text encoder's are the same.
_NAMES = (
    (r"blip\.visual_encoder\.cls_token", r"vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", r"vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(\w+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)",
        r"vision.encoder.layers.\1.self_attn.projection.\2",
    ),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12]\.\w+)", r"vision.encoder.layers.\1.mlp.\2"),
    (r"blip\.visual_encoder\.norm\.(\w+)", r"vision.post_layernorm.\1"),
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"mlp\.layers\.(\d+\.\w+)", r"mlp.\1"),
)
_UNUSED = re.compile(r"blip\.((vision|text)_proj\.(weight|bias)|text_encoder\.embeddings\.position_ids)")
"""Of BLIP's contrastive loss, and a count from 0; the published code has no use for them either."""


class Network(nn.Module):
    """Vision transformer, text encoder with cross attention to it, and linear layers on the first token."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *HIDDEN)
        layers = zip(MLP_PLACES, widths, HIDDEN, strict=False)
        self.mlp = nn.ModuleDict({str(place): nn.Linear(n, m) for place, n, m in layers})

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [B,3,size,size], ids and mask [B,L] -> [B], before the shift and scale."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        x: Tensor = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        for layer in self.mlp.values():
            x = layer(x)
        return x[:, 0]


@dataclass(frozen=True)
class ImageReward:
    """The published score, about -2 to 2. See `base.Reward`. Frozen, float32."""

    network: Network
    tokenizer: Any  # BertTokenizer
    size: int  # px of the pictures the network takes
    device: torch.device
    differentiable: ClassVar[bool] = True

    @classmethod
    def load(cls, device: torch.device, path: str | None) -> ImageReward:
        """The network from THUDM/ImageReward, the vocabulary from google-bert/bert-base-uncased, or all from `path`.

        path: a folder or hub id with ImageReward.pt, med_config.json and vocab.txt (of bert-base-uncased).
        DataError where something is missing, damaged or does not fit; EnvironmentFailure where the hub can't
        deliver.
        """
        text = _read_text_config(_find(path or SOURCE, CONFIG))
        tokenizer = _load_tokenizer(_find(path or VOCABULARY_SOURCE, VOCABULARY), text.vocab_size)
        source = str(Path(path).expanduser()) if path else SOURCE
        file = converted_from(source, WEIGHTS, CONVERSION, convert)
        tensors = load_file(file)
        vision = _vision_config(tensors)
        text.encoder_hidden_size = vision.hidden_size
        with init_empty_weights(include_buffers=False), quiet_loading():
            network = Network(vision, text)
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        check_tensors(tensors, shapes, f"ImageReward ({source})")
        network.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
        network.to(device).eval().requires_grad_(False)
        return cls(network, tokenizer, vision.image_size, device)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        check_batch(images, prompts, metadata)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        ).to(self.device)
        pixels = preprocess(images.to(self.device, torch.float32), self.size)
        raw: Tensor = self.network(pixels, tokens.input_ids, tokens.attention_mask)
        return ((raw - SHIFT) / SCALE).to(images.device)


def preprocess(images: Tensor, size: int) -> Tensor:
    """images [B,3,H,W] in 0..1 -> [B,3,size,size]: shorter edge to `size` px, centre crop, CLIP's mean and std.

    As torchvision's Resize and CenterCrop on PIL pictures, but for their 8-bit rounding.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    images = resize(images, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalise(images[..., top : top + size, left : left + size], MEAN, STD)


def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published names to those of `Network`; DataError for a name that is unknown, or with no vision at all."""
    renamed = {}
    for key, value in tensors.items():
        if _UNUSED.fullmatch(key):
            continue
        name = next((re.sub(old, new, key) for old, new in _NAMES if re.fullmatch(old, key)), None)
        if name is None:
            raise DataError(f"The weights of ImageReward have the unexpected {key}.", _AGAIN)
        renamed[name] = value
    _vision_config(renamed)
    return renamed


def _find(source: str, file: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return hub_file(source, file)
    if not (folder / file).is_file():
        origin = VOCABULARY_SOURCE if file == VOCABULARY else SOURCE
        raise DataError(f"The folder {folder} lacks {file}.", f"Fetch it from {origin} on the hub.")
    return folder / file


def _read_text_config(file: Path) -> Any:
    """med_config.json, BERT's settings, as BlipTextConfig. DataError where one is missing or no number."""
    numbers = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "layer_norm_eps",
    )
    try:
        content = strict_json.read(file)
        settings: dict[str, Any] = {key: content[key] for key in numbers}
        return BlipTextConfig(**settings, hidden_act=content["hidden_act"], is_decoder=True)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise DataError(f"{file} does not hold the settings of a BERT: {error!r}", _AGAIN) from error


def _load_tokenizer(file: Path, vocabulary: int) -> Any:
    """BERT's uncased tokenizer with BLIP's two tokens; DataError where the network knows another number of them."""
    try:
        words = file.read_text("utf-8").splitlines()
        tokenizer: Any = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise DataError(f"{file} is no vocabulary of BERT: {error!r}", _AGAIN) from error
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise DataError(
            f"{file} with BLIP's tokens has {len(tokenizer)} words, the network knows {vocabulary}.",
            f"Use the vocab.txt of {VOCABULARY_SOURCE}.",
        )
    return tokenizer


def _vision_config(tensors: Mapping[str, Tensor]) -> Any:
    """The sizes of the vision transformer, which are written nowhere else."""
    try:
        patch = tensors["vision.embeddings.patch_embedding.weight"]  # [width,3,patch,patch]
        places = tensors["vision.embeddings.position_embedding"].shape[1] - 1
        inner = tensors["vision.encoder.layers.0.mlp.fc1.bias"].shape[0]
    except (KeyError, IndexError) as error:
        raise DataError(f"The weights of ImageReward lack its vision transformer: {error}", _AGAIN) from error
    if patch.ndim != 4 or patch.shape[0] % HEAD_WIDTH:
        raise DataError(f"The vision transformer of ImageReward starts with {list(patch.shape)}.", _AGAIN)
    depth = 1 + max(
        int(found[1]) for key in tensors if (found := re.match(r"vision\.encoder\.layers\.(\d+)\.", key))
    )
    return BlipVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=patch.shape[0] // HEAD_WIDTH,
        image_size=round(places**0.5) * patch.shape[-1],
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
    )
