"""Where the weights come from: folders, single files, a second base, the hub; for every family."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from rtdmd_cli.config.schema import Preset
from rtdmd_cli.config.section import LoraConfig
from rtdmd_cli.engine.backbones import flux2, layout, loading, locating
from rtdmd_cli.engine.backbones.base import Conditioning
from rtdmd_cli.engine.backbones.families import FAMILIES, locate_model
from rtdmd_cli.engine.backbones.sizes import _most
from rtdmd_cli.engine.backbones.two_bases import TwoBases
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.roles.base import FAKE, GENERATOR, START, TEACHER
from rtdmd_cli.engine.sampling.model import open_model
from rtdmd_cli.engine.sampling.source import Source
from rtdmd_cli.errors import DataError, EnvironmentFailure, UsageError
from tests.other_names import flux2_as_released, zimage_in_comfyui
from tests.tiny_flux import FAMILIES as SMALL
from tests.tiny_flux import TINY, build_flux2_pipeline, load_tiny, save, tiny_config, tiny_folder
from tests.tiny_hub import offline_hub, publish
from tests.tiny_models import PROMPTS

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
KLEIN = ("to_q", "to_out.0", "to_qkv_mlp_proj", "to_out")
HALF = torch.full((2,), 0.5)


def layout_of(name: str) -> layout.Layout:
    return FAMILIES[TINY[name].family].module().LAYOUT


def inputs(name: str) -> torch.Tensor:
    return torch.randn(2, *TINY[name].shape, generator=torch.Generator().manual_seed(3))


def velocity(name: str, cond: Conditioning | None = None, **changes: Any) -> torch.Tensor:
    """Of the model alone; `cond` instead of what its own text encoders make."""
    backbone = load_tiny(name, **changes)
    with torch.no_grad():
        return backbone.velocity(inputs(name), HALF, cond or backbone.encode(PROMPTS[:2]))


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another FLUX.2, whose transformer is to be the generator's base."""
    return save(build_flux2_pipeline(seed=1, is_distilled=True), tmp_path_factory.mktemp("klein"))


# --- a single file


@pytest.mark.parametrize("name", SMALL)
def test_a_single_file_takes_the_transformers_place(tmp_path: Path, name: str) -> None:
    weights = load_file(tiny_folder(name) / WEIGHTS)
    file = tmp_path / "tuned.safetensors"
    save_file({key: 1.5 * tensor for key, tensor in weights.items()}, file)
    tuned = Path(shutil.copytree(tiny_folder(name), tmp_path / "tuned"))
    shutil.copy(file, tuned / WEIGHTS)
    own = load_tiny(name, path=file, components=str(tiny_folder(name)))
    with torch.no_grad():
        v = own.velocity(inputs(name), HALF, own.encode(PROMPTS[:2]))
    assert torch.equal(v, velocity(name, path=tuned))
    assert not torch.allclose(v, velocity(name))
    plain = load_tiny(name)
    assert own.model_id.hash != plain.model_id.hash and own.model_id.path == str(file)
    again = load_tiny(name, path=file, components=str(tuned))
    assert own.model_id.hash == again.model_id.hash  # the folder's own transformer doesn't count
    save_file(weights, file)
    assert load_tiny(name, path=file, components=str(tuned)).model_id.hash != own.model_id.hash


def test_a_single_file_with_the_original_release_s_keys(tmp_path: Path) -> None:
    file = tmp_path / "original.safetensors"
    save_file(flux2_as_released(load_file(tiny_folder("flux2") / WEIGHTS)), file)
    found = velocity("flux2", path=file, components=str(tiny_folder("flux2")))
    torch.testing.assert_close(found, velocity("flux2"), atol=1e-6, rtol=0)


def test_a_single_file_whose_names_are_alike_in_part(tmp_path: Path) -> None:
    theirs = zimage_in_comfyui(load_file(tiny_folder("zimage") / WEIGHTS))
    file = tmp_path / "comfyui.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in theirs.items()}, file)
    found = velocity("zimage", path=file, components=str(tiny_folder("zimage")))
    assert torch.equal(found, velocity("zimage"))


