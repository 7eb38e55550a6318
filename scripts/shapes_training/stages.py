"""The stages of `scripts/train_shapes.py`, each going on from what lies in the work folder.

vae/ teacher/ clip/ clip-judge/     states of training
latents.safetensors shift.json      the teacher's pictures, encoded by the VAE, and their shift and scale
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import multiprocessing as mp

from rtdmd_cli.engine.evaluation.shapes import judge_pictures
from rtdmd_cli.engine.judges.geneval import task_scores
from rtdmd_cli.engine.storage.files import (
    make_folder,
    replace_folder,
    tmp_path,
    write_json,
    write_text,
    write_with,
)
from rtdmd_cli.errors import DataError, UsageError
from rtdmd_cli.shapes.grammar import scene_for
from rtdmd_cli.shapes.prompts import benchmark
from rtdmd_cli.shapes.render import render
from scripts.shapes_training import clip, teacher, vae

PACKAGE_FOLDER = Path(__file__).resolve().parents[2] / "rtdmd_cli/shapes/weights"
MOST_BYTES = 12_000_000
"""Most that all packaged models together may take."""
LATENTS_SEED = 10
"""What is added to the command's seed for the pictures that the teacher sees."""
FOLLOW_UP = """The teacher's figures, once the models are packaged:
  rtdmd eval shapes --from shapes-4step --json                           its 50 steps with guidance
  rtdmd eval shapes --from shapes-4step --steps 4 --guidance 1 --json    4 evaluations
  rtdmd eval shapes --from shapes-4step --steps 2 --json                 4 evaluations, with guidance"""


@dataclass(frozen=True)
class Settings:
    """What a training is made of. Steps are the optimiser's, batches pictures (for clip: pairs of them)."""

    work: Path
    seed: int = 1
    device: torch.device = torch.device("cpu")
    processes: int = 1
    vae_steps: int = 2400
    vae_pictures: int = 60_000
    vae_batch: int = 64
    teacher_steps: int = 7_500
    teacher_pictures: int = 150_000
    teacher_batch: int = 128
    teacher_lr: float = 2e-3
    clip_steps: int = 4000
    clip_pairs: int = 40_000
    clip_batch: int = 128
    save_every: int = 500
    out: Path = PACKAGE_FOLDER


def check_settings(settings: Settings) -> None:
    """Refuse to mix two trainings in one work folder.

    Raises:
        UsageError: the folder was begun with another seed or other data.
    """
    kept = ("seed", "vae_pictures", "teacher_pictures", "clip_pairs")
    asked = {name: value for name, value in asdict(settings).items() if name in kept}
    path = settings.work / "settings.json"
    if not path.exists():
        write_json(path, asked)
    begun = json.loads(path.read_text())
    if begun != asked:
        raise UsageError(f"{settings.work} was begun with {begun}, not {asked}.", "Choose another --work.")


def train_vae(settings: Settings) -> None:
    """Train the VAE, and print what the detector reads in rendered pictures and in its reconstructions."""
    s = settings
    vae.train(
        s.work / "vae",
        s.device,
        s.seed,
        s.vae_steps,
        s.vae_batch,
        count=s.vae_pictures,
        save_every=s.save_every,
    )
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(np.stack([render(scene_for(caption, rng)) for caption in benchmark()]))
    print_figures("detector on rendered pictures", detector_scores(pictures))
    print_figures(
        "detector on the VAE's reconstructions",
        detector_scores(reconstruct(vae.load(s.work / "vae"), pictures)),
    )


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [B,3,32,32] in 0..1 through the VAE's mean and back, on the CPU."""
    parts = [model.decode(model.encode(part * 2 - 1).latent_dist.mean).sample for part in pictures.split(128)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def detector_scores(pictures: Tensor) -> dict[str, float | None]:
    """Strict accuracy of pictures [553,3,32,32] of the benchmark's prompts, task by task and in all."""
    verdicts = judge_pictures(pictures.numpy(), benchmark())
    result = task_scores(
        {"tag": c.task, "correct": v.correct} for c, v in zip(benchmark(), verdicts, strict=True)
    )
    return result.tasks | {"overall": result.overall}


def print_figures(title: str, figures: dict[str, float] | dict[str, float | None]) -> None:
    """One line on stdout."""
    print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)


