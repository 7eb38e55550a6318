"""Checks that need the pretend device, for a process of their own; see `test_on_a_device`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rtdmd_cli.config.schema import DistillConfig, Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.compute import optim
from rtdmd_cli.engine.compute.quantise import swap_linears
from rtdmd_cli.engine.distill.recipe import iterate
from rtdmd_cli.engine.distill.run import build_trainer
from rtdmd_cli.engine.storage.checkpoint import load_checkpoint, save_checkpoint
from rtdmd_cli.engine.training.undo import Undo
from tests import pretend_device
from tests.engine.training.test_memory import everything
from tests.pretend_program import install
from tests.tiny_models import sd3_config


def tensors_of_two_devices_dont_mix(device: torch.device) -> None:
    here, there = torch.ones(2, 3), torch.ones(2, 3, device=device)
    for mix in (
        lambda: here + there,
        lambda: there @ here.t(),
        lambda: torch.cat([here, there]),
        lambda: here.add_(there.sum()),
        lambda: nn.functional.layer_norm(there, (3,), here[0]),
    ):
        try:
            mix()
        except RuntimeError as error:
            assert "same device" in str(error), error
        else:
            raise AssertionError("two devices were mixed")
    assert torch.equal((2 * there + torch.tensor(1.0)).cpu(), torch.full((2, 3), 3.0))


def a_late_copy_has_no_numbers_yet(device: torch.device) -> None:
    copy = torch.ones(3, device=device).to("cpu", non_blocking=True)
    assert copy.isnan().all()
    pretend_device.wait()
    assert torch.equal(copy, torch.ones(3))


def reads_are_noted(device: torch.device) -> None:
    x = torch.arange(4.0, device=device)
    before = len(pretend_device.LOG)
    _ = x.sum().item(), x[x > 1], x.cpu(), bool((x == 0).any()), x + 1, x[torch.tensor([0])]
    kinds = [each.kind for each in pretend_device.LOG[before:]]
    assert kinds == ["_local_scalar_dense", "nonzero", "index", "copy", "_local_scalar_dense"], kinds


def gradients_are_those_of_the_cpu(device: torch.device) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 5))
    x, found = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), []
    for place in (torch.device("cpu"), device):
        layers.to(place).zero_grad(set_to_none=True)
        layers(x.to(place)).square().mean().backward()
        found.append([parameter.grad.cpu().clone() for parameter in layers.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def attention_is_that_of_the_cpu(device: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    for mask in (None, seen, seen.float()):
        there = None if mask is None else mask.to(device)
        found = nn.functional.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), there)
        torch.testing.assert_close(found.cpu(), nn.functional.scaled_dot_product_attention(q, k, v, mask))


def adamw_goes_on_from_a_checkpoint(device: torch.device) -> None:
    """Its step counter too is on the device: there the fused kernel reads it."""

    def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()

    def build(weight: nn.Parameter) -> torch.optim.Optimizer:
        return optim.build_optimizer([("w", weight)], 0.1, (0.9, 0.999), 1e-8, 0.0)

    weight = nn.Parameter(torch.ones(3, device=device))
    first = build(weight)
    step(first, weight)
    tensors, state = optim.optimizer_tensors(first, ["w"])
    path = save_checkpoint(Path("saved"), 1, {"optimizer": tensors}, {"optimizer": state}, 1, {})
    saved = load_checkpoint(path)
    again = nn.Parameter(weight.detach().clone())
    second = build(again)
    optim.load_optimizer(second, ["w"], saved.tensors["optimizer"], saved.state["optimizer"])
    for optimizer, moved in ((first, weight), (second, again)):
        step(optimizer, moved)
    assert torch.equal(weight.cpu(), again.cpu())


def a_layer_on_a_device_is_put_into_8_bits(device: torch.device) -> None:
    layer, x = nn.Linear(64, 8), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected, parent = layer(x), nn.Sequential(layer.to(device))
    torch.__future__.set_swap_module_params_on_conversion(
        False
    )  # bitsandbytes' parameters know nothing of it
    swap_linears(parent, "int8", torch.device("cpu"))
    assert (parent(x) - expected).norm() / expected.norm() < 0.02


def what_is_undone_is_as_it_was(device: torch.device) -> None:
    """After an iteration that moved both roles, from copies that were not waited for."""
    backbone = load_backbone(sd3_config(), device, torch.float32)
    lora = LoraConfig(rank=2, alpha=4)
    distill = DistillConfig(batch=1, fake_per_generator=1, fake_lr=0.1, generator_lr=0.1, lora=lora)
    cond, empty = backbone.encode(["a ring"]), backbone.encode([""])
    preset = Preset(name="tiny", model=sd3_config(), distill=distill)
    trainer = build_trainer(backbone, preset, 1, cond.select, empty)
    iterate(trainer, 0)
    before, undo = everything(trainer), Undo(trainer)
    undo.begin()
    iterate(trainer, 1)
    moved = everything(trainer)
    undo.restore()
    after = everything(trainer)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not all(torch.equal(moved[key], before[key]) for key in before)


CHECKS = (
    tensors_of_two_devices_dont_mix,
    a_late_copy_has_no_numbers_yet,
    reads_are_noted,
    gradients_are_those_of_the_cpu,
    attention_is_that_of_the_cpu,
    adamw_goes_on_from_a_checkpoint,
    what_is_undone_is_as_it_was,
    a_layer_on_a_device_is_put_into_8_bits,  # the last, as it turns a switch of torch's
)


def main() -> int:
    """Run the checks, each of which raises an error where it does not hold."""
    device = install()
    for check in CHECKS:
        check(device)
        print(check.__name__)
    return 0
