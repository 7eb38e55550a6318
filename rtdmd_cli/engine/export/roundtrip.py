"""The proof that an export makes the run's pictures: reloaded in the stock pipeline, compared picture by picture.

No class of this program takes part in the reload: it runs the lines of Python that the card shows (`code`), with the
folders, prompts and number format of the moment. The other side is our own sampler on the run's generator with eta 0, which is
what the stock scheduler does: Euler. The two differ by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtdmd_cli.engine.compute.float32_products import emulates_bf16, multiply_in_float32
from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.export.code import Stock, call_lines, load_lines
from rtdmd_cli.engine.training.heartbeat import under_way
from rtdmd_cli.errors import NumericalError

SEED = 0  # of the first picture; the others count on
TOLERANCES = {torch.float32: 5e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Number format -> largest mean difference of a pixel, 0..1, that is put down to its rounding."""


@dataclass(frozen=True)
class RoundTrip:
    """Mean and largest difference of a pixel in 0..1, over `pictures` pictures. dtype: the coarsest format involved.

    exact: no rank was cut off, so that rounding alone may differ.
    """

    pictures: int
    mean: float
    largest: float
    dtype: torch.dtype
    exact: bool

    @property
    def tolerance(self) -> float:
        """Largest mean that passes where the export is exact."""
        return TOLERANCES[self.dtype]

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "pictures": self.pictures,
            "mean_difference": self.mean,
            "largest_difference": self.largest,
            "tolerance": self.tolerance if self.exact else None,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def initial_noise(shape: Sequence[int], count: int, dtype: torch.dtype) -> Tensor:
    """Noise [count, *shape], float32 on the CPU, as the stock pipeline draws it from the generators of `seeded`."""
    draws = [torch.randn(*shape, generator=generator, dtype=dtype) for generator in seeded(count)]
    return torch.stack(draws).float()


def seeded(count: int) -> list[torch.Generator]:
    """A generator for each picture."""
    return [torch.Generator("cpu").manual_seed(SEED + i) for i in range(count)]


def open_stock(stock: Stock, device: torch.device, dtype: torch.dtype) -> Any:
    """The stock pipeline, made by a card's lines; on a GPU its parts take turns there.

    Where a CPU multiplies bf16 by emulation, its layers multiply in float32: the VAE of Stable Diffusion 3 took over an hour.
    """
    names: dict[str, Any] = {}
    with quiet_loading():
        exec("\n".join(load_lines(stock, str(dtype))), names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
        if emulates_bf16(device, dtype):
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    multiply_in_float32(part)
    return pipe


@torch.no_grad()
def stock_pictures(pipe: Any, prompts: Sequence[str], call: Mapping[str, str]) -> Tensor:
    """The stock pipeline's pictures [n, 3, H, W] in 0..1 on the CPU, one a prompt, made by a card's lines.

    call: as `code.call_lines`.
    """
    made = []
    with quiet_loading():  # what it has to say of long prompts was said when our side encoded them
        for i, prompt in enumerate(prompts):
            under_way(f"picture {i + 1} of {len(prompts)} by the stock pipeline")
            names = {"pipe": pipe, "torch": torch}
            exec("\n".join(call_lines({**call, "output_type": '"pt"'}, prompt, SEED + i)), names)
            made.append(names["image"].float().cpu())
    return torch.stack(made)


def reloaded_pictures(
    stock: Stock, dtype: torch.dtype, prompts: Sequence[str], call: Mapping[str, str], device: torch.device
) -> Tensor:
    """As `stock_pictures`, of a pipeline that is loaded for it and let go again."""
    return stock_pictures(open_stock(stock, device, dtype), prompts, call)


def compare(own: Tensor, stock: Tensor, dtype: torch.dtype, exact: bool, name: str) -> RoundTrip:
    """The difference of two sets of pictures; NumericalError where it is more than rounding and should not be."""
    difference = (own - stock).abs()
    found = RoundTrip(len(own), float(difference.mean()), float(difference.max()), dtype, exact)
    if not difference.isfinite().all() or (exact and found.mean > found.tolerance):
        raise NumericalError(
            f"The {name} export doesn't make the run's pictures: mean difference {found.mean:.2g}, "
            f"allowed {found.tolerance:g}.",
            "Nothing was written; --no-check writes it all the same.",
        )
    return found
