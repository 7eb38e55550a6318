"""Full-weight roles: three sets of weights behind one transformer, right gradients whatever is called in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.engine.roles.full import FullRoles, replace_weights
from rtdmd_cli.errors import DataError
from tests.tiny_models import build_transformer

TRAINED = ("generator", "fake")


def run(transformer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    source = torch.Generator().manual_seed(7)
    v: Tensor = transformer(
        hidden_states=torch.randn(2, 4, 8, 8, generator=source).to(dtype),
        timestep=torch.linspace(300, 800, 2),
        encoder_hidden_states=torch.randn(2, 20, 40, generator=source).to(dtype),
        pooled_projections=torch.randn(2, 20, generator=source).to(dtype),
    ).sample
    return v.float()


@torch.no_grad()
def output(roles: FullRoles, role: str, dtype: torch.dtype = torch.float32) -> Tensor:
    with roles.role(role):
        return run(roles.transformer, dtype)


def noisy(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: v + 0.02 * torch.randn(v.shape, generator=source) for name, v in state.items()}


def stirred(dtype: torch.dtype = torch.float32) -> FullRoles:
    """Generator and fake score away from the teacher, and from each other."""
    roles = FullRoles(build_transformer().to(dtype))
    for seed, role in enumerate(TRAINED):
        roles.load(role, noisy(roles.state(role), seed))
    return roles


def gradients(
    roles: FullRoles, role: str, nested: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Of a role's loss; `nested`: other roles, and the role itself without gradient, are called in between."""
    with roles.role(role, train=True):
        if nested:
            with torch.no_grad():
                run(roles.transformer, dtype)
        loss = run(roles.transformer, dtype).square().mean()
        if nested:
            for other in ("teacher", "fake", "generator"):
                output(roles, other, dtype)
        loss.backward()
    found = {name: p.grad for name, p in roles.named_parameters(role) if p.grad is not None}
    for _, parameter in roles.named_parameters(role):
        parameter.grad = None
    return found


def test_both_start_as_the_teacher_with_all_its_weights() -> None:
    base = build_transformer()
    expected, names = run(base).detach(), [name for name, _ in base.named_parameters()]
    roles = FullRoles(base)
    for role in ("teacher", *TRAINED):
        assert torch.equal(output(roles, role), expected)
    assert all([name for name, _ in roles.named_parameters(role)] == names for role in TRAINED)


def test_training_one_role_leaves_the_others() -> None:
    roles = stirred()
    before = {role: output(roles, role) for role in ("teacher", *TRAINED)}
    assert not torch.equal(before["generator"], before["fake"])
    optimizer = torch.optim.SGD([p for _, p in roles.named_parameters("generator")], lr=0.1)
    with roles.role("generator", train=True):
        run(roles.transformer).square().mean().backward()
    assert all(p.grad is None for _, p in roles.named_parameters("fake"))
    assert all(p.grad is None and not p.requires_grad for p in roles.transformer.parameters())
    optimizer.step()
    assert not torch.equal(output(roles, "generator"), before["generator"])
    assert all(torch.equal(output(roles, role), before[role]) for role in ("teacher", "fake"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_other_roles_in_between(checkpointing: bool) -> None:
    """As of a plain copy of the model with the same weights."""
    roles = stirred()
    alone = build_transformer()
    replace_weights(alone, roles.state("generator"))
    run(alone).square().mean().backward()
    if checkpointing:
        roles.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    found = gradients(roles, "generator", nested=True)
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 100
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_on_a_bf16_base_the_weights_stay_float32() -> None:
    """Their gradient survives an evaluation without gradient in the same context, and is near that in float32."""
    roles, exact = stirred(torch.bfloat16), stirred()
    for role in TRAINED:
        exact.load(role, roles.state(role))
    found = gradients(roles, "fake", nested=True, dtype=torch.bfloat16)
    expected = gradients(exact, "fake", nested=True)
    assert found.keys() == expected.keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    total = torch.cat([(found[name] - expected[name]).flatten() for name in found]).norm()
    assert 0 < float(total / torch.cat([v.flatten() for v in expected.values()]).norm()) < 0.05
    with roles.role("fake", train=True):
        run(roles.transformer, torch.bfloat16)
        assert not torch.is_autocast_enabled("cpu")  # rewards are computed in here too
        with pytest.raises(TypeError):
            roles.transformer()
        assert not torch.is_autocast_enabled("cpu")
    base = build_transformer().to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(output(roles, "teacher", torch.bfloat16), run(base, torch.bfloat16))


def test_swapped_weights_come_back() -> None:
    roles = stirred()
    before, other = output(roles, "generator"), noisy(roles.state("generator"), 5)
    with roles.swapped("generator", other):
        inside = output(roles, "generator")
    alone = build_transformer()
    replace_weights(alone, other)
    assert torch.equal(inside, run(alone).detach()) and not torch.equal(inside, before)
    assert torch.equal(output(roles, "generator"), before)


def test_weights_that_do_not_fit() -> None:
    roles = stirred()
    good = roles.state("fake")
    name = min(good)
    for bad in (
        {k: v for k, v in good.items() if k != name},
        good | {"more": good[name]},
        good | {name: good[name][:1]},
    ):
        with pytest.raises(DataError):
            roles.load("fake", bad)
        with pytest.raises(DataError), roles.swapped("fake", bad):
            pass
        with pytest.raises(DataError):
            replace_weights(build_transformer(), bad)


def test_stage_2_starts_where_stage_1_ended() -> None:
    first = stirred()
    roles = FullRoles(build_transformer(), tuning=True)
    roles.begin_stage_2(first.state("generator"), first.state("fake"))
    assert roles.frozen == ("stage1_generator",)
    expected = {"teacher": "teacher", "start": "generator", "generator": "generator", "fake": "fake"}
    assert all(torch.equal(output(roles, role), output(first, old)) for role, old in expected.items())
    roles.load("generator", noisy(roles.state("generator"), 8))
    assert torch.equal(output(roles, "start"), output(first, "generator"))
