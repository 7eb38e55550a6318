"""Text encoders as shapes: by the published configs, and by those that transformers writes itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.backbones.families import FAMILIES
from rtdmd_cli.engine.planning import configs
from rtdmd_cli.engine.planning.encoding import encoder_cost

MODELS = json.loads(Path(configs.__file__).with_name("models.json").read_text("utf-8"))["models"]
PRESETS = ("sd3", "sd35", "flux1", "flux2-klein-4b", "flux2-klein-9b", "zimage", "qwenimage")


def encoders() -> Iterator[tuple[str, str, Any]]:
    """Model, name and class of each text encoder of the plain presets."""
    for name in PRESETS:
        model = load_preset(f"{name}-4step", [], {}).preset.model
        layout = FAMILIES[model.family].module().LAYOUT
        yield from ((model.path, each, layout.networks[each]) for each in layout.encoders)


@pytest.mark.parametrize(("source", "name", "kind"), list(encoders()))
def test_a_config_that_transformers_has_written_costs_the_same(
    source: str, name: str, kind: Any, tmp_path: Path
) -> None:
    """Such a one says what every layer is, in a list as long as there are layers."""
    published = MODELS[source][name]
    kind.config_class(**published).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text("utf-8")
    costs = [
        encoder_cost(kind, text, 8, 1, False, torch.bfloat16) for text in (json.dumps(published), written)
    ]
    assert costs[0] == costs[1] and costs[0]["loaded"] > 2**27
