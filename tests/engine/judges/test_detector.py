"""GenEval's detector and colours on random models of the published layout, against numpy and transformers themselves."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from rtdmd_cli.engine.judges import detector
from rtdmd_cli.engine.judges.colours import COLOURS, ColourNamer, cut_out
from rtdmd_cli.engine.judges.detector import CLASSES, Found, ObjectDetector
from rtdmd_cli.engine.judges.geneval import Detection
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_geneval import LIKELY, load_real, save_clip, save_detector

SHORT, LONG = 96, 160  # px, in place of 800 and 1333
THRESHOLDS = [0.3, 0.1, 0.3, 0.45]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "SHORT", SHORT)
    monkeypatch.setattr(detector, "LONG", LONG)


def pictures(count: int, height: int, width: int) -> Tensor:
    """Smooth random pictures in 8 bits."""
    rng = torch.Generator().manual_seed(height * width)
    rough = torch.rand(count, 3, 8, 10, generator=rng)
    smooth = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def resized(x: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Bilinear without antialiasing, by the positions of the pixels' centres: [...,H,W] -> [...,height,width]."""

    def along(x: NDArray[Any], size: int) -> NDArray[Any]:
        old = x.shape[-1]
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        share = at - low
        return x[..., low] * (1 - share) + x[..., np.minimum(low + 1, old - 1)] * share

    return np.swapaxes(along(np.swapaxes(along(x, width), -1, -2), height), -1, -2)


