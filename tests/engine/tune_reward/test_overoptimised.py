"""A stage-2 run on the shapes model that is made to exploit its reward on purpose, and what the watch does about it.

The reward is the brightness of a picture, whatever its caption: large steps towards white destroy what is asked for.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdmd_cli.cli import app
from rtdmd_cli.config.loader import load_preset
from rtdmd_cli.engine.backbones.families import load_backbone
from rtdmd_cli.engine.prompts.reading import evenly_chosen, read_prompt_set
from rtdmd_cli.engine.rewards import shapes_clip
from rtdmd_cli.engine.roles.adapters import Roles
from rtdmd_cli.engine.sampling.model import open_model
from rtdmd_cli.engine.sampling.pictures import encode, paint
from rtdmd_cli.engine.sampling.source import resolve
from rtdmd_cli.engine.storage.checkpoint import checkpoint_steps, load_checkpoint, save_checkpoint
from rtdmd_cli.engine.storage.run_folder import RunFolder, create_run
from rtdmd_cli.shapes.prompts import training_captions

CPU = torch.device("cpu")
BRIGHT, JUDGE = "bright_rewards:Brightness", "shapes-clip-heldout"
EPOCHS, PROMPTS, TEACHER_STEPS = 4, 4, 8
REWARD = """
class Brightness:
    "How bright the picture is."
    differentiable = True

    def score(self, images, prompts, metadata):
        return images.mean((1, 2, 3))
