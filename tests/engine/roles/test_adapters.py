"""Roles: one base, two adapters, right gradients whatever is called in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from rtdmd_cli.config.section import ATTENTION, LoraConfig
from rtdmd_cli.engine.compute.optim import build_optimizer
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.errors import DataError, UsageError
from tests.tiny_models import build_transformer

LORA = LoraConfig(rank=4, alpha=8, targets=ATTENTION)


def inputs(batch: int = 2) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=source),
        "timestep": torch.linspace(300, 800, batch),
        "encoder_hidden_states": torch.randn(batch, 20, 40, generator=source),
        "pooled_projections": torch.randn(batch, 20, generator=source),
    }


def run(transformer: Any, x: Tensor | None = None) -> Tensor:
    arguments = inputs()
    if x is not None:
        arguments["hidden_states"] = x
    v: Tensor = transformer(**arguments).sample
    return v


def output(roles: Roles, role: str) -> Tensor:
    with torch.no_grad(), roles.role(role):
        return run(roles.transformer)


def noisy_state(roles: Roles, role: str, seed: int) -> dict[str, Tensor]:
    """Weights that change the output: with B = 0 every role is the teacher, and A gets no gradient."""
    source = torch.Generator().manual_seed(seed)
    state = roles.state(role)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=source) for name, tensor in state.items()
    }


@pytest.fixture
def roles() -> Roles:
    """Both adapters away from the teacher."""
    made = Roles(build_transformer(), LORA, seed=0)
    for seed, role in enumerate(("generator", "fake")):
        made.load(role, noisy_state(made, role, seed))
    return made


def flags(roles: Roles) -> list[tuple[list[str], bool]]:
    layers = [module for module in roles.transformer.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    return [(list(layer.active_adapters), layer.disable_adapters) for layer in layers]


def trainable(roles: Roles) -> set[str]:
    return {name for name, parameter in roles.transformer.named_parameters() if parameter.requires_grad}


# --- the start


def test_both_roles_start_as_the_teacher() -> None:
    base = build_transformer()
    with torch.no_grad():
        before = run(base)
    roles = Roles(base, LORA, seed=0)
    for role in ("teacher", "generator", "fake"):
        assert torch.equal(output(roles, role), before)


def test_start_is_gaussian_keyed_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    first = Roles(build_transformer(), LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = Roles(build_transformer(), LORA, seed=3), Roles(build_transformer(), LORA, seed=4)
    for role in ("generator", "fake"):
        start = first.state(role)
        assert all(torch.equal(tensor, again.state(role)[name]) for name, tensor in start.items())
        down = {name: tensor for name, tensor in start.items() if "lora_A" in name}
        assert all(not tensor.any() for name, tensor in start.items() if name not in down)
        assert not any(torch.equal(tensor, other.state(role)[name]) for name, tensor in down.items())
        values = torch.cat([tensor.flatten() for tensor in down.values()])
        assert len(values) > 2000
        torch.testing.assert_close(values.std(), torch.tensor(1 / 4), rtol=0.05, atol=0)
        assert values.mean().abs() < 0.02
        assert len({tuple(tensor.flatten().tolist()) for tensor in down.values()}) == len(down)
    generator, fake = first.state("generator"), first.state("fake")
    assert not any(torch.equal(generator[name], fake[name]) for name in generator if "lora_A" in name)


def test_adapters_are_float32_on_a_bf16_base() -> None:
    roles = Roles(build_transformer().to(torch.bfloat16), LORA, seed=0)
    for role in ("generator", "fake"):
        assert {parameter.dtype for _, parameter in roles.named_parameters(role)} == {torch.float32}
    base = {p.dtype for name, p in roles.transformer.named_parameters() if "lora_" not in name}
    assert base == {torch.bfloat16}
    exact = Roles(build_transformer(), LORA, seed=0).state("generator")
    assert all(torch.equal(tensor, exact[name]) for name, tensor in roles.state("generator").items())
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in inputs().items()} | {
        "timestep": inputs()["timestep"]
    }
    with roles.role("generator", train=True):
        roles.transformer(**cast).sample.float().square().mean().backward()
    up = [p.grad for name, p in roles.named_parameters("generator") if "lora_B" in name]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in up)


def test_adapters_in_bf16() -> None:
    """As published: weights, gradients, and so the optimiser's states; a float32 average is rounded where it is put in."""
    lora = LORA.model_copy(update={"dtype": "bf16"})
    roles = Roles(build_transformer(), lora, seed=0)
    exact = Roles(build_transformer(), LORA, seed=0).state("generator")
    state = roles.state("generator")
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in state.items())
    with roles.role("generator", train=True):
        result = roles.transformer(**inputs()).sample
        assert result.dtype == torch.float32
        result.square().mean().backward()
    named = roles.named_parameters("generator")
    assert {parameter.grad.dtype for _, parameter in named if parameter.grad is not None} == {torch.bfloat16}
    optimizer = build_optimizer(named, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    optimizer.step()
    assert {optimizer.state[parameter]["exp_avg"].dtype for _, parameter in named} == {torch.bfloat16}
    roles.load("generator", exact)
    assert all(torch.equal(t, exact[name].bfloat16()) for name, t in roles.state("generator").items())


def test_there_is_one_copy_of_the_base() -> None:
    base = build_transformer()
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    count = sum(parameter.numel() for parameter in base.parameters())
    roles = Roles(base, LORA, seed=0)
    adapters = [p for role in ("generator", "fake") for _, p in roles.named_parameters(role)]
    everything = list(roles.transformer.parameters())
    own = {parameter.data_ptr() for parameter in adapters}
    assert {parameter.data_ptr() for parameter in everything} - own == pointers
    assert len(everything) == len(pointers) + len(adapters)
    assert sum(p.numel() for p in everything) == count + sum(p.numel() for p in adapters)


def test_names_and_targets() -> None:
    roles = Roles(build_transformer(dual_attention_layers=(0,)), LORA, seed=0)
    names = [name for name, _ in roles.named_parameters("fake")]
    assert names == [name for name, _ in roles.named_parameters("generator")]
    assert "transformer_blocks.0.attn.to_out.0.lora_A.weight" in names
    assert not any("attn2" in name for name in names)  # SD3.5's second attention is not a target
    assert len(names) == 2 * (3 * 8 - 1)  # the last block has no to_add_out


def test_targets_that_match_nothing_are_named() -> None:
    config = LoraConfig(rank=4, alpha=8, targets=("to_q", "to_z", "proj_out"))
    with pytest.raises(UsageError, match=r"called to_z, proj_out") as caught:
        Roles(build_transformer(), config, seed=0)
    assert "to_add_out" in caught.value.hint and caught.value.exit_code == 2


# --- contexts


def test_each_role_runs_its_own_adapter(roles: Roles) -> None:
    teacher, generator, fake = (output(roles, role) for role in ("teacher", "generator", "fake"))
    for one, other in ((teacher, generator), (teacher, fake), (generator, fake)):
        assert (one - other).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(run(roles.transformer), teacher)  # outside every context: the base
        roles.transformer.set_adapter("fake")  # peft's own way of switching
        roles.transformer.enable_adapters()
        assert torch.equal(run(roles.transformer), fake)


def test_only_the_trained_role_requires_a_gradient(roles: Roles) -> None:
    assert trainable(roles) == set()
    with roles.role("fake", train=True):
        inside = trainable(roles)
        assert len(inside) == len(roles.named_parameters("fake"))
        assert all(".fake." in name for name in inside)
        with roles.role("teacher"):
            assert trainable(roles) == set()
        with roles.role("generator", train=True):
            assert trainable(roles) and not trainable(roles) & inside
        assert trainable(roles) == inside
    assert trainable(roles) == set()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("role", ["teacher", "fake", "generator"])
def test_leaving_restores_whatever_was_set(roles: Roles, role: str, fails: bool) -> None:
    roles.transformer.set_adapter(["generator", "fake"])
    roles.transformer.enable_adapters()
    next(parameter for _, parameter in roles.named_parameters("fake")).requires_grad_(False)
    before = flags(roles), trainable(roles)
    assert before[0][0] == (["generator", "fake"], False)
    try:
        with roles.role(role):
            active = [] if role == "teacher" else [role]
            assert flags(roles) == [(active, role == "teacher")] * len(before[0])
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert (flags(roles), trainable(roles)) == before


def gradients(roles: Roles, targets: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """The generator's gradient of a loss that needs teacher and fake.

    targets None: both are called while the generator's graph is alive; else these are used, and no role is
    switched between forward and backward.
    """
    with roles.role("generator", train=True):
        x = run(roles.transformer)
        if targets is None:
            with torch.no_grad(), roles.role("teacher"):
                teacher = run(roles.transformer, x.detach())
            with torch.no_grad(), roles.role("fake"):
                fake = run(roles.transformer, x.detach())
        else:
            teacher, fake = targets
        (x * (fake - teacher)).mean().backward()
    found = {}
    for name, parameter in roles.named_parameters("generator"):
        assert parameter.grad is not None, name
        found[name] = parameter.grad
        parameter.grad = None
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_survive_other_roles_in_between(roles: Roles, checkpointing: bool) -> None:
    x = output(roles, "generator")
    with torch.no_grad():
        with roles.role("teacher"):
            teacher = run(roles.transformer, x)
        with roles.role("fake"):
            fake = run(roles.transformer, x)
    expected = gradients(roles, (teacher, fake))
    zero = {name.rpartition(".lora_")[0] for name, gradient in expected.items() if not gradient.any()}
    assert zero == {"transformer_blocks.2.attn.add_q_proj"}  # the last block drops its text output
    if checkpointing:
        roles.transformer.enable_gradient_checkpointing()
    found = gradients(roles, None)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    for _, parameter in roles.named_parameters("fake"):
        assert parameter.grad is None


def test_teacher_is_untouched_by_training(roles: Roles) -> None:
    base = {n: p.detach().clone() for n, p in roles.transformer.named_parameters() if "lora_" not in n}
    before = output(roles, "teacher")
    optimisers = {
        role: torch.optim.AdamW([p for _, p in roles.named_parameters(role)], lr=1e-2)
        for role in ("fake", "generator")
    }
    for role, optimiser in optimisers.items():
        start, other = output(roles, role), "generator" if role == "fake" else "fake"
        others = roles.state(other)
        for _ in range(2):
            with roles.role(role, train=True):
                loss = run(roles.transformer).square().mean()
                assert torch.equal(output(roles, "teacher"), before)
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            assert torch.equal(output(roles, "teacher"), before)
        assert (output(roles, role) - start).abs().max() > 1e-3
        assert all(torch.equal(tensor, roles.state(other)[name]) for name, tensor in others.items())
    assert all(torch.equal(roles.transformer.get_parameter(name), tensor) for name, tensor in base.items())


# --- weights in and out


def test_state_is_a_copy_and_loads_back(roles: Roles) -> None:
    before, fake = output(roles, "generator"), output(roles, "fake")
    state = roles.state("generator")
    roles.load("generator", roles.state("fake"))
    assert torch.equal(output(roles, "generator"), fake)
    roles.load("generator", state)
    assert torch.equal(output(roles, "generator"), before)


def test_loading_is_strict(roles: Roles) -> None:
    state = roles.state("generator")
    name, other = list(state)[:2]
    cases = {
        rf"{name} is missing": {key: tensor for key, tensor in state.items() if key != name},
        r"base\.weight is unexpected": state | {"base.weight": torch.zeros(1)},
        rf"{name} is torch.float32 \[1\] instead": state | {name: torch.zeros(1)},
        rf"{other} is torch.bfloat16": state | {other: state[other].to(torch.bfloat16)},
        "and 41 more": {},
    }
    for message, tensors in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            roles.load("generator", {key: tensor + 1 for key, tensor in tensors.items()})
        assert "generator" in caught.value.message and caught.value.hint
    assert all(torch.equal(tensor, roles.state("generator")[key]) for key, tensor in state.items())


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_weights_come_back_bit_for_bit(roles: Roles, fails: bool) -> None:
    state, ema = roles.state("generator"), noisy_state(roles, "generator", 5)
    inner = None
    try:
        with roles.swapped("generator", ema):
            inner = output(roles, "generator")
            assert all(torch.equal(tensor, roles.state("generator")[name]) for name, tensor in ema.items())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(torch.equal(tensor, roles.state("generator")[name]) for name, tensor in state.items())
    roles.load("generator", ema)
    assert inner is not None and torch.equal(output(roles, "generator"), inner)


def test_the_same_parameters_stay_with_the_optimiser(roles: Roles) -> None:
    held = [parameter for _, parameter in roles.named_parameters("generator")]
    with roles.swapped("generator", noisy_state(roles, "generator", 5)):
        pass
    roles.load("generator", roles.state("generator"))
    now = [parameter for _, parameter in roles.named_parameters("generator")]
    assert all(one is other for one, other in zip(held, now, strict=True))


# --- stage 2: fresh adapters on top of frozen ones

FRESH = LoraConfig(rank=3, alpha=3, targets=("to_q", "to_out.0", "add_k_proj"))
FROZEN = ("stage1_generator", "stage1_fake")


def two_stages() -> Roles:
    """As stage 2 begins: stage 1's adapters loaded, fresh ones of other rank, scale and targets."""
    made = Roles(build_transformer(), LORA, seed=0, fresh=FRESH)
    for seed, adapter in enumerate(FROZEN):
        made.load(adapter, noisy_state(made, adapter, seed))
    return made


@pytest.fixture
def stacked() -> Roles:
    """Every adapter away from where it starts."""
    made = two_stages()
    for seed, role in enumerate(("generator", "fake"), 5):
        made.load(role, noisy_state(made, role, seed))
    return made


def merged(*parts: tuple[dict[str, Tensor], LoraConfig]) -> Tensor:
    """The output of a base whose weights are W + sum of alpha/r B A."""
    base = build_transformer()
    with torch.no_grad():
        for state, config in parts:
            for name in (key.removesuffix(".lora_A.weight") for key in state if "lora_A" in key):
                down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
                base.get_parameter(f"{name}.weight").add_(config.alpha / config.rank * up @ down)
        return run(base)


@pytest.mark.parametrize("role", ["generator", "fake"])
def test_stacked_adapters_are_merged_weights(stacked: Roles, role: str) -> None:
    below, own = (stacked.state(f"stage1_{role}"), LORA), (stacked.state(role), FRESH)
    torch.testing.assert_close(output(stacked, role), merged(below, own), rtol=1e-6, atol=2e-6)
    assert (output(stacked, role) - merged(below)).abs().max() > 1e-2
    assert (output(stacked, role) - merged(own)).abs().max() > 1e-2


def test_the_start_role_is_stage_1_generator(stacked: Roles) -> None:
    alone = Roles(build_transformer(), LORA, seed=0)
    alone.load("generator", stacked.state("stage1_generator"))
    assert torch.equal(output(stacked, "start"), output(alone, "generator"))
    assert torch.equal(output(stacked, "teacher"), output(alone, "teacher"))
    assert (output(stacked, "start") - output(stacked, "generator")).abs().max() > 1e-2


def test_fresh_adapters_change_nothing_at_first() -> None:
    roles = two_stages()
    for role in ("generator", "fake"):
        alone = Roles(build_transformer(), LORA, seed=0)
        alone.load(role, roles.state(f"stage1_{role}"))
        assert torch.equal(output(roles, role), output(alone, role))


def test_fresh_adapters_start_from_standard_normal_numbers() -> None:
    roles, again = two_stages(), two_stages()
    for role in ("generator", "fake"):
        start = roles.state(role)
        assert all(torch.equal(tensor, again.state(role)[name]) for name, tensor in start.items())
        assert not any(tensor.any() for name, tensor in start.items() if "lora_B" in name)
        down = torch.cat([tensor.flatten() for name, tensor in start.items() if "lora_A" in name])
        assert len(down) > 700
        torch.testing.assert_close(down.std(), torch.tensor(1.0), rtol=0.08, atol=0)
        assert down.mean().abs() < 0.12
        assert next(iter(start.values())).shape == (3, 32) and len(start) == 2 * 9
    below = Roles(build_transformer(), LORA, seed=0, fresh=FRESH).state("stage1_generator")
    down = torch.cat([tensor.flatten() for name, tensor in below.items() if "lora_A" in name])
    torch.testing.assert_close(down.std(), torch.tensor(1 / 4), rtol=0.05, atol=0)


def test_training_touches_the_fresh_adapter_alone(stacked: Roles) -> None:
    base = {n: p.detach().clone() for n, p in stacked.transformer.named_parameters() if "lora_" not in n}
    for role in ("fake", "generator"):
        others = [name for name in (*FROZEN, "fake", "generator") if name != role]
        before, own = {name: stacked.state(name) for name in others}, stacked.state(role)
        optimiser = torch.optim.AdamW([p for _, p in stacked.named_parameters(role)], lr=1e-2)
        with stacked.role(role, train=True):
            assert trainable(stacked) and all(f".{role}." in name for name in trainable(stacked))
            run(stacked.transformer).square().mean().backward()
        optimiser.step()
        assert any(not torch.equal(tensor, own[name]) for name, tensor in stacked.state(role).items())
        for name, state in before.items():
            assert all(torch.equal(tensor, stacked.state(name)[key]) for key, tensor in state.items())
            if name in FROZEN:
                assert all(p.grad is None for _, p in stacked.named_parameters(name))
    assert all(torch.equal(stacked.transformer.get_parameter(name), tensor) for name, tensor in base.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_stack_survive_other_roles_in_between(stacked: Roles, checkpointing: bool) -> None:
    """As in the policy term: the start generator, teacher and fake are called while the graph is alive."""

    def found(nested: bool) -> dict[str, Tensor]:
        gradients = {}
        with stacked.role("generator", train=True):
            x = run(stacked.transformer)
            total = x.square().mean()
            for other in ("start", "teacher", "fake"):
                if nested:
                    with torch.no_grad(), stacked.role(other):
                        target = run(stacked.transformer)
                else:
                    target = targets[other]
                total = total + (x * target).mean()
            total.backward()
        for name, parameter in stacked.named_parameters("generator"):
            assert parameter.grad is not None, name
            gradients[name], parameter.grad = parameter.grad, None
        return gradients

    targets = {other: output(stacked, other) for other in ("start", "teacher", "fake")}
    expected = found(nested=False)
    if checkpointing:
        stacked.transformer.enable_gradient_checkpointing()
    nested = found(nested=True)
    assert all(torch.equal(nested[name], gradient) for name, gradient in expected.items())
    assert any(gradient.any() for gradient in expected.values())


def test_fresh_targets_that_match_nothing_name_their_section() -> None:
    for lora, fresh, section in ((LORA, "to_z", "tune_reward"), ("to_z", LORA, "distill")):
        bad = LoraConfig(rank=4, alpha=8, targets=("to_z",))
        pair = [bad if config == "to_z" else config for config in (lora, fresh)]
        with pytest.raises(UsageError, match=rf"^{section}\.lora\.targets: .*called to_z"):
            Roles(build_transformer(), pair[0], seed=0, fresh=pair[1])


def test_layers_and_lists_of_layers_of_the_same_ending() -> None:
    """FLUX.2: `attn.to_out` is a list of layers in a double block, and a layer in a single one."""
    transformer = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 2, 2),
        timestep_guidance_channels=8,
    )
    double, single = ("to_out.0", "add_k_proj", "to_q"), ("to_out", "to_qkv_mlp_proj")
    lora = LoraConfig(rank=1, alpha=1, targets=(*double, *single))
    roles = Roles(transformer, lora, 0, fresh=lora)
    expected = {f"transformer_blocks.{i}.attn.{each}" for i in range(3) for each in double}
    expected |= {f"single_transformer_blocks.{i}.attn.{each}" for i in range(6) for each in single}
    assert len(expected) > 20  # peft shortens longer lists
    for adapter in ("generator", "fake", "stage1_generator", "stage1_fake"):
        names = {name.rpartition(".lora_")[0] for name, _ in roles.named_parameters(adapter)}
        assert names == expected
