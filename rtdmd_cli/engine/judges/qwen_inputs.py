"""The inputs of the Qwen-VL models for a question about a picture: pixels, tokens, and the files that both come from.

The image processor is written again, differentiably; its settings are the published ones. The text is rendered with
the published chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.judges.features import resize
from rtdmd_cli.engine.judges.pixels import normalise
from rtdmd_cli.engine.storage import strict_json
from rtdmd_cli.engine.storage.hub import hub_folder
from rtdmd_cli.errors import DataError

BICUBIC = 3  # PIL's number, as image processors store it
AGAIN = "Fetch the model again, or check the path of the reward."
INPUT_FILES = ("*.json", "*.jinja", "merges.txt")  # of a repository: everything but its weights
_NEEDED = (
    ("config.json",),
    ("preprocessor_config.json",),
    ("tokenizer.json", "vocab.json"),
)


@dataclass(frozen=True)
class Preprocess:
    """Pictures to patches.

    min_pixels, max_pixels: bounds of the area, within which the sides are rounded to multiples of patch x merge px.
    frames: how often a picture is repeated to make the video that the patch embedding expects.
    """

    min_pixels: int
    max_pixels: int
    patch: int
    merge: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,H,W] in 0..1 -> (patches [B h w, 3 frames patch^2], grid [B,3] of (1, h, w) patches)."""
        height, width = smart_resize(
            images.shape[-2],
            images.shape[-1],
            factor=self.patch * self.merge,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        pixels = normalise(resize(images, height, width), self.mean, self.std)
        rows, columns, block = height // self.patch, width // self.patch, (self.merge, self.patch)
        pixels = pixels.reshape(len(images), 3, rows // self.merge, *block, columns // self.merge, *block)
        # batch, block row, block column, row and column in the block, channel, y and x in the patch
        pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        pixels = pixels.expand(*pixels.shape[:6], self.frames, self.patch, self.patch)
        grid = torch.tensor([[1, rows, columns]], device=images.device).expand(len(images), 3)
        return pixels.reshape(len(images) * rows * columns, -1), grid


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template. image_token: the id that stands for `merge`^2 patches."""

    tokenizer: Any  # Qwen2Tokenizer; its calls carry no types
    template: str
    image_token: int

    def tokens(self, text: str, image_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids of a question about one picture: up to the picture's last token, and after it.

        DataError where `text` itself holds the picture's token.
        """
        mark = self.tokenizer.convert_ids_to_tokens(self.image_token)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        parts = rendered.split(mark)
        if len(parts) != 2:
            raise DataError(
                f"A prompt holds {mark}, which stands for a picture.", "Remove it from the prompts."
            )
        before, after = (self.tokenizer(part, add_special_tokens=False).input_ids for part in parts)
        return before + image_tokens * [self.image_token], after

    def first_tokens(self, words: Sequence[str]) -> list[int]:
        """The ids with which `words` begin, each once, in ascending order."""
        return sorted({self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words})


def find_folder(source: str, patterns: Sequence[str], model_type: str) -> Path:
    """The folder with the files of a model: `source` itself, or a hub repository's files that match `patterns`.

    model_type: as config.json names it. DataError where the folder lacks something or holds another model,
    EnvironmentFailure where the hub can't deliver.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = hub_folder(source, patterns, "config.json")
    for names in _NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise DataError(f"The model in {folder} lacks {' or '.join(names)}.", AGAIN)
    found = read_json(folder / "config.json").get("model_type")
    if found != model_type:
        raise DataError(f"The model in {folder} is a {found}, not a {model_type}.", AGAIN)
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; DataError where it is unreadable or holds anything else."""
    try:
        content = strict_json.read(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read: {first_line(error)}", AGAIN) from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no settings.", AGAIN)
    return content


def load_chat(folder: Path, image_token: int) -> Chat:
    """The tokenizer of `folder` with the template of chat_template.jinja, chat_template.json or the tokenizer.

    image_token: its id in the model's configuration. DataError where the tokenizer has another, or no template.
    """
    try:
        with quiet_loading():
            tokenizer: Any = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise DataError(f"The tokenizer in {folder} can't be loaded: {first_line(error)}", AGAIN) from error
    template = tokenizer.chat_template  # from chat_template.jinja, if there is one
    legacy = folder / "chat_template.json"
    if legacy.is_file() and not (folder / "chat_template.jinja").is_file():
        template = read_json(legacy).get("chat_template")
    if not isinstance(template, str):
        raise DataError(f"The model in {folder} has no chat template.", AGAIN)
    tokens = tokenizer.get_added_vocab()
    if image_token not in tokens.values():
        raise DataError(f"The tokenizer in {folder} has no token {image_token} for pictures.", AGAIN)
    return Chat(tokenizer, template, image_token)


def read_preprocess(folder: Path) -> Preprocess:
    """The settings of preprocessor_config.json; DataError where `Preprocess` would not do the same."""
    try:
        with quiet_loading():
            found: Any = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"The preprocessing in {folder} can't be read: {first_line(error)}", AGAIN) from error
    steps = found.do_resize and found.do_rescale and found.do_normalize
    same = found.resample == BICUBIC and abs(found.rescale_factor * 255 - 1) < 1e-6
    if not steps or not same:
        raise DataError(
            f"The preprocessing in {folder} is not Qwen-VL's bicubic resize, 1/255 and normalise.", AGAIN
        )
    return Preprocess(
        min_pixels=found.size["shortest_edge"],
        max_pixels=found.size["longest_edge"],
        patch=found.patch_size,
        merge=found.merge_size,
        frames=found.temporal_patch_size,
        mean=tuple(found.image_mean),
        std=tuple(found.image_std),
    )


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
