"""Presets are found, inherited, overridden in order, validated in one sentence, and written back exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtdmd_cli.config import (
    Preset,
    Resolved,
    dump_resolved,
    keys,
    list_presets,
    load_preset,
    loader,
    preset_names,
    preset_path,
    preset_sha256,
    preset_text,
    preset_values,
)
from rtdmd_cli.config.section import ATTENTION
from rtdmd_cli.errors import EnvironmentFailure, UsageError

SHAPES = ["shapes-4step", "shapes-4step-full", "shapes-4step-lora"]


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def load(name: str, *overrides: str, **environ: str) -> Resolved:
    return load_preset(name, overrides, environ)


def refused(name: str, *overrides: str, **environ: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(name, *overrides, **environ)
    error = caught.value
    assert error.exit_code == 2
    assert "\n" not in error.message + error.hint and error.message.endswith(".") and error.hint
    return error


# Shipped presets


def test_shipped_presets() -> None:
    found = {info.name: info for info in list_presets()}
    assert list(found) == preset_names()
    assert {*SHAPES, *PUBLISHED, *CARRIED, *SMALL, *NIGHT} == set(found)
    for name, info in found.items():
        preset = load(name).preset
        assert preset.name == name == info.path.stem
        assert preset.description == info.description != ""
        assert preset.model.family == info.family


def test_shapes_full_inherits_and_says_from_where() -> None:
    short, full = load("shapes-4step"), load("shapes-4step-full")
    assert full.preset.model == short.preset.model
    assert full.preset.distill.iterations > short.preset.distill.iterations
    assert full.sources["distill.iterations"] == "preset shapes-4step-full"
    assert full.sources["model.path"] == "preset shapes-4step"
    assert full.preset.description != short.preset.description


FREE = {
    *("name", "description", "distill.prompts", "distill.micro_batch", "distill.save_every"),
    *("tune_reward.prompts", "tune_reward.micro_batch", "tune_reward.save_every", "tune_reward.sample_every"),
    *("tune_reward.eval_prompts", "tune_reward.eval_every", "tune_reward.watch.features"),
    *("tune_reward.held_out", "evaluate.batch", "hardware.dtype", "hardware.gradient_checkpointing"),
    "hardware.float32_matmul",
    "evaluate.resolution",
}
"""Of a published recipe, what does not change its result, and where its prompts lie."""
HUB = "black-forest-labs/FLUX"
PUBLISHED = {  # method.md, section 5
    "sd3-4step": (
        "stabilityai/stable-diffusion-3-medium-diffusers",
        1024,
        7.0,
        128,
        3e-5,
        3e-5,
        True,
        16,
        512,
    ),
    "sd35-4step": ("stabilityai/stable-diffusion-3.5-medium", 512, 4.5, 128, 3e-5, 3e-5, True, 24, 1152),
    "flux1-4step": (f"{HUB}.1-dev", 512, 3.5, 512, 3e-5, 1e-6, False, 24, 1536),
    "flux2-klein-4b-4step": (f"{HUB}.2-klein-base-4B", 512, 4.0, 512, 1e-6, 1e-6, True, 24, 1536),
    "flux2-klein-9b-4step": (f"{HUB}.2-klein-base-9B", 512, 4.0, 512, 1e-6, 1e-6, False, 24, 1536),
}
PUBLISHED_SIZE = 1024  # px
CARRIED = ("zimage-4step", "qwenimage-4step")
"""Presets of models that the paper did not train, with the settings of FLUX.1-dev."""
SMALL = {f"{name}-24gb": name for name in (*PUBLISHED, *CARRIED)} | {"sd3-4step-16gb": "sd3-4step"}
NIGHT = {f"{name}-overnight": f"{name}-24gb" for name in PUBLISHED if "9b" not in name}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_values(name: str) -> None:
    """What the table of the method says, and for the rest the defaults, which are published values too."""
    preset = load(name).preset
    model, distill, tune = preset.model, preset.distill, preset.tune_reward
    found = (
        *(model.path, model.resolution, model.guidance, model.text_length),
        *(distill.fake_lr, tune.fake_lr, tune.consistency_weight > 0),
        *(tune.images_per_prompt, tune.images_per_epoch),
    )
    assert found == PUBLISHED[name] and distill.generator_lr == distill.fake_lr
    assert model.components == model.path
    assert model.generator_init == (model.path.replace("-base", "") if "klein" in name else "teacher")
    targets = {*ATTENTION, "to_qkv_mlp_proj", "to_out"} if "klein" in name else {*ATTENTION}
    assert set(distill.lora.targets) == set(tune.lora.targets) == targets
    assert preset.evaluate.resolution == PUBLISHED_SIZE  # at which the published figures were measured
    published = preset_values(Preset(name="d", model=model))
    differing = {key for key, value in preset_values(preset).items() if published[key] != value}
    tabulated = {"distill.generator_lr", "distill.lora.targets", "tune_reward.lora.targets"}
    tabulated |= {"distill.fake_lr", "tune_reward.fake_lr", "tune_reward.consistency_weight"}
    tabulated |= {"tune_reward.images_per_prompt", "tune_reward.images_per_epoch"}
    assert differing - tabulated == FREE


@pytest.mark.parametrize("name", CARRIED)
def test_a_model_without_a_published_run_has_the_settings_of_another(name: str) -> None:
    """All but what names the model, its guidance and its layers; the file says that they are untested."""
    own, other = (preset_values(load(each).preset) for each in (name, "flux1-4step"))
    differing = {key for key in own if own[key] != other[key]}
    names = {"name", "description", "model.family", "model.path", "model.components", "model.guidance"}
    targets = {"distill.lora.targets", "tune_reward.lora.targets"} if name == "zimage-4step" else set()
    assert differing == names | targets
    text = preset_text(name)
    assert "untested" in load(name).preset.description and "Ours, and untested on the real model" in text


@pytest.mark.parametrize("name", SMALL)
def test_a_small_card_changes_nothing_but_size_length_and_storage(name: str) -> None:
    own, parent = (preset_values(load(each).preset) for each in (name, SMALL[name]))
    differing = {key for key in own if own[key] != parent[key] and not key.startswith("hardware.")}
    rest = {"name", "description", "distill.iterations", "tune_reward.epochs"}
    rest |= {"distill.save_every", "distill.sample_every", "tune_reward.rewards_in_memory", "evaluate.batch"}
    more = {"model.resolution"} if SMALL[name] == "sd3-4step" else set()
    assert differing == rest | more
    assert own["model.resolution"] == 512 and own["distill.iterations"] == 3000


@pytest.mark.parametrize("name", NIGHT)
def test_a_night_changes_length_batches_and_what_held_in_the_built_in_world(name: str) -> None:
    own, parent = (preset_values(load(each).preset) for each in (name, NIGHT[name]))
    differing = {key for key in own if own[key] != parent[key]}
    kept = {
        "distill.save_every",
        "tune_reward.eval_every",
        "tune_reward.consistency_weight",
        "tune_reward.images_per_prompt",
    }  # of some alike
    means = {f"distill.{key}" for key in ("boundaries", "boundary_weight", "consistency_weight")}
    means |= {"tune_reward.matching", "tune_reward.matching_images", "tune_reward.backprop_steps"}
    sizes = {"name", "description", "distill.iterations", "distill.batch", "distill.fake_per_generator"}
    sizes |= {"distill.sample_every", "tune_reward.epochs", "tune_reward.images_per_epoch"}
    assert means | sizes <= differing <= means | sizes | kept


def test_an_installed_package_uses_its_own_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "rtdmd_cli"
    (inside / "config").mkdir(parents=True)
    monkeypatch.setattr(loader, "__file__", str(inside / "config" / "loader.py"))
    with pytest.raises(EnvironmentFailure, match="missing"):
        loader.preset_folder()
    for folder in (tmp_path / "presets", inside / "presets"):  # the second is preferred
        folder.mkdir()
        write(folder, "a: 1", "x.yaml")
        assert loader.preset_folder() == folder


# Names and paths


@pytest.mark.parametrize(
    ("name", "nearest"), [("shape-4step", "shapes-4step"), ("sd3", "sd3-4step"), ("", "")]
)
def test_unknown_preset_names_the_nearest(name: str, nearest: str) -> None:
    error = refused(name)
    assert f"the nearest is `{nearest}" in error.message
    assert "rtdmd presets list" in error.hint


@pytest.mark.parametrize("name", ["no/such", "no.yaml", "x" * 300, "a\0b", "..", "/"])
def test_names_that_lead_nowhere(name: str) -> None:
    refused(name)


def test_a_shipped_name_comes_before_a_file_and_any_file_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "extends: sd3-4step\ndistill: {batch: 144}\n", "shapes-4step")
    write(tmp_path, "extends: sd3-4step\ndistill: {batch: 144}\n", "own")
    assert load("shapes-4step").preset.distill.batch != 144
    assert load("./shapes-4step").preset.distill.batch == 144
    assert load("own").preset.distill.batch == 144
    assert preset_path("own") == Path("own")
    assert preset_text("own").startswith("extends")


# Files and inheritance


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    assert load(write(tmp_path, "extends: shapes-4step\n", "my own.yaml")).preset.name == "my-own"
    assert load(write(tmp_path, "extends: shapes-4step\n", ".yaml")).preset.name == "preset.yaml"
    assert load(write(tmp_path, "extends: shapes-4step\nname: other\n")).preset.name == "other"


def test_name_and_description_are_not_inherited(tmp_path: Path) -> None:
    write(tmp_path, "extends: shapes-4step\nname: parent\ndescription: parent\n", "a.yaml")
    preset = load(write(tmp_path, "extends: a.yaml\n")).preset
    assert (preset.name, preset.description) == ("mine", "")


def test_extends_a_file_beside_it_deeply(tmp_path: Path) -> None:
    write(tmp_path, "extends: shapes-4step\ndistill:\n  batch: 8\n  lora: {rank: 4}\n", "a.yaml")
    resolved = load(write(tmp_path, "extends: a.yaml\ndistill:\n  lora: {alpha: 8}\n"))
    assert (resolved.preset.distill.batch, resolved.preset.distill.lora.rank) == (8, 4)
    assert resolved.preset.distill.lora.alpha == 8
    assert resolved.sources["distill.lora.rank"] == f"preset {tmp_path / 'a.yaml'}"


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    error = refused(write(tmp_path, "\nextends: ./a.yaml\n", "b.yaml"))
    assert "leads back" in error.message and "a.yaml, line 1" in error.message
    assert "leads back" in refused(write(tmp_path, "extends: mine.yaml\n")).message


@pytest.mark.parametrize("value", ["[shapes-4step]", "", "3"])
def test_extends_of_a_wrong_type(tmp_path: Path, value: str) -> None:
    assert "`extends` must be" in refused(write(tmp_path, f"extends: {value}\n")).message


def test_extends_of_an_unknown_preset(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "extends: shapes-step\n"))
    assert "`shapes-4step`" in error.message and "mine.yaml, line 1" in error.message


def test_a_preset_without_model(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "distill: {batch: 8}\n"))
    assert error.message == "The preset has no `model.family`."


# Bad values in a file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "distill:\n  iteration: 5\n",
            ["`distill.iteration`", "line 3", "nearest key is `distill.iterations`"],
        ),
        ("distil:\n  batch: 5\n", ["`distil`", "line 2", "nearest key is `distill`"]),
        ("distill:\n  lora:\n    ranks: 5\n", ["nearest key is `distill.lora.rank`"]),
        ("distill.batch: 5\n", ["`distill.batch` is written with dots"]),
        ("distill: 5\n", ["`distill` is a section and cannot be 5", "line 2"]),
        ("distill:\n", ["`distill` is a section and cannot be null"]),
        (
            "distill:\n  batch: x\n",
            ["`distill.batch` must be a whole number from 1 to 65536", '"x"', "line 3"],
        ),
        ("distill:\n  batch: 0\n", ["from 1 to 65536, not 0"]),
        ("distill:\n  batch: true\n", ["not true"]),
        ("distill:\n  batch: 2.0\n", ["not 2.0"]),
        ("distill:\n  batch: {a: 1}\n", ["not a section"]),
        ("distill:\n  micro_batch: x\n", ["whole number from 1 to 65536, or null"]),
        ("distill:\n  micro_batch: 7\n", ["`distill.micro_batch` (7) must divide `distill.batch` (24)"]),
        ("distill:\n  ema_warmup: 1\n", ["true or false"]),
        ("distill:\n  boundaries: all\n", ["one of one, every"]),
        ("distill:\n  betas: [0.9]\n", ["a list of 2 numbers"]),
        (
            "distill:\n  generator_lr: .nan\n",
            ["`distill.generator_lr` must be a number above 0 and at most 1"],
        ),
        ("distill:\n  batch: 5\n  batch: 5\n", ["line 4", "twice"]),
        ("model:\n  resolution: 33\n", ["a multiple of 8"]),
        ("sampler:\n  raw_steps: [1000, 1000]\n", ["must fall strictly", "[1000, 1000]"]),
        ("sampler:\n  raw_steps: 1000\n", ["a list of whole numbers"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(write(tmp_path, f"extends: shapes-4step\n{text}")).message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1e-4", "Write 1.0e-4 without quotes"),
        ("1.5e4", "Write 1.5e+4 without quotes"),
        ('"0.1"', "Write 0.1 without quotes"),
    ],
)
def test_text_that_looks_like_a_number(tmp_path: Path, value: str, hint: str) -> None:
    path = write(tmp_path, f"extends: shapes-4step\ndistill: {{fake_lr: {value}}}\n")
    assert refused(path).hint.startswith(hint)


# --set and the environment


def test_order_of_sources() -> None:
    name, environ = (
        "shapes-4step",
        {"RTDMD_SET_DISTILL__BATCH": "4", "RTDMD_SET_DISTILL__SEED": "5", "OTHER": "x"},
    )
    resolved = load(name, "distill.seed=6", "distill.seed=7", **environ)
    assert (resolved.preset.distill.batch, resolved.preset.distill.seed) == (4, 7)
    picked = ("distill.seed", "distill.batch", "distill.iterations", "distill.eps")
    assert [resolved.sources[key] for key in picked] == [
        *("--set", "environment", "preset shapes-4step", "default")
    ]
    assert set(resolved.sources) == {".".join(path) for path in keys()}


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_SET_DISTILL__LORA__RANK", "3")
    assert load_preset("shapes-4step").preset.distill.lora.rank == 3
    assert load("shapes-4step").preset.distill.lora.rank != 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("distill.generator_lr=1e-5", "distill.generator_lr", 1e-5),
        ("distill.generator_lr=.5", "distill.generator_lr", 0.5),
        ("distill.grad_clip=2", "distill.grad_clip", 2.0),
        (" distill.batch = 8 ", "distill.batch", 8),
        ("distill.betas=[5e-1, 0.9]", "distill.betas", [0.5, 0.9]),
        ("sampler.raw_steps=[1000,900,600,300]", "sampler.raw_steps", [1000, 900, 600, 300]),
        ("distill.micro_batch=null", "distill.micro_batch", None),
        ("distill.ema_warmup=true", "distill.ema_warmup", True),
        ("model.revision=1234567", "model.revision", "1234567"),
        ("model.revision=12e4567", "model.revision", "12e4567"),
        ("model.revision=null", "model.revision", None),
        ("model.path=C:\\a: [b", "model.path", "C:\\a: [b"),
        ("distill.prompts='a b'", "distill.prompts", "a b"),
        ("description=a=b", "description", "a=b"),
        ("distill.lora.targets=[to_q]", "distill.lora.targets", ["to_q"]),
    ],
)
def test_set(override: str, key: str, value: object) -> None:
    got = preset_values(load("shapes-4step", override).preset)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.iteration=5", "nearest key is `distill.iterations`"),
        ("distil.iterations=5", "nearest key is `distill.iterations`"),
        ("iterations=5", "nearest key is `distill.iterations`"),
        ("distill.eta=0.5", "nearest key is `sampler.eta`"),
        ("distill.lr=1e-5", "nearest key is `distill.fake_lr`"),
        ("extends=sd3-4step", "Unknown key `extends`"),
        ("distill=5", "`distill` is a section, not a key"),
        ("distill.batch", "has no value"),
        ("=5", "Unknown key ``"),
        ("distill.batch=1e1", "not 10.0 (--set)"),
        ("distill.batch=", "not null"),
        ("distill.generator_lr=-1", "above 0"),
        ("distill.generator_lr=nan", '"nan"'),
        ("distill.generator_lr=1e999", "must be a number"),
        ("distill.seed=010", "plain decimal digits"),
        ("distill.seed=[1", "--set distill.seed: "),
        ("model.path=", "at least 1 character"),
        ("model.path=a\udcff", "model.path"),
        ("name=a/b", "`name` must begin"),
        ("name=" + "a" * 65, "at most 64 characters"),
    ],
)
def test_bad_set(override: str, words: str) -> None:
    assert words in refused("shapes-4step", override).message


def test_bad_environment() -> None:
    error = refused("shapes-4step", RTDMD_SET_DISTILL__ITERATION="5")
    assert "`distill.iterations`" in error.message and "RTDMD_SET_DISTILL__ITERATIONS" in error.message
    assert (
        "environment variable RTDMD_SET_DISTILL__BATCH"
        in refused("shapes-4step", RTDMD_SET_DISTILL__BATCH="x").message
    )


def test_a_good_override_saves_a_bad_value(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: shapes-4step\ndistill: {batch: 0}\n")
    assert load(path, "distill.batch=4").preset.distill.batch == 4


# Hash and round trip


def test_the_hash_follows_the_values_and_not_the_name(tmp_path: Path) -> None:
    base = load("shapes-4step")
    assert base.sha256 == preset_sha256(base.preset) and len(base.sha256) == 64
    assert load("shapes-4step", "name=other", "description=other").sha256 == base.sha256
    assert load("shapes-4step", "distill.seed=43").sha256 != base.sha256
    assert load(write(tmp_path, dump_resolved(base.preset))).sha256 == base.sha256


@pytest.mark.parametrize("name", [*SHAPES, *PUBLISHED, *SMALL, *NIGHT])
def test_resolved_presets_are_read_back(tmp_path: Path, name: str) -> None:
    preset = load(name).preset
    assert load(write(tmp_path, dump_resolved(preset))).preset == preset


texts = st.text(st.characters(codec="utf-8"), max_size=40).filter(str.isprintable)


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(0, 1, exclude_min=True),
    eta=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    description=texts,
    path=texts.filter(bool),
    revision=st.none() | texts.filter(bool),
)
def test_any_values_are_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    lr: float,
    eta: float,
    seed: int,
    description: str,
    path: str,
    revision: str | None,
) -> None:
    data = load("shapes-4step").preset.model_dump(mode="json")
    data["distill"] |= {"generator_lr": lr, "seed": seed}
    data["sampler"]["eta"] = eta
    data["model"] |= {"path": path, "revision": revision}
    preset = Preset.model_validate(data | {"description": description})
    file = write(tmp_path_factory.mktemp("round"), dump_resolved(preset))
    assert load(file).preset == preset


def test_no_torch() -> None:
    code = "import sys, rtdmd_cli.config, rtdmd_cli.cli.presets; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


def test_a_long_chain_of_presets_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: shapes-4step\n", "0.yaml")
    for number in range(1, 2_000):
        write(tmp_path, f"extends: {number - 1}.yaml\n", f"{number}.yaml")
    assert load(str(tmp_path / "14.yaml")).preset.name == "14"
    with pytest.raises(UsageError, match="More than 16 presets extend one another"):
        load(str(tmp_path / "1999.yaml"))


@pytest.mark.parametrize("name", NIGHT)
def test_a_night_measures_on_the_way_and_says_how_short_it_is(name: str) -> None:
    """Learning rate times updates of stage 1, against the published run's: below a fifth the header states the share."""
    night = load_preset(name, [], {}).preset
    published = load_preset(name.removesuffix("-overnight"), [], {}).preset

    def moved(preset: Preset) -> float:
        made = preset.distill
        return made.generator_lr * made.iterations / made.fake_per_generator

    tuned, share = night.tune_reward, moved(night) / moved(published)
    assert tuned.eval_every and (tuned.epochs - 1) // tuned.eval_every >= 2
    (path,) = [info.path for info in list_presets() if info.name == name]
    told = f"{round(100 * share)}% of the published learning rate times updates"
    assert share > 0.2 or told in " ".join(path.read_text().replace("#", "").split())
