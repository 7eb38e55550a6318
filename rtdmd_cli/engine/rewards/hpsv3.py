"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B, fine-tuned, with a head that reads its reward token.

The published network gives every token its place in the sequence as the position in time, row and column alike, also
those of the picture; the head's outputs are the mean and the logarithm of the spread of people's ratings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.judges.pixels import check_batch
from rtdmd_cli.engine.judges.qwen_inputs import (
    AGAIN,
    INPUT_FILES,
    Chat,
    Preprocess,
    find_folder,
    first_line,
    load_chat,
    read_preprocess,
)
from rtdmd_cli.engine.judges.requirements import Metadata
from rtdmd_cli.engine.storage.hub import hub_file
from rtdmd_cli.engine.storage.tensors import check_tensors
from rtdmd_cli.errors import DataError

SOURCE = "MizzenAI/HPSv3"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
WEIGHTS = "HPSv3.safetensors"
REWARD_TOKEN = "<|Reward|>"
AREA = 256 * 28 * 28  # px; pictures are made as large as fits into it
HEAD = (1024, 16, 2)

# The text the network was trained with, to the letter (MIT License, Copyright 2024 HPSv3 Team).
TEMPLATE = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst "
    "and 10 being the best. \n"
    "\n**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or "
    "adult material. If such content is present, the image quality and satisfaction score should be the lowest "
    "possible. \n"
    "\n**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) "
    "align with the textual description. The subject should match the description in terms of number, appearance, "
    "and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {prompt}\n\n\n"
    f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"
)


@dataclass(frozen=True)
class HpsV3:
    """The predicted mean rating, unbounded. See `base.Reward`. Frozen, in the precision of its weights; head float32."""

    model: Any  # Qwen2VLModel
    head: nn.Sequential
    chat: Chat
    preprocess: Preprocess
    reward_token: int
    device: torch.device
    differentiable: ClassVar[bool] = True

    @classmethod
    def load(cls, device: torch.device, path: str | None) -> HpsV3:
        """The weights from MizzenAI/HPSv3, everything else from Qwen/Qwen2-VL-7B-Instruct, or both from `path`.

        path: a folder or hub id with HPSv3.safetensors and, as in Qwen2-VL's repository, config.json,
        preprocessor_config.json, the tokenizer and chat_template.json or .jinja. DataError where something is
        missing, damaged or does not fit; EnvironmentFailure where the hub can't deliver.
        """
        folder = find_folder(path or BASE, INPUT_FILES, "qwen2_vl")
        file = Path(path).expanduser() / WEIGHTS if path and Path(path).expanduser().is_dir() else None
        tensors = _read_weights(file or hub_file(path or SOURCE, WEIGHTS))
        config = _read_config(folder)
        chat = load_chat(folder, config.image_token_id)
        chat.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        config.text_config.vocab_size = len(chat.tokenizer)
        head = _build_head(config.text_config.hidden_size)
        check_tensors(tensors, _shapes(config, head), str(file or SOURCE))
        with quiet_loading():
            model = Qwen2VLModel.from_pretrained(
                None,
                config=config,
                state_dict={_own_name(key): value for key, value in tensors.items() if "rm_head." not in key},
                dtype=tensors["model.embed_tokens.weight"].dtype,
                device_map={"": device},
            )
        model.eval().requires_grad_(False)
        head.load_state_dict({key: tensors[f"rm_head.{key}"].float() for key in head.state_dict()})
        head.to(device).eval().requires_grad_(False)
        preprocess = replace(read_preprocess(folder), min_pixels=AREA, max_pixels=AREA)
        token = chat.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        return cls(model, head, chat, preprocess, token, device)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """One picture after the other, so that a batch needs no more memory than its graphs."""
        check_batch(images, prompts, metadata)
        scores = [self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.stack(scores).to(images.device)

    def _score(self, image: Tensor, prompt: str) -> Tensor:
        patches, grid = self.preprocess(image[None].to(self.device, torch.float32))
        count = int(grid.prod()) // self.preprocess.merge**2
        before, after = self.chat.tokens(TEMPLATE.format(prompt=prompt), count)
        ids = torch.tensor([before + after], device=self.device)
        marks = (ids[0] == self.reward_token).nonzero()
        if len(marks) != 1:
            raise DataError(
                f"A prompt holds {REWARD_TOKEN}, which stands for the rating.", "Remove it from the prompts."
            )
        seen = self.model.get_image_features(patches, grid).pooler_output[0]
        embeds = self.model.get_input_embeddings()(ids)
        places = (ids == self.chat.image_token)[..., None].expand_as(embeds)
        hidden = self.model.language_model(
            inputs_embeds=embeds.masked_scatter(places, seen.to(embeds.dtype)),
            position_ids=torch.arange(ids.shape[1], device=self.device).expand(3, 1, -1),
            use_cache=False,
        ).last_hidden_state
        mean: Tensor = self.head(hidden[0, marks[0, 0]].float())[0]
        return mean


def _read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of HPSv3.safetensors, read when they are used; without the language head, which is not."""
    if not file.is_file():
        raise DataError(f"The weights {file} don't exist.", AGAIN)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"The weights {file} are damaged: {first_line(error)}", AGAIN) from error
    tensors.pop("lm_head.weight", None)
    return tensors


def _read_config(folder: Path) -> Any:
    try:
        with quiet_loading():
            return Qwen2VLConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise DataError(f"{folder / 'config.json'} can't be read: {first_line(error)}", AGAIN) from error


def _build_head(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, HEAD[0]),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(HEAD[0], HEAD[1]),
        nn.ReLU(),
        nn.Linear(HEAD[1], HEAD[2]),
    )


def _shapes(config: Any, head: nn.Module) -> dict[str, tuple[int, ...]]:
    """What HPSv3.safetensors has to hold, by its own names: those that transformers had before version 4.52."""
    with torch.device("meta"), quiet_loading():
        model = Qwen2VLModel(config)
    shapes = {
        key.replace("language_model.", "model.", 1): tuple(value.shape)
        for key, value in model.state_dict().items()
    }
    return shapes | {f"rm_head.{key}": tuple(value.shape) for key, value in head.state_dict().items()}


def _own_name(key: str) -> str:
    return key.replace("model.", "language_model.", 1) if key.startswith("model.") else key
