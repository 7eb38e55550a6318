"""Compiled blocks: the same numbers in every role, and no new graphs once all have been seen."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.compute.blocks import compile_blocks, lacks, repeated_blocks
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.full import FullRoles
from rtdmd_cli.errors import EnvironmentFailure
from tests.tiny_models import build_transformer

CPU = torch.device("cpu")


def inputs(batch: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=source),
        "timestep": torch.linspace(300, 800, batch),
        "encoder_hidden_states": torch.randn(batch, 20, 40, generator=source),
        "pooled_projections": torch.randn(batch, 20, generator=source),
    }


def turn(roles: Roles) -> list[Tensor]:
    """The kinds of call of an iteration: a rollout, and a turn with another role in between."""
    with torch.no_grad(), roles.role("generator"):
        found = [roles.transformer(**inputs(2)).sample]
    with roles.role("generator", train=True):
        loss = roles.transformer(**inputs(2)).sample.square().mean()
        with torch.no_grad(), roles.role("teacher"):
            found.append(roles.transformer(**inputs(2)).sample)
        loss.backward()
    found.append(loss.detach())
    found += [p.grad.clone() for _, p in roles.named_parameters("generator") if p.grad is not None]
    for _, parameter in roles.named_parameters("generator"):
        parameter.grad = None
    return found


def stirred() -> Roles:
    roles = Roles(build_transformer(), LoraConfig(rank=4, alpha=8), seed=0)
    source = torch.Generator().manual_seed(3)
    for role in ("generator", "fake"):
        state = roles.state(role)
        roles.load(role, {k: v + 0.1 * torch.randn(v.shape, generator=source) for k, v in state.items()})
    return roles


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_compiled_equals_eager_and_settles() -> None:
    """With torch.compile's tracer and joint graphs; inductor, the code generator behind them, is scripts/gpu_check's."""
    expected = turn(stirred())
    roles = stirred()
    torch._dynamo.reset()
    compile_blocks(roles.transformer, CPU, backend="aot_eager")
    before = graphs()
    first = turn(roles)
    seen = graphs()
    second = turn(roles)
    assert seen > before and graphs() == seen
    assert len(first) > 40  # two outputs, the loss, and the gradients of both matrices of every adapter
    for again in (first, second):
        for found, wanted in zip(again, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_two_batch_sizes_in_one_backward_pass_with_checkpointing() -> None:
    """As of consistency_batched: a block is computed again by the graph of the first time."""
    found = []
    for compiled in (False, True):
        roles = stirred()
        roles.transformer.enable_gradient_checkpointing()
        roles.transformer.train()
        if compiled:
            torch._dynamo.reset()
            compile_blocks(roles.transformer, CPU, backend="aot_eager")
        with roles.role("generator", train=True):
            loss = sum(roles.transformer(**inputs(size)).sample.square().mean() for size in (2, 4, 2))
            loss.backward()
        found.append([p.grad for _, p in roles.named_parameters("generator") if p.grad is not None])
    assert len(found[0]) > 20
    for eager, again in zip(*found, strict=True):
        torch.testing.assert_close(again, eager, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_compiled_blocks_compute_with_the_weights_in_place() -> None:
    """Of full-weight roles, which exchange them under the compiled blocks."""
    found = []
    for compiled in (False, True):
        roles = FullRoles(build_transformer())
        state = roles.state("generator")
        roles.load("generator", {name: 1.1 * tensor for name, tensor in state.items()})
        if compiled:
            torch._dynamo.reset()
            compile_blocks(roles.transformer, CPU, backend="eager")
        for role in ("teacher", "generator", "fake", "generator"):
            with torch.no_grad(), roles.role(role):
                found.append(roles.transformer(**inputs(2)).sample)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    for eager, other in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(other, eager)
    torch._dynamo.reset()


def test_the_blocks_of_a_transformer() -> None:
    transformer = build_transformer()
    assert repeated_blocks(transformer) == list(transformer.transformer_blocks)
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        repeated_blocks(nn.Linear(1, 1))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EnvironmentFailure, match="none of"):
        compile_blocks(build_transformer(), CPU)


def test_no_headers_for_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on Ubuntu without python3-dev; on a CPU they are not needed."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    cuda = torch.device("cuda")
    assert lacks(CPU) is None
    with pytest.raises(EnvironmentFailure, match=r"no .*Python\.h") as caught:
        compile_blocks(build_transformer(), cuda)
    assert "python3-dev" in caught.value.hint
    (tmp_path / "Python.h").touch()
    assert lacks(cuda) is None