def test_a_single_file_that_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    parts = {"path": file, "components": str(tiny_folder("flux2"))}
    with pytest.raises(DataError, match="no model file"):
        load_tiny("flux2", **parts)
    weights = load_file(tiny_folder("flux2") / WEIGHTS)
    save_file({key: weights[key] for key in sorted(weights)[1:]}, file)
    shutil.copy(tiny_folder("flux1") / WEIGHTS, tmp_path / "foreign.safetensors")
    (tmp_path / "garbled.safetensors").write_bytes(b"{}")
    for name, message in (("tuned", "is missing"), ("foreign", "is not used"), ("garbled", "can't be read")):
        with pytest.raises(DataError, match=f"{name}.safetensors.*{message}") as caught:
            load_tiny("flux2", **(parts | {"path": tmp_path / f"{name}.safetensors"}))
        assert caught.value.hint
    with pytest.raises(UsageError, match="nothing says where the rest") as missing:
        load_tiny("flux2", path=file)
    assert "--set model.components=" in missing.value.hint


# --- a base of the generator's own


def test_the_generator_computes_on_its_own_base(klein: Path) -> None:
    backbone = load_tiny("flux2", generator_init=str(klein))
    assert isinstance(backbone.transformer, TwoBases)
    cond, x = backbone.encode(PROMPTS[:2]), inputs("flux2")
    teacher, distilled = velocity("flux2"), velocity("flux2", cond, path=klein, guidance=1.0)
    lora = LoraConfig(rank=2, alpha=4, targets=KLEIN)
    roles = Roles(backbone.transformer, lora, 0, fresh=lora)
    with torch.no_grad():
        assert torch.equal(backbone.velocity(x, HALF, cond), teacher)
        for role, expected in (
            (TEACHER, teacher),
            (FAKE, teacher),
            (GENERATOR, distilled),
            (START, distilled),
        ):
            with roles.role(role):
                torch.testing.assert_close(backbone.velocity(x, HALF, cond), expected)
                with roles.role(TEACHER):
                    assert torch.equal(backbone.velocity(x, HALF, cond), teacher)
                torch.testing.assert_close(backbone.velocity(x, HALF, cond), expected)
        assert torch.equal(backbone.velocity(x, HALF, cond), teacher)
    bases = {name: {id(p) for p in backbone.transformer.base(name).parameters()} for name in BASES}
    for adapter, base in ((GENERATOR, "generator"), (FAKE, "teacher")):
        parameters = roles.named_parameters(adapter)
        assert parameters and all(id(parameter) in bases[base] for _, parameter in parameters)
        assert {name.partition(".")[0] for name, _ in parameters} == BLOCKS


