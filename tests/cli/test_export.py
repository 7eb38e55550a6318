"""`rtdmd export` as a person types it: every format, its round trip, what it says, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtdmd_cli.cli.app import main
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.export import roundtrip
from rtdmd_cli.engine.export.code import Stock
from rtdmd_cli.engine.export.generator import adapter_stacks
from rtdmd_cli.engine.sampling.model import Model, open_model
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.engine.storage import files
from rtdmd_cli.engine.storage.checkpoint import load_checkpoint
from rtdmd_cli.engine.storage.lora_files import read_header
from rtdmd_cli.engine.storage.run_folder import RunFolder
from tests.other_names import flux2_as_released
from tests.tiny_exports import FRESH_RANK, RANK, make_run, write_preset
from tests.tiny_flux import FAMILIES, build_flux2_pipeline, in_fp8, save, tiny_folder

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
ROUNDING = 1e-5  # mean difference of a pixel, 0..1, in float32
USER, TOKEN = "zebulon", "hf_abcdefghij0123456789"


@dataclass(frozen=True)
class Result:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class World:
    """A folder with runs/tuned, and its export of every format."""

    folder: Path
    exported: Result

    def run(self, *arguments: str) -> Result:
        """Type a command in the folder, as `USER` with a token."""
        os.environ |= {
            "HOME": str(self.folder / "home" / USER),
            "LOGNAME": USER,
            "HF_TOKEN": TOKEN,
            "RTDMD_CACHE": str(self.folder / "cache"),
        }
        out, err = io.StringIO(), io.StringIO()
        streams = (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err))
        with contextlib.chdir(self.folder), streams[0], streams[1]:
            code = main(list(arguments))
        return Result(code, out.getvalue(), err.getvalue())

    def make(self, run: str, tuned: bool = False, **preset: Any) -> RunFolder:
        """Another finished run; `preset` as `write_preset`."""
        with contextlib.chdir(self.folder):
            return make_run(write_preset(Path(f"{run}.yaml"), **preset), Path("runs"), run, tuned)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    base = folder / "home" / USER / "models" / "small"
    shutil.copytree(tiny_folder("sd3"), base)
    before = dict(os.environ)
    made = World(folder, Result(0, "", ""))
    made.make("tuned", tuned=True, base=str(base))
    exported = made.run("export", "--format", "all", "--json")
    yield World(folder, exported)
    os.environ.clear()
    os.environ.update(before)


def test_every_format_makes_the_runs_pictures(world: World) -> None:
    assert world.exported.code == 0, world.exported.err
    found = world.exported.json
    assert found["name"] == "tuned-step-000020"
    assert found["folder"] == "exports/tuned" and found["formats"] == ["diffusers", "comfyui", "merged"]
    assert found["rank"] == found["exact_rank"] == RANK + FRESH_RANK and found["fold_error"] == 0
    for name, trip in found["round_trip"].items():
        assert trip["mean_difference"] < ROUNDING and trip["pictures"] == 4, name
        assert f"round trip {name}: mean difference" in world.exported.err
    assert len(found["round_trip"]) == 3 and found["stock_schedule"] is True
    assert "two stacked adapters" in world.exported.err and found["trained_on"] == ["shapes-clip"]


def test_what_goes_on_is_said_before_it_begins(world: World) -> None:
    said = [line for line in world.exported.err.splitlines() if not line.startswith(" ")]
    steps = ("loading the model", "drawing 4 pictures", "writing the whole", "round trip merged: loading")
    places = [next(i for i, line in enumerate(said) if line.startswith(step)) for step in steps]
    assert places == sorted(places)


def test_fewer_pictures(world: World) -> None:
    result = world.run("export", "tuned", "--out", "exports/fewer", "--pictures", "1", "--json")
    assert result.code == 0 and "drawing 1 picture with" in result.err, result.err
    assert "over 1 picture\n" in result.err
    assert [trip["pictures"] for trip in result.json["round_trip"].values()] == [1]
    folder = world.folder / "exports"
    with Image.open(folder / "fewer/samples.png") as one, Image.open(folder / "tuned/samples.png") as four:
        assert one.width < four.width
    refused = world.run("export", "tuned", "--out", "exports/none", "--pictures", "0")
    assert refused.code == 2 and not (folder / "none").exists()


def test_a_card_that_is_too_small_leaves_the_drawing_to_the_cpu(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training keeps the base in 8 or 4 bits; an export takes the whole one."""
    real = roundtrip.open_stock

    def full(device: torch.device) -> None:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def opened(source: Source, device: torch.device, *rest: Any) -> Model:
        full(device)
        return open_model(source, device, *rest)

    def stock(wanted: Stock, device: torch.device, dtype: torch.dtype) -> Any:
        full(device)
        return real(wanted, device, dtype)

    monkeypatch.setattr("rtdmd_cli.engine.compute.device.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("rtdmd_cli.engine.export.own.open_model", opened)
    monkeypatch.setattr(roundtrip, "open_stock", stock)
    result = world.run(
        "export", "tuned", "--out", "exports/small", "--pictures", "1", "--dtype", "fp32", "--json"
    )
    assert result.code == 0, result.err
    assert result.err.count("the card's memory is full: on the CPU instead") == 2
    assert result.json["round_trip"]["diffusers"]["mean_difference"] < ROUNDING


def test_the_files_hold_both_stages(world: World) -> None:
    """Weights of the base plus both adapters, computed here, in the LoRA and in the merged transformer."""
    folder = world.folder / "exports/tuned"
    run = RunFolder(world.folder / "runs/tuned")
    preset = load_preset(str(run.preset), environ={}).preset
    stacks = adapter_stacks(preset, load_checkpoint(run.checkpoints / "step-000020"))
    base = load_file(tiny_folder("sd3") / "transformer/diffusion_pytorch_model.safetensors")
    merged = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    assert lora.keys() == load_file(folder / "comfyui/tuned-step-000020.safetensors").keys()
    assert_comfyui_knows(folder / "comfyui/tuned-step-000020.safetensors")
    assert len(lora) == 2 * len(stacks) > 0 and merged.keys() == base.keys()
    assert {len(parts) for parts in stacks.values()} == {2}
    for layer, (first, second) in stacks.items():
        assert (first.scale, second.scale) == (4 / RANK, 2 / FRESH_RANK)
        change = first.scale * first.b @ first.a + second.scale * second.b @ second.a
        a, b = (lora[f"transformer.{layer}.lora_{end}.weight"] for end in "AB")
        assert torch.allclose(b @ a, change, atol=1e-5)
        weight = f"{layer}.weight"
        assert torch.allclose(merged.pop(weight), base[weight] + change, atol=1e-5)
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged.items())


