"""What surrounds stage 2's recipe, called from Python; the command itself is in tests/cli/test_tune_reward.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdmd_cli.config.loader import Resolved, preset_sha256
from rtdmd_cli.engine.backbones.layout import folder_hash
from rtdmd_cli.engine.backbones.sd3 import LAYOUT
from rtdmd_cli.engine.prompts.reading import PromptSet, evenly_chosen, known_by
from rtdmd_cli.engine.report.metrics import explained
from rtdmd_cli.engine.rewards import registry
from rtdmd_cli.engine.sampling.model import open_model
from rtdmd_cli.engine.sampling.sample import decode_all, generate
from rtdmd_cli.engine.sampling.source import resolve
from rtdmd_cli.engine.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder
from rtdmd_cli.engine.training.assembly import encode_prompts
from rtdmd_cli.engine.training.restoring import restore
from rtdmd_cli.engine.training.session import Outcome
from rtdmd_cli.engine.training.start import Start
from rtdmd_cli.engine.tune_reward import checks as tune_checks
from rtdmd_cli.engine.tune_reward import measure as tune_measure
from rtdmd_cli.engine.tune_reward import run as tune_run
from rtdmd_cli.engine.tune_reward.report import rewards_table, verdict
from rtdmd_cli.engine.tune_reward.run import STAGE, run_tune, stage_1_state
from rtdmd_cli.errors import DataError, RewardFailure, UsageError
from tests.tiny_models import PROMPTS, sd3_folder
from tests.tiny_runs import generator_weights, make_run
from tests.tiny_tuning import FROZEN, find, make_tuner, tune_preset

CPU = torch.device("cpu")
TRAINED, JUDGE = "shapes-clip", "shapes-clip-heldout"
TRAINING = PromptSet(PROMPTS, [{}] * len(PROMPTS))
MEASURED = PromptSet(["a star", "a red ring", "two blue circles"], [{}] * 3)
NOTHING = Start(None, None)
GROUPS = {"ema", "generator", "fake", "optimizer_generator", "optimizer_fake", *FROZEN}


def run(
    out: Path,
    name: str,
    begin: Checkpoint,
    start: Start = NOTHING,
    said: Callable[[str], None] = lambda text: None,
    **values: Any,
) -> Outcome:
    config = {"rewards": (TRAINED,), "held_out": (JUDGE,), "epochs": 2, "eval_images": 3, "sample_every": 0}
    preset = tune_preset(**(config | values))
    resolved = Resolved(preset, {}, preset_sha256(preset))
    return run_tune(resolved, TRAINING, MEASURED, begin, start, out, name, ["rtdmd"], said, True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This module's own cache of encoded prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTDMD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of stage 1."""
    stage_1 = make_run(tmp_path_factory.mktemp("stage1"), "first")
    return load_checkpoint(stage_1.checkpoints / "step-000010")


@dataclass(frozen=True)
class Tuned:
    """A finished run of two epochs, and the pictures it measured last."""

    outcome: Outcome
    pictures: Tensor


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, begin: Checkpoint) -> Tuned:
    seen: list[Tensor] = []
    original = tune_measure.measured_images
    with pytest.MonkeyPatch.context() as patch:

        def spy(*arguments: Any) -> Tensor:
            seen.append(original(*arguments))
            return seen[-1]

        patch.setattr(tune_measure, "measured_images", spy)
        outcome = run(tmp_path_factory.mktemp("runs"), "tuned", begin)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    return Tuned(outcome, seen[-1])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_holds_everything(tuned: Tuned, begin: Checkpoint) -> None:
    saved = load_checkpoint(tuned.outcome.checkpoint)
    assert saved.tensors.keys() == GROUPS and saved.step == 2
    assert same(saved.tensors["stage1_generator"], begin.tensors["ema"])  # the average, not the raw weights
    assert same(saved.tensors["stage1_fake"], begin.tensors["fake"])
    assert saved.state["stage"] == "tune-reward" and saved.state["generator_updates"] == 2
    assert saved.state["records"].keys() == {"rewards_before", "watch"}
    assert saved.meta["prompts_sha256"] == known_by(TRAINING, MEASURED)
    assert saved.meta["base_hash"] == folder_hash(LAYOUT, sd3_folder())
    assert RunFolder(tuned.outcome.run).stage == "tune-reward"


