"""The aesthetic predictor against the published module, from the published file layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rtdmd_cli.engine.rewards import aesthetic
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.errors import DataError
from tests.tiny_clip import as_pil, pictures, save_clip
from tests.tiny_hub import offline_hub, publish

CPU = torch.device("cpu")


class Published(nn.Module):
    """The author's module: its positions in the Sequential are the keys of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def build() -> Published:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Published()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTDMD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_clip(tmp_path_factory.mktemp("aesthetic"), projection=768)
    torch.save(build().state_dict(), path / aesthetic.FILE)
    return path


def published(folder: Path, images: Tensor) -> Tensor:
    clip: Any = CLIPModel.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(as_pil(images), return_tensors="pt")
    with torch.no_grad():
        feature = clip.get_image_features(**pixels).pooler_output
        return build()(feature / feature.norm(dim=-1, keepdim=True))[:, 0]


@pytest.mark.parametrize(("shape", "within"), [((36, 36), 4e-6), ((64, 45), 2e-3), ((20, 33), 2e-3)])
def test_scores_are_those_of_the_published_module(
    folder: Path, shape: tuple[int, int], within: float
) -> None:
    """36 x 36 px needs no resize; otherwise the 8-bit processor rounds."""
    images = pictures(4, *shape)
    scores = aesthetic.load(CPU, str(folder)).score(images, [""] * 4, [{}] * 4)
    expected = published(folder, images)
    assert scores.shape == (4,) and scores.dtype == torch.float32 and expected.std() > 0.01
    torch.testing.assert_close(scores, expected, atol=within, rtol=0)


def test_the_prompt_is_not_read(folder: Path) -> None:
    reward, images = aesthetic.load(CPU, str(folder)), pictures(2, 36, 36)
    assert torch.equal(reward.score(images, ["a", "b"], [{}, {}]), reward.score(images, ["", ""], [{}, {}]))


def test_gradient_to_the_pixels(folder: Path) -> None:
    reward = aesthetic.load(CPU, str(folder))
    images = (0.2 + 0.6 * pictures(2, 48, 40)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, ["", ""], [{}, {}]).sum(), images)
    assert reward.differentiable and gradient.isfinite().all() and all((g != 0).any() for g in gradient)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (reward.score(images + s, ["", ""], [{}, {}]).sum() for s in (step, -step))
    assert (up - down).item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.05)


def test_from_the_hub_and_again_without_the_pickle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = offline_hub(tmp_path / "hub", monkeypatch)
    publish(root, "camenduru/improved-aesthetic-predictor", folder / aesthetic.FILE)
    clip = [file for file in folder.iterdir() if file.name != aesthetic.FILE]
    publish(root, "openai/clip-vit-large-patch14", *clip)
    images = pictures(2, 36, 36)
    expected = published(folder, images)
    for _ in range(2):
        scores = find_reward("aesthetic").load(CPU, None).score(images, ["", ""], [{}, {}])
        torch.testing.assert_close(scores, expected, atol=4e-6, rtol=0)
        for file in (root / "models--camenduru--improved-aesthetic-predictor").rglob("blobs/*"):
            file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.7.bias"), r"lack layers\.7\.bias"),
        (lambda state: state.update({"layers.1.weight": torch.zeros(1)}), r"unexpected layers\.1\.weight"),
        (lambda state: state.update({"layers.6.weight": torch.zeros(64, 16)}), r"\[64, 16\], not \[16, 64\]"),
    ],
)
def test_weights_of_another_layout_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(build().state_dict())
    change(state)
    torch.save(state, tmp_path / aesthetic.FILE)
    with pytest.raises(DataError, match=message):
        aesthetic.load(CPU, str(tmp_path))


def test_a_clip_of_another_width(tmp_path: Path) -> None:
    save_clip(tmp_path, projection=24)
    torch.save(build().state_dict(), tmp_path / aesthetic.FILE)
    with pytest.raises(DataError, match=r"width 24; the aesthetic predictor reads 768"):
        aesthetic.load(CPU, str(tmp_path))


def test_a_folder_without_the_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="linearMSE.pth don't exist"):
        aesthetic.load(CPU, str(tmp_path))