"""
RECIPE: dict[str, Any] = {
    "prompts": "captions.txt",
    "epochs": EPOCHS,
    "eval_every": 1,
    "images_per_epoch": 4,
    "images_per_prompt": 2,
    "generator_lr": 1.5e-2,
    "dmd_weight": 0,
    "policy_weight": 0,
    "backprop_weight": 1,
    "backprop_steps": 3,
    "backprop_margin": 3,
    "lr_decay": "none",
    "eval_images": 12,
    "watch.prompt_count": PROMPTS,
    "watch.images_per_prompt": 2,
    "watch.max_held_out_fall": 0.4,
    "watch.min_diversity": 0,
    "save_every": 100,
    "keep": 1,
    "sample_every": 0,
    "lora.rank": 4,
    "lora.alpha": 4,
}


def stage_1(out: Path) -> RunFolder:
    """A distill run of the shapes model whose adapters do nothing yet: its base model in 4 steps."""
    resolved = load_preset("shapes-4step", ["distill.lora.rank=2", "distill.train=lora"], {})
    backbone = load_backbone(resolved.preset.model, CPU, torch.float32)
    roles = Roles(backbone.transformer, resolved.preset.distill.lora, 0)
    state = {role: roles.state(role) for role in ("generator", "fake")}
    run = create_run(out, "first", resolved, ["rtdmd"], CPU)
    meta = {"base_hash": backbone.model_id.hash}
    save_checkpoint(run.checkpoints, 1, {"ema": state["generator"], **state}, {"stage": "distill"}, 3, meta)
    run.set_status("finished")
    return run


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Done:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = app.main(list(arguments))
    return Done(code, out.getvalue(), err.getvalue())


def tune(name: str, *arguments: str) -> Done:
    settings = [f"--set=tune_reward.{key}={value}" for key, value in RECIPE.items()]
    settings += [f"--set=model.teacher_steps={TEACHER_STEPS}", "--reward", BRIGHT, "--name", name, "--json"]
    return call("tune-reward", *settings, *arguments)


STOP = "--set=tune_reward.watch.stop=true"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Done]]:
    """What the commands said. The folder of the runs is the current one while the module runs."""
    folder, threads = tmp_path_factory.mktemp("bright"), torch.get_num_threads()
    (folder / "bright_rewards.py").write_text(REWARD, encoding="utf-8")
    captions = [caption.text for caption in training_captions(24, 1)]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RTDMD_CACHE", str(folder / "cache"))
        stage_1(Path("runs"))
        found = {"on": tune("on"), "stopped": tune("broken", STOP)}
        found["stopped again"] = tune("broken", STOP, "--resume", "auto")
        shutil.copytree("runs/broken", "runs/stopped")
        found["resumed"] = tune("broken", "--resume", "auto")
        yield found
    torch.set_num_threads(threads)


def rows(name: str) -> list[dict[str, Any]]:
    return RunFolder(Path("runs") / name).metrics.read()


def steps(name: str) -> list[int]:
    return checkpoint_steps(Path("runs") / name / "checkpoints")


def test_the_rewards_part_and_the_run_says_so(done: dict[str, Done]) -> None:
    assert done["on"].code == 0, done["on"].err
    result = json.loads(done["on"].out)
    bright, judge = result["rewards"][BRIGHT], result["rewards"][JUDGE]
    assert bright["after"] > bright["before"] + 0.05 and judge["after"] < judge["before"] - 0.02
    warning = re.search(
        r"warning, epoch (\d): (the rewards trained on rose while the held-out .*)", done["on"].err
    )
    assert warning and warning[2] in (Path("runs/on/log.txt")).read_text()
    limit = RECIPE["watch.max_held_out_fall"]
    gains = [0.0] + [row["watch/held_out"] for row in rows("on")]
    first = next(i for i, gain in enumerate(gains) if max(gains[:i], default=0.0) - gain > limit)
    assert int(warning[1]) == first > 1  # the first measurement past the limit, not an earlier one
    assert result["finished"] and result["epochs"] == EPOCHS
    assert result["warning"].startswith(f"From epoch {first} on")


def test_the_best_checkpoint_is_kept(done: dict[str, Done]) -> None:
    """Although `keep` is 1; what reads a run takes it, and says so."""
    gains = {row["iteration"]: row["watch/held_out"] for row in rows("on")}
    best = max(gains, key=lambda epoch: gains[epoch])
    assert 1 <= best < EPOCHS and steps("on") == [best, EPOCHS]
    path = f"runs/on/checkpoints/step-{best:06d}"
    assert json.loads(done["on"].out)["best_checkpoint"] == path
    assert f"best checkpoint by the held-out rewards is step-{best:06d}, which is kept" in done["on"].err
    assert load_checkpoint(Path(path)).state["records"]["best"] == best
    taken = call("sample", "a photo of a red circle", "--from", "runs/on", "--out", "taken")
    assert taken.code == 0 and f"taking step-{best:06d}, the best by the held-out rewards" in taken.err
    last = call(
        "sample", "a photo of a red circle", "--from", "runs/on", "--checkpoint", "last", "--out", "last"
    )
    assert last.code == 0 and "held-out" not in last.err
    assert resolve("runs/on", Path("runs")).checkpoint == Path(path)
    assert resolve("runs/on", Path("runs"), "last").label == f"on/step-{EPOCHS:06d}"


def test_the_run_ends_where_the_preset_asks_for_it(done: dict[str, Done]) -> None:
    for name in ("stopped", "stopped again"):
        assert done[name].code == 0, done[name].err
        result = json.loads(done[name].out)
        assert result["finished"] is False and 1 < result["epochs"] < EPOCHS
        assert result["epochs"] == rows("stopped")[-1]["iteration"] == steps("stopped")[-1]
        assert result["warning"]
    status = RunFolder(Path("runs/stopped")).status()
    assert status["state"] == "finished" and status["best"] == f"step-{steps('stopped')[0]:06d}"
    assert "The run ended here, as its preset asks." in Path("runs/stopped/report.html").read_text()
    assert "The run ended here" not in Path("runs/on/report.html").read_text()


def test_a_stopped_run_that_goes_on_is_the_one_that_was_not(done: dict[str, Done]) -> None:
    assert done["resumed"].code == 0, done["resumed"].err
    one, other = (
        load_checkpoint(Path(f"runs/{name}/checkpoints/step-{EPOCHS:06d}")) for name in ("on", "broken")
    )
    for group, tensors in one.tensors.items():
        assert all(torch.equal(other.tensors[group][name], tensor) for name, tensor in tensors.items())
    for checkpoint in (one, other):
        del checkpoint.state["seconds"]
    assert one.state == other.state and one.state["records"]["watch"]["alarm"]["count"] > 0
    clocks = ("seconds", "iterations_per_second")
    plain = [
        [{k: v for k, v in row.items() if k not in clocks} for row in rows(name)] for name in ("on", "broken")
    ]
    assert plain[0] == plain[1] and steps("on") == steps("broken")


def test_the_report_begins_with_the_warning_and_the_rewards_held_out(done: dict[str, Done]) -> None:
    page = Path("runs/on/report.html").read_text(encoding="utf-8")
    order = ['class="warning"', "went from", f"{JUDGE}, held out<", f"{BRIGHT}, trained on<"]
    order += ["Diversity<", "Distance to the teacher<", "Reward back-propagation<", "Gradient norms, "]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert html.escape(json.loads(done["on"].out)["warning"]) in page
    words = f"builtin:shapes; {2 * PROMPTS} pictures, 2 a prompt; {PROMPTS} of the teacher at {TEACHER_STEPS} steps"
    assert f"picture features of the CLIP {words}" in page
    assert "12 pictures, one of a prompt; builtin:shapes-benchmark" in page


def test_diversity_and_distance_are_those_of_the_pictures(done: dict[str, Done]) -> None:
    """Sampled once more from the checkpoint, by the commands' own model, and compared with numpy."""
    chosen = evenly_chosen(read_prompt_set("builtin:shapes-benchmark"), PROMPTS).texts
    features = []
    for reference, count, many in (("runs/on", 2, None), ("shapes-4step", 1, TEACHER_STEPS)):
        last = "last" if reference == "runs/on" else None
        model = open_model(resolve(reference, Path("runs"), last), CPU, torch.float32)
        plan = model.plan(many)
        cond, empty = encode(model, chosen, plan)
        keys = [(i, j) for i in range(PROMPTS) for j in range(count)]
        images = paint(model, plan, cond, empty, keys, shape=(8, 8, 8), seed=0)
        features.append(shapes_clip.load_held_out(CPU).scorer.image_features(images).double())
    own, teacher = features
    pairs = own.view(PROMPTS, 2, -1)
    diversity = float((1 - (pairs[:, 0] * pairs[:, 1]).sum(-1)).mean())
    gap = (own.mean(0) - teacher.mean(0)).square().sum()
    cov = [torch.cov(part.T) for part in features]
    cross = torch.linalg.eigvals(cov[0] @ cov[1]).real.clamp(min=0).sqrt().sum()
    frechet = float(gap + cov[0].trace() + cov[1].trace() - 2 * cross)
    last = rows("on")[-1]
    assert last["watch/diversity"] == pytest.approx(diversity, abs=1e-4)
    assert last["watch/frechet"] == pytest.approx(frechet, abs=1e-3)