def test_every_metric_of_a_run_is_explained(tuned: Tuned) -> None:
    names = {name for row in RunFolder(tuned.outcome.run).metrics.read() for name in row} - {"iteration"}
    assert {name for name in names if not explained(name)} == set()
    assert {f"reward/{TRAINED}", "drift", "learning_rate/fake", "seconds"} <= names


def test_the_rewards_of_a_run(tuned: Tuned) -> None:
    before, after = (tuned.outcome.records[key] for key in ("rewards_before", "rewards_after"))
    assert list(before) == list(after) == [JUDGE, TRAINED]
    assert before != after
    assert RunFolder(tuned.outcome.run).measured(2) == after  # out of turn, so in no line of metrics.jsonl
    assert RunFolder(tuned.outcome.run).measured(1) == {}
    for name, value in after.items():
        reward = registry.find_reward(name).load(CPU, None)
        scores = reward.score(tuned.pictures, MEASURED.texts, MEASURED.metadata)
        assert value == pytest.approx(float(scores.mean()), abs=1e-5)


def test_a_tuned_run_is_sampled_as_it_was_measured(tuned: Tuned) -> None:
    source = resolve(str(tuned.outcome.run), Path("runs"))
    model = open_model(source, CPU, torch.float32)
    lookup, _ = encode_prompts(model.backbone, MEASURED.texts, lambda text: None)
    latents = generate(
        model.backbone,
        model.roles,
        model.plan(),
        lookup([0, 1, 2]),
        None,
        [(0, 0), (1, 0), (2, 0)],
        shape=(4, 8, 8),
        seed=source.preset.evaluate.seed,
        batch=64,
    )
    assert torch.equal(decode_all(model.backbone, latents, 64), tuned.pictures)


def test_the_hash_of_a_tuned_model_depends_on_both_stages(tuned: Tuned, tmp_path: Path) -> None:
    saved, hashes = load_checkpoint(tuned.outcome.checkpoint), []
    for number, group in enumerate((None, "ema", "stage1_generator", "stage1_fake")):
        tensors = dict(saved.tensors)
        if group:
            tensors[group] = {name: tensor + 0.01 for name, tensor in tensors[group].items()}
        folder = tmp_path / str(number)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "preset.resolved.yaml").write_bytes(RunFolder(tuned.outcome.run).preset.read_bytes())
        save_checkpoint(folder / "checkpoints", 2, tensors, saved.state, 1, saved.meta)
        hashes.append(open_model(resolve(str(folder), tmp_path), CPU, torch.float32).model_hash)
    assert len(set(hashes[:3])) == 3 and hashes[3] == hashes[0]  # pictures don't depend on the fake score


def test_a_tuned_checkpoint_without_its_stage_1_part(tuned: Tuned, tmp_path: Path) -> None:
    saved = load_checkpoint(tuned.outcome.checkpoint)
    tensors = {group: part for group, part in saved.tensors.items() if group != "stage1_generator"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "preset.resolved.yaml").write_bytes(RunFolder(tuned.outcome.run).preset.read_bytes())
    save_checkpoint(tmp_path / "checkpoints", 2, tensors, saved.state, 1, saved.meta)
    with pytest.raises(DataError, match=r"stage1_generator\.safetensors belongs to another model"):
        open_model(resolve(str(tmp_path), tmp_path), CPU, torch.float32)


def without(checkpoint: Checkpoint, group: str, name: str | None = None) -> Checkpoint:
    tensors = {key: dict(value) for key, value in checkpoint.tensors.items()}
    if name is None:
        del tensors[group]
    else:
        del tensors[group][name]
    return replace(checkpoint, tensors=tensors)


def test_checkpoints_that_do_not_fit(tuned: Tuned, begin: Checkpoint) -> None:
    core = make_tuner().core
    good = load_checkpoint(tuned.outcome.checkpoint)
    bad = [without(good, group) for group in good.tensors]
    bad += [without(good, group, min(tensors)) for group, tensors in good.tensors.items()]
    bad += [replace(good, meta=good.meta | {"base_hash": "other"}), begin]
    bad += [replace(good, state={k: v for k, v in good.state.items() if k != "optimizers"})]
    for checkpoint in bad:
        with pytest.raises(DataError):
            restore(core, checkpoint, STAGE, FROZEN)
    restore(core, good, STAGE, FROZEN)
    for group in ("generator", "fake", *FROZEN):
        assert same(core.roles.state(group), good.tensors[group])
    assert same(core.ema, good.tensors["ema"]) and core.generator_updates == 2