BASES = ("teacher", "generator")
BLOCKS = {"transformer_blocks", "single_transformer_blocks"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_two_bases(klein: Path, checkpointing: bool) -> None:
    """Those of the generator and of the fake score, whatever is called between forward and backward."""
    backbone = load_tiny("flux2", generator_init=str(klein))
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    cond, x = backbone.encode(PROMPTS[:2]), inputs("flux2")
    roles = Roles(backbone.transformer, LoraConfig(rank=2, alpha=4, targets=KLEIN), 0)
    for seed, role in enumerate((GENERATOR, FAKE)):
        source = torch.Generator().manual_seed(seed)
        state = roles.state(role)
        roles.load(role, {k: 0.2 * torch.randn(t.shape, generator=source) for k, t in state.items()})

    def gradients(role: str, between: bool) -> list[torch.Tensor]:
        parameters = [parameter for _, parameter in roles.named_parameters(role)]
        with roles.role(role, train=True):
            loss = backbone.velocity(x, HALF, cond).square().mean()
            for other in (TEACHER, GENERATOR, FAKE) if between else ():
                with torch.no_grad(), roles.role(other):
                    backbone.velocity(x, HALF, cond)
            return list(torch.autograd.grad(loss, parameters))

    for role in (GENERATOR, FAKE):
        alone, nested = gradients(role, False), gradients(role, True)
        assert all(torch.equal(a, b) for a, b in zip(alone, nested, strict=True))
        assert all(gradient.abs().max() > 0 for gradient in alone)


def test_who_a_model_with_two_bases_is(klein: Path, tmp_path: Path) -> None:
    shared, two = load_tiny("flux2"), load_tiny("flux2", generator_init=str(klein))
    assert shared.model_id.hash == layout.folder_hash(flux2.LAYOUT, tiny_folder("flux2"))
    assert two.model_id.hash != shared.model_id.hash
    assert two.encoder_key == shared.encoder_key  # the text encoder is the same
    other = Path(shutil.copytree(klein, tmp_path / "other"))
    (other / "model_index.json").unlink()  # the transformer alone is looked at
    assert load_tiny("flux2", generator_init=str(other)).model_id.hash == two.model_id.hash


def test_a_sampled_teacher_needs_no_second_base(klein: Path) -> None:
    models = [
        tiny_config("flux2", generator_init=start) for start in (str(klein), "/not/looked/at", "teacher")
    ]
    presets = [Preset(name="tiny", model=model) for model in models]
    opened = [open_model(Source("teacher", preset, None, "tiny"), CPU, torch.float32) for preset in presets]
    assert not any(isinstance(model.backbone.transformer, TwoBases) for model in opened)
    assert len({model.model_hash for model in opened}) == 1


def test_a_second_base_that_does_not_fit(klein: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model folder") as caught:
        load_tiny("flux2", generator_init="/no/such/folder")
    assert "model.generator_init" in caught.value.hint
    with pytest.raises(DataError, match=r"lacks transformer/config\.json"):
        load_tiny("flux2", generator_init=str(tmp_path))
    wide = save(build_flux2_pipeline(), tmp_path / "wide")
    pipe: Any = build_flux2_pipeline()
    transformer = type(pipe.transformer).from_config({**pipe.transformer.config, "joint_attention_dim": 24})
    transformer.save_pretrained(wide / "transformer")
    with pytest.raises(DataError, match="joint_attention_dim is 24, not 48"):
        load_tiny("flux2", generator_init=str(wide))


def test_a_few_step_model_is_no_guided_teacher(klein: Path) -> None:
    with pytest.raises(UsageError, match="takes no guidance") as caught:
        load_tiny("flux2", path=klein)
    assert "klein-base" in caught.value.hint


# --- folders


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("flux1", "tokenizer_2", "lacks tokenizer_2/"),
        ("flux1", WEIGHTS, "can't be loaded"),
        ("flux2", "text_encoder", r"lacks text_encoder/config\.json"),
        ("flux2", "model_index.json", "model_index.json is missing"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, name: str, part: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny_folder(name), tmp_path / "model"))
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(DataError, match=message) as caught:
        load_tiny(name, path=folder)
    assert layout_of(name).pipeline.__name__ in caught.value.hint


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "num_layers", 10**9),
        ("transformer", "attention_head_dim", 10**6),
        ("text_encoder", "hidden_size", 10**6),
        ("text_encoder_2", "d_ff", 10**9),
        ("vae", "block_out_channels", [16, 10**7]),
    ],
)
def test_sizes_that_no_weight_has_are_refused_before_anything_is_built(
    tmp_path: Path, part: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder("flux1"), tmp_path / "model"))
    config = folder / part / "config.json"
    known = json.loads(config.read_text())
    assert key in known
    config.write_text(json.dumps(known | {key: value}))
    monkeypatch.setattr(loading, "empty_transformer", None)
    with pytest.raises(DataError, match=rf"{part}.config\.json doesn't go with the weights .*: {key} is 1"):
        load_tiny("flux1", path=folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes somebody else")
def test_a_file_that_may_not_be_read_is_no_damage() -> None:
    """As `save_pretrained` writes weights, for its user alone. Another user can't enter pytest's own folders."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(shutil.copytree(tiny_folder("flux1"), Path(made, "model")))
        (folder / WEIGHTS).chmod(0o600)
        for path in (folder, Path(made)):
            path.chmod(0o755)
        os.seteuid(54321)
        try:
            with pytest.raises(EnvironmentFailure, match=r"Cannot read .*safetensors: permission denied"):
                load_tiny("flux1", path=folder)
        finally:
            os.seteuid(0)


def test_a_table_that_no_weight_holds() -> None:
    assert _most("pos_embed_max_size", 1, 192 * 192) == 192 and _most("theta", 1, 1) is None


def test_a_folder_of_another_family() -> None:
    with pytest.raises(DataError, match="holds a Flux2KleinPipeline, not a FluxPipeline"):
        load_tiny("flux1", path=tiny_folder("flux2"))


# --- the hub


def refusal(kind: type[Exception]) -> Callable[..., Any]:
    """As diffusers raises it: an OSError caused by the hub's error."""

    def download(*_: object, **__: object) -> Any:
        cause = kind.__new__(kind)
        cause.args = ("the hub says no",)
        raise OSError("Cannot load model") from cause

    return download


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (GatedRepoError, "hf auth login"),
        (RepositoryNotFoundError, "hf auth login"),
        (LocalEntryNotFoundError, "to a folder that holds"),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_hub_failures(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception], hint: str, tmp_path: Path
) -> None:
    """For the model, for what goes with a single file, and for the generator's base."""
    monkeypatch.setattr(layout_of(name).pipeline, "download", refusal(kind))
    monkeypatch.setattr(locating, "snapshot_download", refusal(kind))
    file = tmp_path / "tuned.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    for changes, key in (
        ({"path": "someone/model"}, "model.path"),
        ({"path": file, "components": "someone/model"}, "model.components"),
        ({"generator_init": "someone/model"}, "model.generator_init"),
    ):
        with pytest.raises(EnvironmentFailure, match="someone/model") as caught:
            load_tiny(name, **changes)
        assert hint in caught.value.hint and (kind is GatedRepoError or key in caught.value.hint)