def test_nothing_private_is_in_it(world: World) -> None:
    private = [str(world.folder / "home"), USER, TOKEN, "secret/"]
    files = [path for path in (world.folder / "exports/tuned").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        found = [text for text in private if text.encode() in data]
        assert not found, (path, found)


def test_the_card(world: World) -> None:
    folder = world.folder / "exports/tuned"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "diffusers"
    assert card.data.license == "other" and "lora" in card.data.tags
    for words in (
        "small",
        "needs diffusers 0.42 or newer (`dtype=`)",
        "guidance_scale=1.0",
        "max_sequence_length=8",
        "sigmas=[1.0, 0.75, 0.5, 0.25]",
        "num_inference_steps=4",
        "eta 0.9",
        "Trained on: shapes-clip. Held out: shapes-clip-heldout.",
        "| shapes-clip-heldout | held out | 0.25 | 0.5 |",
        "arxiv.org/abs/2605.26108",
        "samples.png",
    ):
        assert words in card.text, words
    listed = world.exported.json["files"]
    for name in ("pytorch_lora_weights.safetensors", "comfyui/tuned-step-000020.safetensors"):
        assert f"`{listed[name]['sha256']}`" in card.text
    head = read_header(folder / "pytorch_lora_weights.safetensors")
    assert head["modelspec.architecture"] == "stable-diffusion-v3-medium/lora"
    assert head["modelspec.sai_model_spec"] and head["modelspec.title"] == "tuned-step-000020"
    with Image.open(folder / "samples.png") as image:
        assert image.width > 4 * 32


def blocks(folder: Path) -> dict[str, str]:
    """The Python of a card, by the heading above it, as it stands."""
    text = (folder / "README.md").read_text()
    parts = [part.partition("```python\n") for part in text.split("\n### ")[1:]]
    return {head.partition("\n")[0]: rest.partition("```")[0] for head, _, rest in parts if rest}


def run_blocks(world: World, export: str) -> list[str]:
    """Run every block for diffusers of a card in the world's folder, each of which makes a picture; their headings."""
    found = {
        name: code for name, code in blocks(world.folder / export).items() if name.startswith("diffusers")
    }
    for heading, code in found.items():
        with contextlib.chdir(world.folder):
            Path("picture.png").unlink(missing_ok=True)
            exec(code, {})
            with Image.open("picture.png") as image:
                assert image.size == (32, 32), heading
    return list(found)


def test_the_cards_code_runs(world: World) -> None:
    """The blocks for the LoRA, on a base in a folder of this machine, and for the whole pipeline, as they stand."""
    assert run_blocks(world, "exports/tuned") == ["diffusers, LoRA", "diffusers, whole pipeline"]
    base = 'base = os.path.expanduser("~/models/small")  # where small lies on the machine of this export'
    assert base in blocks(world.folder / "exports/tuned")["diffusers, LoRA"]


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_an_export_is_sampled_and_measured_like_its_run(world: World) -> None:
    lora = world.run("export", "tuned", "--out", "exports/lora", "--no-check", "--quiet")
    assert (lora.code, lora.out, lora.err) == (0, "exports/lora\n", "")
    assert "Not run" in (world.folder / "exports/lora/README.md").read_text()
    sources = {"run": "tuned", "merged": "exports/tuned", "lora": "exports/lora"}
    for name, source in sources.items():
        made = world.run("sample", "a red circle", "--from", source, "--out", f"by-{name}", "--json")
        assert made.code == 0, made.err
        assert made.json["evaluations"] == 4 and made.json["pictures"][0]["eta"] == 0.9
    first = "0000-0000-seed0.png"
    own = pixels(world.folder / "by-run" / first)
    for name in ("merged", "lora"):
        assert abs(own - pixels(world.folder / f"by-{name}" / first)).max() <= 1, name
    measured = world.run("eval", "shapes", "--from", "exports/tuned", "--limit", "6", "--json", "--quiet")
    assert measured.code == 0 and measured.json["model"] == "tuned (export)" and measured.json["steps"] == 4
    assert world.run("sample", "a", "--from", "exports/lora", "--guidance", "3").code == 2


def test_a_damaged_export_is_refused(world: World) -> None:
    shutil.copytree(world.folder / "exports/tuned", world.folder / "spoilt")
    manifest = world.folder / "spoilt/export.json"
    body = json.loads(manifest.read_text())
    lora = world.folder / "spoilt/pytorch_lora_weights.safetensors"
    lora.write_bytes(lora.read_bytes()[:-4] + b"oops")
    damaged = world.run("sample", "a", "--from", "spoilt")
    assert damaged.code == 4 and "sha256" in damaged.err
    for changed, expected in (({"version": 9}, "version 9"), ({"preset": {}}, "is damaged")):
        manifest.write_text(json.dumps(body | changed))
        result = world.run("sample", "a", "--from", "spoilt")
        assert result.code == 4 and expected in result.err
    manifest.write_text(json.dumps(body | {"lora": "../../secret.safetensors"}))
    assert world.run("sample", "a", "--from", "spoilt").code == 4


def test_a_target_is_replaced_only_when_asked_and_only_if_it_is_an_export(world: World) -> None:
    folder = world.folder / "exports/again"
    arguments = ("export", "tuned", "--out", "exports/again", "--format", "comfyui", "--no-check")
    assert world.run(*arguments).code == 0
    first = (folder / "export.json").read_bytes()
    refused = world.run(*arguments)
    assert refused.code == 2 and "--force" in refused.err
    replaced = world.run(*arguments[:-2], "diffusers", "--no-check", "--force")
    assert replaced.code == 0 and not (folder / "comfyui").exists()
    assert (folder / "export.json").read_bytes() != first
    mine = world.folder / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for target in ("mine", "runs/tuned", "runs", "runs/tuned/checkpoints/step-000020", "mine/thesis.txt"):
        result = world.run("export", "tuned", "--out", target, "--force")
        assert result.code == 2 and target in result.err, target
    base = world.folder / "home" / USER / "models/small"
    assert world.run("export", "tuned", "--out", str(base), "--force").code == 2
    assert (mine / "thesis.txt").read_text() == "years of work" and (base / "model_index.json").is_file()


def test_force_keeps_what_no_export_wrote(world: World) -> None:
    arguments = ("export", "tuned", "--out", "exports/kept", "--format", "comfyui", "--no-check", "--force")
    folder, beside = world.folder / "exports/kept", world.folder / "exports/kept.old"
    beside.mkdir(parents=True)
    (beside / "thesis.txt").write_text("years of work")

    def aside() -> list[Path]:
        return sorted(folder.parent.glob("kept.replaced-*"))

    def all_bytes() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert world.run(*arguments).code == 0
    first = all_bytes()
    assert world.run(*arguments).code == 0
    assert all_bytes() == first, "the same run gives the same bytes, the LoRA's header too"
    assert aside() == []
    changes = (
        lambda: (folder / "notes.txt").write_text("mine"),
        lambda: (folder / "README.md").write_text((folder / "README.md").read_text() + "mine"),
        lambda: (folder / "samples.png").unlink(),
    )
    for number, change in enumerate(changes):
        change()
        before = all_bytes()
        result = world.run(*arguments)
        kept = aside()
        assert result.code == 0 and len(kept) == number + 1 and "is kept as" in result.err
        found = [
            {p.relative_to(each): p.read_bytes() for p in each.rglob("*") if p.is_file()} for each in kept
        ]
        assert {path.relative_to(folder): data for path, data in before.items()} in found
    assert (beside / "thesis.txt").read_text() == "years of work"


def test_two_exports_into_one_folder(world: World) -> None:
    arguments = ("export", "tuned", "--out", "exports/twice", "--format", "comfyui", "--no-check")
    with files.building(world.folder / "exports/twice", fixed=True) as half:
        (half / "f").write_text("half")
        busy = world.run(*arguments)
        assert busy.code == 6 and "Another process is making" in busy.err
        assert (half / "f").read_text() == "half"
        files.remove_folder(half)
    assert world.run(*arguments).code == 0
    assert [path.name for path in (world.folder / "exports").glob("*twice*")] == ["twice"]


def test_what_a_kill_left_is_removed_and_a_failure_leaves_nothing(world: World) -> None:
    exports = world.folder / "kill"
    for name in (".tmp-01234567-killed", ".tmp-01234567-other"):
        (exports / name / "comfyui").mkdir(parents=True)
    result = world.run("export", "tuned", "--out", "kill/killed", "--no-check")
    assert result.code == 0
    assert sorted(path.name for path in exports.iterdir()) == [".tmp-01234567-other", "killed"]
    base = shutil.copytree(tiny_folder("sd3"), world.folder / "double")
    weights = base / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: t.double() for k, t in load_file(weights).items()}, weights, {"format": "pt"})
    world.make("double-run", base="double")
    failed = world.run("export", "double-run", "--format", "merged", "--out", "kill/failed")
    assert failed.code == 4 and "float64" in failed.err
    assert sorted(path.name for path in exports.iterdir()) == [".tmp-01234567-other", "killed"]


