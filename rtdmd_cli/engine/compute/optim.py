"""Optimisers and the parts around a step: learning rate, gradient check and clipping, EMA, saved states."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from torch import Tensor
from torch.nn import Parameter

from rtdmd_cli.errors import DataError, EnvironmentFailure, NumericalError

Choice: TypeAlias = Literal["adamw", "adamw8bit", "paged_adamw8bit"]

_DIVERGED_HINT = (
    "The last checkpoint is untouched: go on from it at lower learning rates, in a run of its own: "
    "--resume RUN --name OTHER --set distill.generator_lr=RATE (or tune_reward.generator_lr=RATE)."
)
_STATE_HINT = (
    "The checkpoint belongs to another model, adapter or optimiser: use its own preset, or start anew."
)
# Per-element states of AdamW (torch) and AdamW8bit (bitsandbytes); others have shapes of their own.
_ELEMENTWISE = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state1", "state2"})
_FUSED = ("cpu", "cuda")  # devices on which torch's AdamW moves all weights in one call
_SCALARS = (bool, int, float, str, type(None))


def build_optimizer(
    params: Sequence[tuple[str, Parameter]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    choice: Choice = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over named parameters in one group, in this order. Raises ValueError if there are none.

    choice: float32 states (torch's), or 8-bit ones by bitsandbytes, which leaves tensors of fewer than 4,096 elements
    in float32; "paged" lets the 8-bit states move to the host's memory where the GPU's is full. EnvironmentFailure
    for a device that can't: bitsandbytes would fall back to another optimiser than the preset names.
    """
    parameters = [parameter for _, parameter in params]
    _require_device(choice, parameters)
    fused = all(parameter.device.type in _FUSED for parameter in parameters)
    optimizers: dict[Choice, Callable[..., torch.optim.Optimizer]] = {
        # On the CPU in a sixth of the time; on CUDA without a copy of a state for every parameter at once.
        "adamw": partial(torch.optim.AdamW, fused=fused or None),
        "adamw8bit": AdamW8bit,
        "paged_adamw8bit": PagedAdamW8bit,
    }
    return optimizers[choice](parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _require_device(choice: Choice, parameters: Sequence[Parameter]) -> None:
    tried: dict[Choice, tuple[str, ...]] = {"adamw8bit": ("cpu", "cuda"), "paged_adamw8bit": ("cuda",)}
    wanted = tried.get(choice, ())
    for device in {parameter.device.type for parameter in parameters if wanted} - set(wanted):
        other = "adamw8bit, which computes the same" if device == "cpu" else "adamw"
        raise EnvironmentFailure(
            f"The optimiser {choice} runs on {' and '.join(wanted)} alone, and this run is on {device}.",
            f"Set hardware.optimizer to {other}.",
        )


def learning_rate_at(step: int, lr: float, warmup: int, total: int | None = None) -> float:
    """The rate of optimiser step `step` (0-based): lr, times (step + 1) / warmup during the warm-up.

    total: the number of steps over which the rate falls to 0 along a half cosine, lr (1 + cos(pi step/total))/2;
    None for a constant rate.
    """
    warm = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0))) if total else 1.0
    return lr * warm * fall


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_finite(name: str, tensor: Tensor, iteration: int) -> None:
    """Raise NumericalError, naming `name` and the iteration, if any element is nan or infinite."""
    if bool(torch.isfinite(tensor).all()):
        return
    kind = "nan" if bool(torch.isnan(tensor).any()) else "infinite"
    text = f"is {kind}" if tensor.numel() == 1 else f"holds {kind} values"
    raise NumericalError(f"{name} {text} at iteration {iteration}.", _DIVERGED_HINT)