def test_resume_is_exact_and_keeps_its_own_stage_1(tuned: Tuned, begin: Checkpoint, tmp_path: Path) -> None:
    """Even where the stage-1 run has gone on since."""
    half = run(tmp_path, "tuned", begin, epochs=1)
    later = {group: {n: t + 1 for n, t in part.items()} for group, part in begin.tensors.items()}
    start = Start(RunFolder(half.run), load_checkpoint(half.checkpoint))
    outcome = run(tmp_path, "tuned", replace(begin, tensors=later), start)
    straight, resumed = (load_checkpoint(o.checkpoint) for o in (tuned.outcome, outcome))
    for group in GROUPS:
        assert same(straight.tensors[group], resumed.tensors[group]), group
    assert outcome.records == tuned.outcome.records
    for picture in ("samples/step-000002.png", "health.png"):  # the grid's second row is stage 1
        assert (outcome.run / picture).read_bytes() == (tuned.outcome.run / picture).read_bytes()


def test_no_run_folder_for_numbers_that_do_not_fit(begin: Checkpoint, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"images_per_epoch": 10}, "takes 5 different prompts, and there are 4"),
        ({"subset_steps": 4}, "`tune_reward.subset_steps` is 4; the sampler has 3 stochastic"),
        ({"subset_steps": 2, "sampler": {"raw_steps": (1000, 500)}}, "has 1 stochastic"),
        ({"backprop_steps": 5}, "`tune_reward.backprop_steps` is 5; the sampler has 4 steps"),
        ({"sampler": {"raw_steps": (1000, 999, 500, 250)}}, "not below `distill.t_max`"),
        ({"sampler": {"eta": 0.0}}, "has 0 stochastic"),
        ({"sampler": {"eta": 0.0}, "policy_weight": 0.0, "kl_weight": 1.0}, "has 0 stochastic"),
        ({"reward_paths": ("clipscore=/x",)}, "names clipscore"),
        ({"rewards": ("shapes-klip",)}, "no reward `shapes-klip`"),
    ]
    for values, expected in cases:
        with pytest.raises(UsageError, match=re.escape(expected)) as caught:
            run(tmp_path / "runs", "bad", begin, **values)
        assert caught.value.hint
    assert not (tmp_path / "runs").exists()


def test_no_run_folder_for_checkpoints_that_do_not_fit(
    begin: Checkpoint, tuned: Tuned, tmp_path: Path
) -> None:
    other = replace(begin, meta=begin.meta | {"base_hash": "other"})
    small = replace(begin, tensors=begin.tensors | {"ema": generator_weights(1, rank=3)})
    for bad, expected in ((other, "another version"), (small, "don't fit the adapter stage1_generator")):
        with pytest.raises(DataError, match=expected):
            run(tmp_path / "runs", "bad", bad)
    partial = without(load_checkpoint(tuned.outcome.checkpoint), "stage1_fake")
    with pytest.raises(DataError, match="no full checkpoint"):
        run(tmp_path / "runs", "bad", begin, Start(None, partial))
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_stage_1_is_told_from_others(begin: Checkpoint, tuned: Tuned) -> None:
    assert stage_1_state(begin) is begin
    for bad in (load_checkpoint(tuned.outcome.checkpoint), without(begin, "fake"), without(begin, "ema")):
        with pytest.raises(DataError, match="not made by rtdmd distill"):
            stage_1_state(bad)


def test_the_report_leads_with_the_rewards_held_out(tuned: Tuned) -> None:
    page = RunFolder(tuned.outcome.run).report.read_text(encoding="utf-8")
    before, after = (tuned.outcome.records[key] for key in ("rewards_before", "rewards_after"))
    verdict = f"{JUDGE} went from {before[JUDGE]:.4g} to {after[JUDGE]:.4g}; {TRAINED} (trained on) from"
    assert verdict in page
    text = re.sub(r"<[^>]*>", " ", page.partition("Rewards before and after")[2])
    assert re.search(rf"{JUDGE}\s+held out\s+{re.escape(f'{before[JUDGE]:.4g}')}", text)
    assert text.index(JUDGE) < text.index(f"{TRAINED} ")
    assert "stage 2 above, stage 1 below" in page