def expected(model: Any, image: Tensor, threshold: float) -> list[tuple[str, tuple[int, ...], float]]:
    """Label, box and score of every object, from transformers' own class and plain numpy, in float64."""
    height, width = image.shape[-2:]
    factor = min(SHORT / min(height, width), LONG / max(height, width))
    inner = (round(height * factor), round(width * factor))
    outer = tuple(-(-edge // 32) * 32 for edge in inner)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = np.zeros((3, *outer))
    content = resized(image.double().numpy(), *inner)
    pixels[:, : inner[0], : inner[1]] = (content - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        out: Any = model(pixel_values=torch.from_numpy(pixels[None]).float())
    logits = out.class_queries_logits[0].double().numpy()
    odds = np.exp(logits - logits.max(1, keepdims=True))
    classes = (odds / odds.sum(1, keepdims=True))[:, :-1]
    found = []
    for query, mask in enumerate(out.masks_queries_logits[0].double().numpy()):
        large = resized(mask, *outer)[: inner[0], : inner[1]]
        final = resized(large, height, width)
        if not (final > 0).any():
            continue
        inside = 1 / (1 + np.exp(-final[final > 0]))
        rows, columns = np.nonzero(final > 0)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        for label in range(80):
            score = classes[query, label] * inside.sum() / len(inside)
            if score > threshold:
                found.append((CLASSES[label], tuple(int(edge) for edge in box), float(score)))
    return sorted(found, key=lambda each: -each[2])


@pytest.mark.parametrize("size", [(64, 80), (60, 45), (96, 200), (192, 192)])
def test_objects_are_those_of_the_published_steps(
    published: Path, small: None, size: tuple[int, int]
) -> None:
    """Wide, tall, reduced and limited by the longer edge; more pictures than a batch of the network."""
    images = pictures(5, *size)
    thresholds = [*THRESHOLDS, 0.3]
    found = ObjectDetector.load(published, "cpu").detect(images, thresholds)
    real, total = load_real(published), 0
    for image, threshold, ours in zip(images, thresholds, found, strict=True):
        theirs = expected(real, image, threshold)
        assert len(ours) == len(theirs)
        total += len(ours)
        for each, (label, box, score) in zip(ours, theirs, strict=True):
            assert each.detection.score == pytest.approx(score, abs=2e-5)
            assert (each.detection.label, each.detection.box) == (label, box)
            assert each.mask.shape == size and each.detection.color is None
            ys, xs = each.mask.nonzero(as_tuple=True)
            assert (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) == box
    assert total > 20
    assert {each.detection.label for row in found for each in row} & set(LIKELY.values())


def test_a_picture_does_not_depend_on_its_batch(published: Path, small: None) -> None:
    loaded, images = ObjectDetector.load(published, "cpu"), pictures(5, 48, 64)
    together = loaded.detect(images, [0.2] * 5)
    for image, found in zip(images, together, strict=True):
        (alone,) = loaded.detect(image[None], [0.2])
        assert [f.detection.label for f in alone] == [f.detection.label for f in found]


@pytest.mark.parametrize(
    ("size", "inner", "outer"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((1000, 500), (1333, 667), (1344, 672)),
    ],
)
def test_the_size_is_genevals(
    published: Path, size: tuple[int, int], inner: tuple[int, int], outer: tuple[int, int]
) -> None:
    """Shorter edge 800, longer one at most 1333, padded with zeros to a multiple of 32 at right and bottom."""
    pixels, content = ObjectDetector.load(published, "cpu").preprocess(torch.ones(1, 3, *size))
    assert (tuple(pixels.shape[-2:]), content) == (outer, inner)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, inner[0] - 1, inner[1] - 1], white)
    assert pixels[..., inner[0] :, :].abs().sum() + pixels[..., inner[1] :].abs().sum() == 0


def test_preprocessing_agrees_with_transformers(published: Path) -> None:
    """A square picture that is enlarged, where PIL's filter and plain bilinear are the same but for 8-bit rounding."""
    images = pictures(1, 400, 400)
    array = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    theirs = Mask2FormerImageProcessorPil.from_pretrained(published)(
        Image.fromarray(array), size={"shortest_edge": 800, "longest_edge": 1333}, return_tensors="pt"
    )["pixel_values"]
    ours, _ = ObjectDetector.load(published, "cpu").preprocess(images)
    assert (ours - theirs).abs().max() < 0.02


def hand_made(scores: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """Probabilities and sure masks of one pixel: query i is of class and probability scores[i], at column i."""
    probabilities, masks = torch.zeros(len(scores), 80), torch.full((len(scores), 4, 40), -50.0)
    for query, (label, probability) in enumerate(scores):
        probabilities[query, label] = probability
        masks[query, 1, query] = 50.0
    return probabilities, masks


def select(scores: list[tuple[int, float]], threshold: float) -> list[Detection]:
    probabilities, masks = hand_made(scores)
    found = detector._select(probabilities, masks, ((4, 40),) * 3, threshold)
    return [each.detection for each in found]


def test_at_most_sixteen_of_a_class_the_most_confident() -> None:
    scores = [(0, 0.4 + 0.01 * i) for i in range(20)] + [(5, 0.35), (5, 0.9)]
    found = select(scores, 0.3)
    people = [d for d in found if d.label == "person"]
    assert [d.box[0] for d in people] == list(range(19, 3, -1))
    assert [d.label for d in found if d.label != "person"] == ["bus", "bus"]
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)


def test_a_score_has_to_exceed_the_threshold_and_empty_masks_are_nothing() -> None:
    assert [d.label for d in select([(0, 0.5), (1, 0.49), (2, 0.51)], 0.5)] == ["car"]
    probabilities, _ = hand_made([(0, 0.9)])
    assert detector._select(probabilities, torch.full((1, 4, 40), -1.0), ((4, 40),) * 3, 0.0) == []


def test_overlapping_objects_are_all_kept() -> None:
    probabilities, masks = hand_made([(0, 0.9), (0, 0.8)])
    found = detector._select(probabilities, masks[:1].repeat(2, 1, 1), ((4, 40),) * 3, 0.3)
    assert [f.detection.box for f in found] == [(0, 1, 1, 2)] * 2


def test_classes_are_spelt_as_in_geneval() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    parents = Path(__file__).resolve().parents
    paths = [parent / "shared/data/benchmarks/geneval.jsonl" for parent in parents]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        pytest.skip("GenEval's prompts are not on this machine")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    clauses = [clause for line in lines for clause in line["include"] + line.get("exclude", [])]
    assert {clause["class"] for clause in clauses} == set(CLASSES)
    assert {clause["color"] for clause in clauses if "color" in clause} == set(COLOURS)


@pytest.fixture
def broken(published: Path, tmp_path: Path) -> Path:
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(DataError, match="not a complete Mask2Former") as caught:
        ObjectDetector.load(broken, "cpu")
    assert detector.MODEL in caught.value.hint


def test_damaged_and_foreign_weights(broken: Path) -> None:
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        ObjectDetector.load(broken, "cpu")
    kept = {key: value for key, value in tensors.items() if key != "class_predictor.bias"}
    for changed, message in (
        (kept, "lack or do not fit class_predictor.bias"),
        ({**tensors, "class_predictor.bias": torch.zeros(5)}, "lack or do not fit class_predictor.bias"),
        ({**tensors, "head.weight": torch.zeros(2)}, "unexpected head.weight"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(DataError, match=message):
            ObjectDetector.load(broken, "cpu")


def test_another_order_of_classes_and_other_preprocessing_are_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["id2label"]["15"] = "dog"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="Class 15 of .* is 'dog'; in COCO it is 'cat'"):
        ObjectDetector.load(broken, "cpu")
    config["id2label"]["15"] = "cat"
    (broken / "config.json").write_text(json.dumps(config))
    settings = json.loads((broken / "preprocessor_config.json").read_text())
    (broken / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    with pytest.raises(DataError, match="normalise"):
        ObjectDetector.load(broken, "cpu")


def test_neither_folder_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither a folder nor a hub id"):
        ObjectDetector.load("./no/such/folder", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match="rtdmd-tests/no-such-detector can't be loaded"):
        ObjectDetector.load("rtdmd-tests/no-such-detector", "cpu")


def cut(image: Tensor, found: Found) -> Image.Image:
    """The authors' crop with PIL: the picture over #999 by the mask, then the box."""
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    blank = Image.new("RGB", picture.size, "#999")
    return Image.composite(picture, blank, Image.fromarray(found.mask.numpy())).crop(
        tuple(round(edge) for edge in found.detection.box)
    )


def test_colours_are_zero_shot_clip_on_the_cut_out_objects(published: Path, clip: Path, small: None) -> None:
    """Against transformers' processor and forward pass, texts and pictures one by one."""
    image = pictures(1, 64, 80)[0]
    (found,) = ObjectDetector.load(published, "cpu").detect(image[None], [0.1])
    assert len(found) > 16  # more than a batch
    names = ColourNamer.load(clip, "cpu").name(image, found)
    model: Any = CLIPModel.from_pretrained(clip)
    tokenizer, processor = CLIPTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)

    @functools.cache
    def text(words: str) -> Tensor:
        feature = model.get_text_features(**tokenizer([words], return_tensors="pt")).pooler_output[0]
        unit: Tensor = feature / feature.norm()
        return unit

    compared = 0
    for each, name in zip(found, names, strict=True):
        label = each.detection.label
        with torch.no_grad():
            rows = []
            for colour in COLOURS:
                words = [f"a photo of a {colour} {label}", f"a photo of a {colour}-colored {label}"]
                mean = sum((text(w) for w in [*words, f"a photo of a {colour} object"]), torch.zeros(24))
                rows.append(mean / mean.norm())
            pixels = processor(cut(image, each), return_tensors="pt")
            logits = torch.stack(rows) @ model.get_image_features(**pixels).pooler_output[0]
        best = logits.sort(descending=True)
        if best.values[0] - best.values[1] > 0.02 * logits.std():  # PIL rounds to 8 bits
            assert name == COLOURS[int(best.indices[0])]
            compared += 1
    assert compared > 0.7 * len(found) and len(set(names)) > 1


def test_no_object_has_no_colour(clip: Path) -> None:
    assert ColourNamer.load(clip, "cpu").name(torch.zeros(3, 8, 8), []) == []


def test_the_cut_is_grey_outside_of_the_mask() -> None:
    image, mask = pictures(1, 20, 30)[0], torch.zeros(20, 30, dtype=torch.bool)
    mask[3:9, 5:7], mask[8, 5:25] = True, True
    found = Found(Detection("cow", (5, 3, 25, 9), 0.9), mask)
    ours = (cut_out(image, found) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(ours, np.asarray(cut(image, found)))
    assert tuple(ours[0, 10]) == (0x99,) * 3
