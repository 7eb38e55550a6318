from typing import Any

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from rtdmd_cli.engine.compute.device import plain_attention
from rtdmd_cli.engine.compute.joint_attention import JoinedProjections, join_projections
from rtdmd_cli.engine.compute.mixed import MixedPrecision

UNREAD = "transformer_blocks.1.attn.add_q_proj."
"""The queries of the last block's text."""
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (),
}


def network(**other: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = SD3Transformer2DModel(**(SIZES | {"qk_norm": None} | other))
    return made.train()  # the mode makes no difference to these layers


def evaluated(transformer: nn.Module) -> Tensor:
    """The velocity of two pictures of 4 x 6 latents, with 5 tokens of text."""
    torch.manual_seed(1)
    out: Tensor = transformer(
        hidden_states=torch.randn(2, 4, 4, 6),
        encoder_hidden_states=torch.randn(2, 5, 24),
        timestep=torch.tensor([200.0, 900.0]),
        pooled_projections=torch.randn(2, 20),
        return_dict=False,
    )[0]
    return out


def gradients(transformer: nn.Module) -> dict[str, Tensor]:
    transformer.zero_grad()
    evaluated(transformer).square().sum().backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}


def joined(transformer: nn.Module) -> int:
    """How many attention layers have the other processor."""
    layers = [each for each in transformer.modules() if isinstance(each, Attention)]
    return sum(type(layer.processor) is JoinedProjections for layer in layers)


def products(transformer: nn.Module) -> int:
    with torch.profiler.profile() as profile, torch.no_grad():
        evaluated(transformer)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::linear")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_value_and_gradients_are_the_stock_ones_to_rounding(checkpointed: bool) -> None:
    stock, other = network(), network()
    mixed = MixedPrecision([other], None)
    assert joined(other) == 2 and torch.equal(evaluated(other), evaluated(stock))
    if checkpointed:
        other.enable_gradient_checkpointing()  # type: ignore[operator]
    expected = gradients(stock)
    with mixed.active():
        torch.testing.assert_close(evaluated(other), evaluated(stock), rtol=1e-5, atol=1e-5)
        found = gradients(other)
    unread = {name for name in expected if name.startswith(UNREAD)}
    assert len(unread) == 2 and not any(expected[name].any() for name in unread)
    assert found.keys() == expected.keys() - unread
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_two_products_in_place_of_six_while_wanted() -> None:
    transformer = network()
    stock, mixed = products(transformer), MixedPrecision([transformer], None)
    assert products(transformer) == stock
    with mixed.active():
        assert products(transformer) == stock - 2 * 4
        with plain_attention():
            assert products(transformer) == stock


@pytest.mark.parametrize(
    ("other", "count"), [({"qk_norm": "rms_norm"}, 0), ({"dual_attention_layers": (0,)}, 2)]
)
def test_layers_with_norms_and_those_of_the_picture_alone_stay(other: dict[str, Any], count: int) -> None:
    transformer, stock = network(**other), network(**other)
    join_projections(transformer, lambda: True)
    assert joined(transformer) == count
    torch.testing.assert_close(evaluated(transformer), evaluated(stock), rtol=1e-5, atol=1e-5)


def test_layers_with_adapters_stay() -> None:
    transformer = network()
    config = peft.LoraConfig(r=2, target_modules=["transformer_blocks.0.attn.to_q"])
    peft.inject_adapter_in_model(config, transformer, "generator")
    join_projections(transformer, lambda: True)
    assert joined(transformer) == 1
