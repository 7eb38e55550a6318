"""Qwen3-VL as a judge: how probable an answer to a question about a picture is, differentiable to the pixels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache, Qwen3VLForConditionalGeneration

from rtdmd_cli.engine.compute.quiet import quiet_loading
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
from rtdmd_cli.errors import DataError, EnvironmentFailure

SOURCE = "Qwen/Qwen3-VL-8B-Instruct"
MODEL_FILES = ("*.safetensors", *INPUT_FILES)
AT_ONCE = 8  # questions; each needs a copy of the picture's keys and values, about 150 MB at 1024 px


@dataclass(frozen=True)
class QwenVL:
    """A frozen Qwen3-VL in the precision of its weights."""

    model: Any  # Qwen3VLForConditionalGeneration
    chat: Chat
    preprocess: Preprocess
    device: torch.device

    @classmethod
    def load(cls, device: torch.device, path: str | None) -> QwenVL:
        """From `path`, a folder or hub id in the published layout of Qwen/Qwen3-VL-8B-Instruct, or from there.

        That is config.json, preprocessor_config.json, the tokenizer, chat_template.json or .jinja, and the weights
        as safetensors. DataError where the folder is incomplete, damaged or holds another model;
        EnvironmentFailure where the hub can't deliver.
        """
        folder = find_folder(path or SOURCE, MODEL_FILES, "qwen3_vl")
        try:
            with quiet_loading():
                loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(
                    folder,
                    local_files_only=True,
                    dtype="auto",
                    device_map={"": device},
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, TypeError, SafetensorError, StrictDataclassError) as error:
            raise DataError(f"The model in {folder} can't be loaded: {first_line(error)}", AGAIN) from error
        model, info = loaded
        check_loaded(str(folder), info)
        model.eval().requires_grad_(False)
        return cls(model, load_chat(folder, model.config.image_token_id), read_preprocess(folder), device)

    def probabilities(
        self, image: Tensor, questions: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> Tensor:
        """P(the reply to `questions[i]` begins with the first token of one of `answers[i]`), float32 [N] in 0..1.

        image [3,H,W], float in 0..1. The softmax is over the whole vocabulary.
        """
        assert len(questions) == len(answers) > 0
        patches, grid = self.preprocess(image[None].to(self.device, torch.float32))
        count = int(grid[0].prod()) // self.preprocess.merge**2
        tokens = [self.chat.tokens(question, count) for question in questions]
        if any(before != tokens[0][0] for before, _ in tokens):
            raise DataError("The judge's chat template puts the question before its picture.", AGAIN)
        head = torch.tensor([tokens[0][0]], device=self.device)
        picture = self._read_picture(head, patches, grid)
        found = []
        for start in range(0, len(questions), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            replies = self._replies(head, [tail for _, tail in tokens[rows]], grid, picture)
            for reply, words in zip(replies, answers[rows], strict=True):
                found.append(reply[self.chat.first_tokens(words)].sum())
        return torch.stack(found)

    def _read_picture(self, head: Tensor, patches: Tensor, grid: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1,heads,P,d] of every layer for the P tokens up to the end of the picture, head [1,P].

        They are the same for all questions, since the text of a question comes after its picture.
        """
        cache = DynamicCache()
        self._read(cache, head, self._positions(head, grid), pixel_values=patches, image_grid_thw=grid)
        layers: Any = cache.layers  # all of attention, and filled
        return [(layer.keys, layer.values) for layer in layers]

    def _replies(
        self, head: Tensor, tails: list[list[int]], grid: Tensor, picture: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Probabilities [N,V] of the token after each of the N sequences head + tail, float32."""
        n, start, ends = len(tails), head.shape[1], [len(tail) - 1 for tail in tails]
        # What fills a row up comes after its end, where the network doesn't look.
        ids = torch.tensor([tail + [0] * (max(ends) + 1 - len(tail)) for tail in tails], device=self.device)
        positions = self._positions(torch.cat([head.expand(n, -1), ids], 1), grid.expand(n, 3))
        cache = DynamicCache([(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in picture])
        hidden = self._read(cache, ids, positions[:, :, start:])
        last = hidden[torch.arange(n, device=self.device), torch.tensor(ends, device=self.device)]
        logits: Tensor = self.model.lm_head(last)
        return logits.float().softmax(-1)

    def _read(self, cache: DynamicCache, ids: Tensor, positions: Tensor, **picture: Tensor) -> Tensor:
        """Hidden states [N,L,D] of ids [N,L] that follow what is in the cache, to which they are added.

        EnvironmentFailure where transformers has left the cache alone: the answers would not be about the picture.
        """
        before, network = cache.get_seq_length(), self.model.model
        named = {_cache_name(type(network)): cache}
        hidden: Tensor = network(
            input_ids=ids, position_ids=positions, use_cache=True, **named, **picture
        ).last_hidden_state
        if cache.get_seq_length() != before + ids.shape[1]:
            raise EnvironmentFailure(
                f"transformers {version('transformers')} does not read a picture once for several questions.",
                "Install the version that this program was tested with: pip install 'transformers<5.24'",
            )
        return hidden

    def _positions(self, ids: Tensor, grid: Tensor) -> Tensor:
        """The three position indices (time, row, column) [3,N,L] of ids [N,L]; grid [N,3], one picture a row."""
        types = (ids == self.chat.image_token).int()
        positions: Tensor = self.model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=grid
        )[0]
        return positions


def _cache_name(network: type[Any]) -> str:
    """What transformers calls the keys and values of earlier tokens: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """transformers fills missing tensors with random numbers and goes on; here that is a DataError."""
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    for kind, keys in (
        ("lack or do not fit", missing),
        ("have the unexpected", sorted(info["unexpected_keys"])),
    ):
        if keys:
            raise DataError(f"The weights of {name} {kind} {keys[0]} ({len(keys)} tensors in all).", AGAIN)