def test_a_lower_rank_states_its_error(world: World) -> None:
    result = world.run("export", "tuned", "--rank", "1", "--out", "exports/thin", "--json")
    assert result.code == 0, result.err
    found = result.json
    assert (found["rank"], found["exact_rank"]) == (1, RANK + FRESH_RANK) and 0.1 < found["fold_error"] < 1
    assert found["round_trip"]["diffusers"]["mean_difference"] > ROUNDING
    assert found["round_trip"]["diffusers"]["tolerance"] is None
    assert f"{found['fold_error']:.2%}" in (world.folder / "exports/thin/README.md").read_text()


def test_steps_that_the_stock_scheduler_does_not_know(world: World) -> None:
    world.make("uneven", more="sampler: {raw_steps: [1000, 900, 400, 300], eta: 0.5}\n")
    result = world.run("export", "uneven", "--format", "merged", "--json")
    assert result.code == 0, result.err
    assert result.json["stock_schedule"] is False and "sigmas=" in result.err
    assert result.json["round_trip"]["merged"]["mean_difference"] < ROUNDING
    card = (world.folder / "exports/uneven/README.md").read_text()
    assert card.count("sigmas=[1.0, 0.9, 0.4, 0.3]") == 1
    made = world.run("sample", "a", "--from", "exports/uneven", "--out", "uneven-pictures", "--json")
    assert made.json["steps"] == 4 and made.json["pictures"][0]["eta"] == 0.5