def gradient_norm(params: Sequence[tuple[str, Parameter]]) -> Tensor:
    """The total 2-norm of the gradients, on their device; parameters without one are passed over.

    Raises ValueError if no parameter has a gradient.
    """
    gradients = [parameter.grad for _, parameter in params if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter has a gradient: was backward called with the role active?")
    return torch.nn.utils.get_total_norm(gradients)


def require_finite_norm(norm: float, params: Sequence[tuple[str, Parameter]], iteration: int) -> None:
    """NumericalError naming the first non-finite gradient and the iteration, unless their `norm` is finite."""
    if math.isfinite(norm):
        return
    for name, parameter in params:
        if parameter.grad is not None:
            check_finite(f"The gradient of {name}", parameter.grad, iteration)
    raise NumericalError(
        f"The norm of all gradients exceeds float32 at iteration {iteration}.", _DIVERGED_HINT
    )


def clip(params: Sequence[tuple[str, Parameter]], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients, whose total 2-norm is `norm`, so that it is at most `max_norm`; without waiting for the device.

    As torch.nn.utils.clip_grad_norm_: scale min(1, max_norm / (norm + 1e-6)).
    """
    torch.nn.utils.clip_grads_with_norm_([parameter for _, parameter in params], max_norm, norm)


def ema_start(params: Sequence[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A copy of the weights, on their device; dtype: its number format, None for their own."""
    return {name: tensor.detach().to(dtype or tensor.dtype, copy=True) for name, tensor in params}


def ema_update(ema: Mapping[str, Tensor], params: Sequence[tuple[str, Tensor]], decay: float) -> None:
    """ema = decay ema + (1 - decay) weight, in place, once per optimiser step; a bf16 average is rounded once.

    Raises ValueError if the names differ, or the average is neither float32 nor of the weights' own format.
    """
    weights = dict(params)
    if ema.keys() != weights.keys():
        raise ValueError(f"average and weights differ in {sorted(ema.keys() ^ weights.keys())}")
    for name, average in ema.items():
        weight = weights[name]
        if average.dtype not in (torch.float32, weight.dtype):
            raise ValueError(f"the average of {name} must be float32 or {weight.dtype}, got {average.dtype}")
        if average.dtype != torch.float32:
            average.copy_(average.float().mul_(decay).add_(weight.detach().float(), alpha=1.0 - decay))
    exact = [name for name, average in ema.items() if average.dtype == torch.float32]
    averages = [ema[name] for name in exact]
    if averages:
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, [weights[name].detach().float() for name in exact], alpha=1.0 - decay)


def ema_decay_at(n: int, decay: float, warmup: bool) -> float:
    """The decay of update `n` (0-based): min((1 + n) / (10 + n), decay) with warm-up, else `decay`."""
    return min((1 + n) / (10 + n), decay) if warmup else decay


def _parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Parameter]:
    """The optimiser's parameters by name, in the order of its groups. ValueError if the number differs."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(parameters) != len(names) or len(set(names)) != len(names):
        raise ValueError(f"{len(parameters)} parameters need as many different names, got {list(names)}")
    return dict(zip(names, parameters, strict=True))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as ({"<name>/<key>": tensor}, JSON), for any optimiser with per-parameter state.

    names: of the parameters in the optimiser's order. The JSON holds the optimiser's class, and for each
    parameter the keys of its tensors and its scalars. Learning rate, betas and so on come from the preset,
    not from here. The tensors are the optimiser's own, not copies. Raises TypeError for a state that is
    neither tensor nor scalar.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, parameter in _parameters(optimizer, names).items():
        values = optimizer.state.get(parameter, {})
        scalars = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for key, value in scalars.items():
            if not isinstance(value, _SCALARS):
                raise TypeError(f"the state {key} of {name} has type {type(value).__name__}")
        held = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        tensors |= {f"{name}/{key}": value for key, value in held.items()}
        entries[name] = {"tensors": sorted(held), "scalars": scalars}
    return tensors, {"optimizer": type(optimizer).__name__, "params": entries}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put a state of `optimizer_tensors` into a fresh optimiser, bit for bit.

    Tensors are copied to their parameter's device; torch's step counter is on the CPU unless all weights are moved in one
    call, and a paged optimiser's large states go back into pages. Raises DataError, before anything is changed, for
    another optimiser, a missing or unexpected name, or a wrong shape.
    """
    parameters = _parameters(optimizer, names)
    if state["optimizer"] != type(optimizer).__name__:
        raise DataError(
            f"The saved optimiser is {state['optimizer']}, this one is {type(optimizer).__name__}.",
            _STATE_HINT,
        )
    entries: Mapping[str, Any] = state["params"]
    _require_same("parameters", set(entries), set(names))
    expected = {f"{name}/{key}" for name, entry in entries.items() for key in entry["tensors"]}
    _require_same("tensors", set(tensors), expected)
    for name, entry in entries.items():
        shape = parameters[name].shape
        for key in _ELEMENTWISE.intersection(entry["tensors"]):
            found = tensors[f"{name}/{key}"].shape
            if found != shape:
                raise DataError(
                    f"The saved optimiser state {name}/{key} has shape {list(found)}, not {list(shape)}.",
                    _STATE_HINT,
                )
    for name, parameter in parameters.items():
        optimizer.state.pop(parameter, None)
        held = {
            key: _placed(optimizer, key, tensors[f"{name}/{key}"], parameter)
            for key in entries[name]["tensors"]
        }
        if held or entries[name]["scalars"]:
            optimizer.state[parameter] = {**entries[name]["scalars"], **held}


def _placed(optimizer: torch.optim.Optimizer, key: str, tensor: Tensor, parameter: Parameter) -> Tensor:
    if isinstance(optimizer, PagedAdamW8bit) and key in ("state1", "state2"):
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)
        return buffer.copy_(tensor)
    counts_on_host = key == "step" and not optimizer.defaults["fused"]
    return tensor.to("cpu" if counts_on_host else parameter.device, copy=True)


def _require_same(what: str, found: set[str], expected: set[str]) -> None:
    for kind, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"The saved optimiser state {kind} {what}: {min(names)}{more}.", _STATE_HINT)
