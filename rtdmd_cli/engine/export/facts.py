"""What a card says of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.engine.export.code import Stock
from rtdmd_cli.engine.export.families import FAMILIES
from rtdmd_cli.engine.export.roundtrip import RoundTrip
from rtdmd_cli.engine.families.facts import Licence, Loader


@dataclass(frozen=True)
class Facts:
    """What a card says. where: what the code loads, a folder's or a repository's name.

    name: of the files, run and step. stored: how the base was stored in training ("plain", "int8", "nf4").
    base: hub id, built-in name or the name of a local folder or file. on_hub: base is a hub id. formats: of FORMATS.
    stock: the base model in the stock pipeline, as a card loads it.
    before, after: mean rewards that the run measured before stage 2 and of this generator; empty where it did not.
    files: path in the folder -> (bytes, sha256). trips: format -> its round trip, empty where none was run.
    """

    name: str
    where: str
    formats: Sequence[str]
    preset: Preset
    base: str
    on_hub: bool
    stock: Stock
    stored: str
    base_hash: str
    licence: Licence
    loader: Loader
    tuned: bool
    iterations: int
    preset_sha256: str
    model_hash: str
    off: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    sigmas: Sequence[float]
    rank: int
    exact_rank: int
    fold_error: float
    stock_schedule: bool
    prompts: Sequence[str]
    trips: Mapping[str, RoundTrip] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Network evaluations of a picture."""
        return len(self.sigmas) - 1

    @property
    def raw(self) -> list[float]:
        """Unshifted levels, what `sigmas=` of the stock pipelines takes."""
        return [step / 1000 for step in self.preset.sampler.raw_steps]

    def call(self, merged: bool) -> dict[str, str]:
        """The arguments of a stock pipeline's call, as Python. merged: of the whole pipeline, not of base and LoRA."""
        model = self.preset.model
        levels = {} if merged and self.stock_schedule else {"sigmas": str(self.raw)}
        return {
            "num_inference_steps": str(self.steps),  # FLUX.2's shift depends on it, with sigmas= as well
            **levels,
            **FAMILIES[model.family].unguided,
            "max_sequence_length": str(model.text_length),
            "height": str(model.resolution),
            "width": str(model.resolution),
        }