def test_measurements_on_the_way_and_none_at_all(begin: Checkpoint, tmp_path: Path) -> None:
    outcome = run(tmp_path, "often", begin, epochs=3, eval_every=2, log_every=3)
    rows = {row["iteration"]: row for row in RunFolder(outcome.run).metrics.read()}
    assert set(rows) == {2, 3}  # each measurement has a line
    assert {key for key in rows[2] if key.startswith("measured/")} == {
        f"measured/{n}" for n in (JUDGE, TRAINED)
    }
    assert not any(key.startswith("measured/") for key in rows[3])
    assert f"reward/{TRAINED}" in rows[3] and f"reward/{JUDGE}" not in rows[3]
    none = run(tmp_path, "none", begin, epochs=1, eval_images=0)
    assert none.records["rewards_before"] == none.records["rewards_after"] == {}
    assert "best" not in none.records
    assert "Rewards before and after" not in RunFolder(none.run).report.read_text(encoding="utf-8")


def test_rewards_without_a_gradient(
    begin: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They train the policy alone; alone with back-propagation they are refused; a broken one fails the run."""
    for name in ("rule", "broken"):
        monkeypatch.setitem(registry.REWARDS, name, find(name))
    off = {"policy_weight": 0.0, "dmd_weight": 0.0, "rewards": ("rule",)}
    with pytest.raises(UsageError, match="none of the rewards is differentiable"):
        run(tmp_path, "off", begin, **off)
    assert not (tmp_path / "off").exists()
    said: list[str] = []
    config = tune_preset(rewards=(TRAINED, "rule")).tune_reward
    mixture = tune_checks.open_rewards(config, TRAINING, MEASURED, CPU, said.append, 32)
    assert mixture.differentiable == (TRAINED,)
    assert len(said) == 1 and "rule" in said[0] and TRAINED not in said[0]
    said.clear()
    nothing = {"policy_weight": 0.0, "backprop_weight": 0.0, "rewards": (TRAINED, "rule")}
    outcome = run(tmp_path, "measured", begin, epochs=1, said=said.append, **nothing)
    assert f"no term that is on can follow {TRAINED}, rule: measured, not trained on" in said
    report = RunFolder(outcome.run).report.read_text(encoding="utf-8")
    assert f"{TRAINED}, held out" in report
    assert ", trained on" not in report and "(trained on)" not in report
    assert outcome.records["watch"]["best"]["trained"] is None
    said.clear()
    for values in ({"rewards": (TRAINED,)}, {"rewards": ("rule",), "backprop_weight": 0.0}):
        tune_checks.open_rewards(tune_preset(**values).tune_reward, TRAINING, MEASURED, CPU, said.append, 32)
    assert said == []
    with pytest.raises(DataError, match="The reward broken has no gradient to the pictures"):
        run(tmp_path, "claims", begin, rewards=("broken",))
    assert not (tmp_path / "claims").exists()  # tried before the first epoch
    with pytest.raises(RewardFailure, match="3 of 3 pictures got no reward in the first measurement.*broken"):
        run(tmp_path, "broken", begin, rewards=("broken",), backprop_weight=0.0)
    assert RunFolder(tmp_path / "broken").status()["state"] == "failed"


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("no"), "failed")]
)
@pytest.mark.parametrize("place", ["begin_measurement", "measure"])
def test_a_run_that_ends_before_its_first_epoch(
    begin: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
    state: str,
) -> None:
    """While the teacher's pictures are drawn, or the start is measured: its status says how it ended."""

    def stop(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(tune_run, place, stop)
    with pytest.raises(type(error)):
        run(tmp_path, "early", begin)
    if place == "begin_measurement" and state == "failed":
        assert not (tmp_path / "early").exists()  # a start that fails leaves nothing
        return
    status = RunFolder(tmp_path / "early").status()
    assert (status["state"], status["iteration"]) == (state, 0)
    assert status.get("reason") == (None if state == "interrupted" else "no")


def test_prompts_of_a_measurement_are_spread_evenly() -> None:
    many = PromptSet([str(i) for i in range(10)], [{"i": i} for i in range(10)])
    assert evenly_chosen(many, 2).texts == ["2", "7"]
    assert evenly_chosen(many, 3).metadata == [{"i": 1}, {"i": 5}, {"i": 8}]
    assert evenly_chosen(many, 99).texts == many.texts and len(evenly_chosen(many, 0)) == 0


def test_rewards_held_out_lead_whatever_the_order_of_the_record() -> None:
    before, after = {"a": 1.0, "judge": 2.0, "z": 3.0}, {"a": 1.5, "judge": 2.5, "z": 3.5}  # as JSON sorts it
    assert [row[0] for row in rewards_table(before, after, ["judge"]).rows] == ["judge", "a", "z"]
    assert verdict(before, after, ["judge"]).startswith("judge went from 2 to 2.5; a (trained on) from")