COMFYUI = {
    "transformer_blocks": {
        *(f"attn.to_{end}" for end in ("q", "k", "v", "out.0", "add_out")),
        *(f"attn.add_{end}_proj" for end in "qkv"),
        *(f"attn2.to_{end}" for end in ("q", "k", "v", "out.0")),
    },
    "single_transformer_blocks": {
        *(f"attn.to_{end}" for end in "qkv"),
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    },
    **{
        blocks: {f"attention.to_{end}" for end in ("q", "k", "v", "out.0")}
        for blocks in ("layers", "noise_refiner", "context_refiner")
    },
}
"""Layers of a block that ComfyUI's `mmdit_to_diffusers`, `flux_to_diffusers` and `z_image_to_diffusers` (comfy/utils.py)
know, after `transformer.`, the block's list and its number; the attention's alone. Qwen-Image's are mapped by their own names,
which are SD3's."""


def assert_comfyui_knows(path: Path) -> None:
    """Every key of a LoRA file is one that ComfyUI loads."""
    keys = load_file(path).keys()
    for key in keys:
        start, blocks, number, layer = key.split(".", 3)
        name, _, end = layer.rpartition(".lora_")
        assert start == "transformer" and number.isdigit() and end in ("A.weight", "B.weight"), key
        assert name in COMFYUI[blocks], key
    assert keys