@pytest.mark.parametrize("name", SMALL)
def test_offline_without_a_cached_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """The real chain of diffusers and the hub's client, with no network."""
    offline_hub(tmp_path, monkeypatch)
    for changes in ({"path": "someone/model"}, {"generator_init": "someone/model"}):
        with pytest.raises(EnvironmentFailure, match="not in the local cache"):
            load_tiny(name, **changes)


def test_a_cached_second_base_is_known_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, klein: Path
) -> None:
    root = offline_hub(tmp_path, monkeypatch)
    publish(root, "someone/klein", klein / "model_index.json")
    snapshot = next((root / "models--someone--klein/snapshots").iterdir())
    shutil.copytree(klein / "transformer", snapshot / "transformer")
    sources = locate_model(tiny_config("flux2", generator_init="someone/klein"))
    assert sources == layout.Sources(tiny_folder("flux2"), None, snapshot)
    assert layout.transformer_hash(snapshot) == snapshot.name == "a" * 40


def test_what_is_downloaded_with_a_single_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything but the transformer's weights."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(path: str, **arguments: Any) -> str:
        asked.append((path, arguments))
        return str(tiny_folder("flux1"))

    monkeypatch.setattr(diffusers.FluxPipeline, "download", download)
    monkeypatch.setattr(locating, "hf_hub_download", lambda path, file, **_: asked.append((file, {})))
    file = tmp_path / "tuned.safetensors"
    shutil.copy(tiny_folder("flux1") / WEIGHTS, file)
    load_tiny("flux1", path=file, components="someone/model", revision="v1")
    where = {"revision": "v1", "local_files_only": False}
    assert asked == [
        ("someone/model", {**where, "use_safetensors": True, "transformer": None}),
        ("transformer/config.json", {}),
    ]
