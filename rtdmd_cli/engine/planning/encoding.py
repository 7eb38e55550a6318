"""The text encoders as shapes alone: what they hold, and what encoding takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rtdmd_cli.config.schema import HardwareConfig, ModelConfig
from rtdmd_cli.engine.backbones import families
from rtdmd_cli.engine.compute.float32_products import multiply_in_float32
from rtdmd_cli.engine.planning.account import Account, fused_attention
from rtdmd_cli.engine.planning.depth import extrapolated
from rtdmd_cli.engine.planning.skeleton import META, Configs, on_shapes, tensors_of
from rtdmd_cli.engine.planning.stand_ins import multiplies_wide, quantise
from rtdmd_cli.engine.storage import strict_json

LANGUAGE = "text_config"  # of a config of transformers
KINDS_OF_LAYERS = "layer_types"  # of each one, as configs name them that transformers itself has written


@dataclass(frozen=True)
class Encoding:
    """parts: bytes as loaded, by encoder; weights: bytes as used; activations: bytes beside them for a batch.

    flops: of a prompt.
    """

    parts: Mapping[str, int]
    weights: int
    activations: int
    flops: int

    @property
    def loaded(self) -> int:
        """Bytes as loaded, of all encoders."""
        return sum(self.parts.values())


def encoding(model: ModelConfig, hardware: HardwareConfig, dtype: torch.dtype, configs: Configs) -> Encoding:
    """All text encoders of a model, one after another on the prompts that they get at once."""
    module = families.FAMILIES[model.family].module()
    batch, int8 = module.ENCODE_BATCH, hardware.text_encoder == "int8"
    wide = multiplies_wide(hardware, dtype)
    length = model.text_length + module.BACKBONE.unread
    found = {
        name: encoder_cost(
            module.LAYOUT.networks[name], json.dumps(configs[name]), length, batch, int8, dtype, wide
        )
        for name in module.LAYOUT.encoders
        if name in configs
    }
    return Encoding(
        {name: each["loaded"] for name, each in found.items()},
        sum(each["weights"] for each in found.values()),
        max(each["activations"] for each in found.values()),
        sum(each["flops"] for each in found.values()) // batch,
    )


@cache
def encoder_cost(
    kind: Any, text: str, length: int, batch: int, int8: bool, dtype: torch.dtype, wide: bool = False
) -> dict[str, int]:
    """Of one encoder, whose config is `text`: as `Encoding`, but flops of a batch. wide: multiplied in float32."""
    config = strict_json.parse(text)
    language = config.get(LANGUAGE, config)  # of a model that sees, the part that reads
    key = "num_layers" if "num_layers" in language else "num_hidden_layers"

    def count(few: Mapping[str, int]) -> dict[str, int]:
        shallow: dict[str, Any] = {key: few[key]}
        if KINDS_OF_LAYERS in language:
            shallow[KINDS_OF_LAYERS] = language[KINDS_OF_LAYERS][: few[key]]
        if LANGUAGE in config:
            shallow = {LANGUAGE: language | shallow}
        encoder: Any = on_shapes(kind, config | shallow, dtype)
        loaded = sum(tensor.nbytes for tensor in tensors_of([encoder]))
        if int8:
            quantise(encoder, "int8", blocks_only=False, wide=wide)
        elif wide:
            multiply_in_float32(encoder)
        account = Account()
        with fused_attention(), account, torch.no_grad():
            weights = account.hold(tensors_of([encoder]))
            account.restart()
            kept = run_encoder(encoder, length, batch)
            activations = account.peak - weights
            del kept
        return {"loaded": loaded, "weights": weights, "activations": activations, "flops": account.flops}

    return extrapolated({key: language[key]}, count)


def run_encoder(encoder: Any, length: int, batch: int) -> Any:
    """As the stock pipelines call it: CLIP on all its tokens, the others on `length`."""
    config = encoder.config
    tokens = config.max_position_embeddings if config.model_type.startswith("clip") else length
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
    if config.model_type.startswith("t5"):
        return encoder(input_ids=ids)
    if not config.model_type.startswith("qwen"):
        return encoder(input_ids=ids, output_hidden_states=True)
    mask = torch.ones(
        batch, 1, tokens, tokens, dtype=torch.bool, device=META
    )  # whole: no number of it is looked at
    return encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