@pytest.mark.parametrize("family", [*FAMILIES, "two-bases"])
def test_other_families(world: World, family: str) -> None:
    own = family == "two-bases"
    name, model = ("flux2", "") if own else (family, "")
    if own:
        klein = save(build_flux2_pipeline(seed=1, is_distilled=True), world.folder / "klein")
        model = f", generator_init: {klein}"
    world.make(family, tuned=family != "sd35", name=name, model=model)
    result = world.run("export", family, "--format", "all", "--json")
    assert result.code == 0, result.err
    for kind, trip in result.json["round_trip"].items():
        assert trip["mean_difference"] < ROUNDING, kind
    assert_comfyui_knows(world.folder / f"exports/{family}/comfyui/{family}-step-000020.safetensors")
    index = json.loads((world.folder / "exports" / family / "model_index.json").read_text())
    assert index.get("is_distilled", False) is (name == "flux2")
    assert run_blocks(world, f"exports/{family}") == ["diffusers, LoRA", "diffusers, whole pipeline"]
    renamed = blocks(world.folder / f"exports/{family}").get("ComfyUI, whole transformer", "")
    assert ("attention.qkv" in renamed) is (family == "zimage")
    shutil.rmtree(world.folder / "cache", ignore_errors=True)
    first = "0000-0000-seed0.png"
    for source, out in ((family, "own"), (f"exports/{family}", "merged")):
        made = world.run("sample", "a red circle", "--from", source, "--out", f"{out}-{family}")
        assert made.code == 0, made.err
    pictures = [pixels(world.folder / f"{out}-{family}" / first) for out in ("own", "merged")]
    assert abs(pictures[0] - pictures[1]).max() <= 1


SINGLE_FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "sd3": dict,
    "flux2": lambda tensors: under("model.diffusion_model.", flux2_as_released(tensors)),
    "qwenimage": lambda tensors: under("diffusion_model.", tensors),
}
"""Family -> another tool's names of its tensors; prefixes that diffusers itself does not strip."""


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("family", SINGLE_FILES)
def test_a_base_model_in_a_single_file(world: World, family: str) -> None:
    folder, file = tiny_folder(family), f"{family}-by-me.{'sft' if family == 'sd3' else 'safetensors'}"
    save_file(SINGLE_FILES[family](load_file(folder / TRANSFORMER)), world.folder / file)
    world.make(f"single-{family}", name=family, base=file, model=f", components: {folder}")
    result = world.run("export", f"single-{family}", "--format", "all", "--json")
    assert result.code == 0, result.err
    trips = result.json["round_trip"]
    assert len(trips) == 3 and all(trip["mean_difference"] < ROUNDING for trip in trips.values())
    export = f"exports/single-{family}"
    assert run_blocks(world, export) == ["diffusers, LoRA", "diffusers, whole pipeline"]
    code = blocks(world.folder / export)["diffusers, LoRA"]
    assert file in code and "from_single_file(" in code and "transformer=transformer" in code