def train_teacher(settings: Settings) -> None:
    """Encode the teacher's pictures unless that is done, and train it, on a CPU in several processes."""
    _encode_pictures(settings)
    if settings.processes == 1 or settings.device.type != "cpu":
        _train_teacher(settings)
        return
    make_folder(settings.work)
    meeting = tmp_path(settings.work / "meeting")
    threads = max(torch.get_num_threads() // settings.processes, 1)
    try:
        mp.start_processes(
            _teacher_process,
            (settings, meeting, threads),
            nprocs=settings.processes,
            start_method="forkserver",
        )
    finally:
        meeting.unlink(missing_ok=True)


def _teacher_process(rank: int, settings: Settings, meeting: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{meeting.resolve()}", rank=rank, world_size=settings.processes)
    _train_teacher(settings)
    dist.barrier()
    dist.destroy_process_group()


def _train_teacher(settings: Settings) -> None:
    s = settings
    data = _read_latents(s)
    folder, steps = s.work / "teacher", s.teacher_steps
    teacher.train(
        folder, data, s.device, s.seed, steps, s.teacher_batch, s.teacher_lr, save_every=s.save_every
    )


def _encode_pictures(settings: Settings) -> None:
    """Fill latents.safetensors and shift.json, unless they are there, complete and younger than the VAE."""
    latents, shift = settings.work / "latents.safetensors", settings.work / "shift.json"
    trained = settings.work / "vae/step.json"
    model = vae.load(settings.work / "vae").to(device=settings.device, memory_format=torch.channels_last)
    if latents.exists() and shift.exists() and latents.stat().st_mtime >= trained.stat().st_mtime:
        with safe_open(latents, "pt") as file:
            if file.get_slice("x").get_shape()[0] == settings.teacher_pictures:
                return
    shift.unlink(missing_ok=True)
    seed = settings.seed + LATENTS_SEED
    data, *shift_and_scale = teacher.make_latents(model, settings.teacher_pictures, seed, settings.device)
    tensors = {
        "x": data.x,
        "clip_ids": data.clip_ids,
        "t5_ids": data.t5_ids,
        "bc": data.blank_clip,
        "bt": data.blank_t5,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_with(latents, lambda path: save_file(tensors, path))
    write_text(shift, json.dumps(shift_and_scale))


def _read_latents(settings: Settings) -> teacher.Latents:
    read = load_file(settings.work / "latents.safetensors", device=str(settings.device))
    return teacher.Latents(read["x"], read["clip_ids"], read["t5_ids"], read["bc"], read["bt"])


def train_clip(settings: Settings, name: str) -> None:
    """Train "clip" or "clip-judge", and print how often they prefer a held-out caption to an edited one."""
    s = settings
    model = clip.train(
        s.work / name,
        s.device,
        s.seed + clip.SEED_OFFSETS[name],
        s.clip_steps,
        clip.AUGMENTATIONS[name],
        pairs=s.clip_pairs,
        batch=s.clip_batch,
        save_every=s.save_every,
    )
    print_figures(f"{name} on held-out captions", clip.accuracies(model, seed=1))


def package(settings: Settings) -> None:
    """Write the pipeline and both CLIPs, as they stand in the work folder, to `out` in float16.

    Raises:
        DataError: a model is missing, or all take more than 12,000,000 bytes; `out` is then as before.
    """
    trained, step = teacher.load(settings.work / "teacher")
    clips = {name: clip.load(settings.work / name) for name in clip.AUGMENTATIONS}
    shift, scale = json.loads((settings.work / "shift.json").read_text())
    pipeline = teacher.to_pipeline(trained, vae.load(settings.work / "vae"), shift, scale)
    make_folder(settings.out)
    fresh = tmp_path(settings.out)
    try:
        pipeline.to(torch.float16).save_pretrained(fresh / "sd3")
        for name, (model, _) in clips.items():
            clip.save(model, fresh / name)
        sizes = {folder.name: _size(folder) for folder in sorted(fresh.iterdir())}
        total = sum(sizes.values())
        if total > MOST_BYTES:
            raise DataError(f"The models take {total:,} bytes, more than {MOST_BYTES:,}: {sizes}.", "")
        for name in sizes:
            replace_folder(fresh / name, settings.out / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    steps = {"teacher": step} | {name: state for name, (_, state) in clips.items()}
    print(f"packaged in {settings.out}: {total:,} bytes, {sizes}; steps {steps}\n{FOLLOW_UP}", flush=True)


def _size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


STAGES: dict[str, Callable[[Settings], None]] = {
    "vae": train_vae,
    "teacher": train_teacher,
    "clip": lambda settings: train_clip(settings, "clip"),
    "clip-judge": lambda settings: train_clip(settings, "clip-judge"),
    "package": package,
}
"""In the order in which they build on each other."""