@pytest.mark.parametrize(("family", "prefix"), [("sd3", ""), ("flux1", "model.diffusion_model.")])
def test_a_scaled_fp8_base_from_its_file_to_a_pipeline(world: World, family: str, prefix: str) -> None:
    """Trained, exported, proved: the merged weights are those in 8 bits times their scales, plus the adapter."""
    folder = tiny_folder(family)
    stored, meant = in_fp8(load_file(folder / TRANSFORMER), "scale_weight", rows=False)
    save_file(under(prefix, stored), world.folder / f"{family}-fp8.safetensors")
    with contextlib.chdir(world.folder):
        preset = write_preset(
            Path("fp8.yaml"), family, f"{family}-fp8.safetensors", f", components: {folder}"
        )
        preset.write_text(preset.read_text().replace("secret/train.txt", "two.txt"))
        Path("two.txt").write_text("a red ring\na blue cross\n")
    settings = [f"--set=distill.{each}" for each in ("iterations=2", "batch=2", "fake_per_generator=1")]
    settings += [f"--set=distill.{role}_lr=0.01" for role in ("fake", "generator")]
    settings += ["--set=distill.sample_every=0", f"--name={family}-fp8"]
    trained = world.run("distill", "--preset", "fp8.yaml", *settings)
    assert trained.code == 0, trained.err
    result = world.run("export", f"{family}-fp8", "--format", "all", "--json")
    assert result.code == 0, result.err
    trips = result.json["round_trip"]
    assert len(trips) == 3 and all(trip["mean_difference"] < ROUNDING for trip in trips.values())
    assert len(run_blocks(world, f"exports/{family}-fp8")) == 2
    run = RunFolder(world.folder / f"runs/{family}-fp8")
    stacks = adapter_stacks(
        load_preset(str(run.preset), environ={}).preset, load_checkpoint(run.checkpoints / "step-000002")
    )
    merged = load_file(world.folder / f"exports/{family}-fp8" / TRANSFORMER)
    assert merged.keys() == meant.keys()
    changed = {f"{layer}.weight": part.scale * part.b @ part.a for layer, (part,) in stacks.items()}
    assert max(float(change.abs().max()) for change in changed.values()) > 1e-4
    for name, tensor in meant.items():
        torch.testing.assert_close(merged[name], tensor + changed.get(name, 0), rtol=0, atol=1e-6)


def test_a_generator_trained_in_full_is_a_pipeline(world: World) -> None:
    with contextlib.chdir(world.folder):
        preset = write_preset(Path("full.yaml"))
        preset.write_text(preset.read_text().replace("distill: {", "distill: {train: full, "))
        make_run(preset, Path("runs"), "full")
    for adapter in (("--format", "diffusers"), ("--rank", "4")):
        refused = world.run("export", "full", *adapter)
        assert refused.code == 2 and "no adapter" in refused.err
    plain = world.run("export", "full", "--out", "exports/plain", "--no-check", "--json")
    assert plain.code == 0 and plain.json["formats"] == ["merged"]
    result = world.run("export", "full", "--format", "all", "--json")
    assert result.code == 0, result.err
    found = result.json
    assert found["formats"] == ["merged"] and found["lora"] is None and "trained in full" in result.err
    assert found["round_trip"]["merged"]["mean_difference"] < ROUNDING
    assert "every weight was trained" in (world.folder / "exports/full/README.md").read_text()


def test_a_quantised_base_is_exported_plain(world: World) -> None:
    world.make("eight", more="hardware: {base: int8}\n")
    result = world.run("export", "eight", "--json")
    assert result.code == 0, result.err
    assert (
        "in int8" in result.err
        and "int8; here it is plain" in (world.folder / "exports/eight/README.md").read_text()
    )
    assert result.json["round_trip"]["diffusers"]["mean_difference"] < ROUNDING


def test_in_half_the_bytes(world: World) -> None:
    result = world.run("export", "tuned", "--dtype", "bf16", "--out", "exports/half", "--json")
    assert result.code == 0, result.err
    trip = result.json["round_trip"]["diffusers"]
    assert trip["dtype"] == "bfloat16" and ROUNDING < trip["mean_difference"] < trip["tolerance"]


def test_the_built_in_model_and_the_code_for_a_lora(world: World) -> None:
    world.make("shapes", base="builtin:shapes")
    result = world.run("export", "shapes", "--json")
    assert result.code == 0, result.err
    assert result.json["round_trip"]["diffusers"]["mean_difference"] < ROUNDING
    text = (world.folder / "exports/shapes/README.md").read_text()
    assert "license: apache-2.0" in text
    assert run_blocks(world, "exports/shapes") == ["diffusers, LoRA"]
    code = blocks(world.folder / "exports/shapes")["diffusers, LoRA"]
    assert "load_lora_weights" in code and "builtin" not in code


def test_comfyui_gets_no_built_in_model(world: World) -> None:
    """It would report success and draw without the adapter."""
    world.make("small-world", base="builtin:shapes")
    refused = world.run("export", "small-world", "--format", "comfyui")
    assert refused.code == 2 and "8 latent channels" in refused.err
    result = world.run("export", "small-world", "--format", "all", "--no-check", "--json")
    assert result.code == 0, result.err
    assert result.json["formats"] == ["diffusers", "merged"] and "nothing is written for it" in result.err
    assert not any("comfyui" in name for name in result.json["files"])
    assert "ComfyUI knows no model like" in (world.folder / "exports/small-world/README.md").read_text()


def test_what_the_card_says_of_comfyui(world: World) -> None:
    """Every file of the workflows with its folder and source, the version, the length of the text, the seeds."""
    folder = world.folder / "exports/tuned"
    card = (folder / "README.md").read_text()
    for words in (
        "ComfyUI 0.7.0 or newer",
        "| `comfyui/tuned-step-000020.safetensors` | this LoRA | loras | this export |",
        "| `sd3_medium.safetensors` | base model and VAE | checkpoints | `small` as one file |",
        "| `t5xxl_fp16.safetensors` | text encoder | text_encoders | [stabilityai/stable-diffusion-3-medium]",
        "T5TokenizerOptions pads the prompt to 8 tokens",
        "(s + k * 1000000007) modulo 2^50",
        "rounds the samplers' eta to 0.01",
        "Copy `transformer/diffusion_pytorch_model.safetensors` into `ComfyUI/models/diffusion_models`",
    ):
        assert words in card, words
    assert "default" not in card.partition("### ComfyUI")[2].partition("## Sampling")[0]
    for kind in ("euler", "cps", "euler-api", "cps-api"):
        for name in ("tuned-step-000020", "tuned-step-000020-merged"):
            assert (folder / f"comfyui/{name}-{kind}.json").is_file()


def test_shards_are_joined_by_the_cards_code(world: World) -> None:
    """ComfyUI takes one file for a transformer, where large ones are saved as several."""
    base = shutil.copytree(tiny_folder("flux1"), world.folder / "sharded")
    weights = base / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names = {
        key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)
    }
    for name in set(names.values()):
        part = {key: tensor for key, tensor in tensors.items() if names[key] == name}
        save_file(part, weights.with_name(name), {"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    world.make("shards", name="flux1", base="sharded")
    result = world.run("export", "shards", "--format", "merged", "--no-check", "--json")
    assert result.code == 0, result.err
    folder = world.folder / "exports/shards"
    with contextlib.chdir(folder):
        exec(blocks(folder)["ComfyUI, whole transformer"], {})
        assert load_file("shards-step-000020.safetensors").keys() == tensors.keys()


def test_bad_input(world: World) -> None:
    usage = [
        (("export", "tuned", "--format", "difusers"), "`diffusers`"),
        (("export", "shapes-4step"), "preset"),
        (("export", "nothing"), "no run"),
        (("export", "exports/tuned"), "export already"),
        (("export", "tuned", "--public"), "--push-to-hub"),
        (("export", "tuned", "--push-to-hub", "a/b/c"), "repository"),
        (("export", "tuned", "--rank", "0"), "rank"),
    ]
    for arguments, expected in usage:
        result = world.run(*arguments, "--out", "exports/never")
        assert result.code == 2 and expected in result.err, (arguments, result.err)
    spoilt = world.make("spoilt-run")
    ema = world.folder / spoilt.checkpoints / "step-000020/ema.safetensors"
    ema.write_bytes(ema.read_bytes()[:-1])
    assert world.run("export", "spoilt-run", "--out", "exports/never").code == 4
    assert not (world.folder / "exports/never").exists()


def test_no_run_at_all(tmp_path: Path) -> None:
    result = World(tmp_path, Result(0, "", "")).run("export")
    assert result.code == 2 and "no finished run" in result.err


def test_an_unreachable_hub_is_known_before_anything_is_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of the hub is read when the library is imported, so the constant is set, not the variable."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = world.run("export", "tuned", "--push-to-hub", f"{USER}/mine", "--out", "exports/hub")
    assert result.code == 3, result.err
    assert not (world.folder / "exports/hub").exists() and TOKEN not in result.err
