"""The object detector of GenEval: Mask2Former with a Swin-S backbone, trained on COCO.

The steps follow the authors' `evaluate_images.py` and the library it calls (mmdet 2): shorter edge to 800 px, boxes
around the masks, score = class probability * mean mask probability, no suppression of overlaps.
GenEval's authors use mmdet's checkpoint; this one was published by the authors of Mask2Former for the same network and
data, so that scores agree closely but not picture by picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerModel
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from rtdmd_cli.engine.compute.quiet import quiet_loading
from rtdmd_cli.engine.judges.features import HUB_ID
from rtdmd_cli.engine.judges.geneval import Detection
from rtdmd_cli.engine.judges.vocabulary import CLASSES
from rtdmd_cli.errors import DataError, EnvironmentFailure

MODEL = "facebook/mask2former-swin-small-coco-instance"
THRESHOLD = 0.3
"""Score above which a detection counts."""
COUNTING_THRESHOLD = 0.9
"""The same for the counting task."""
MOST_PER_CLASS = 16
SHORT, LONG = 800, 1333  # px: the shorter edge is brought to SHORT, unless the longer one would pass LONG
STRIDE = 32  # px; the network's input is a multiple of it
MOST_PER_PICTURE = 100  # pairs of query and class, the most probable ones
BATCH = 4  # pictures
ANCHORS = {
    0: "person",
    11: "stop sign",
    15: "cat",
    79: "toothbrush",
}  # spelt alike in every list of COCO's names


class Segmenter(Mask2FormerPreTrainedModel):
    """transformers' Mask2FormerForUniversalSegmentation without its training loss, which needs scipy to exist."""

    _keys_to_ignore_on_load_unexpected = [
        r"^criterion\.empty_weight$",  # the loss's
        r"\.relative_position_index$",  # computed from the window size; saved by older versions
    ]
    # The published file is older than this layer of the backbone, whose output nothing reads.
    _keys_to_ignore_on_load_missing = [r"\.swin\.layernorm\.(weight|bias)$"]

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        sizes: Any = config
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(sizes.hidden_dim, sizes.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B,3,h,w] normalised -> class logits [B,Q,classes + 1], the last for nothing; mask logits [B,Q,h/4,w/4]."""
        out: Any = self.model(pixel_values=pixel_values, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), out.masks_queries_logits[-1]


@dataclass(frozen=True)
class Found:
    """A detection (without its colour) and its mask: bool [H,W], on the detector's device."""

    detection: Detection
    mask: Tensor


@dataclass(frozen=True)
class ObjectDetector:
    """A frozen Mask2Former in float32. mean, std: of the channels of its input."""

    model: Segmenter
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @classmethod
    def load(cls, source: str | Path, device: torch.device | str) -> ObjectDetector:
        """Loads config.json, model.safetensors and preprocessor_config.json from a folder or hub id.

        Mean and std come from preprocessor_config.json; the size is GenEval's, not the file's.
        Raises DataError for a folder that is missing, incomplete, damaged or holds another model, and
        EnvironmentFailure where a hub id can be had neither from the hub nor from the cache.
        """
        name, local = str(source), Path(source).is_dir()
        if not local and not re.fullmatch(HUB_ID, name):
            raise DataError(f"{name} is neither a folder nor a hub id.", "Check the path of the detector.")
        if local and not (Path(source) / "config.json").is_file():
            raise DataError(f"{name} is not a complete Mask2Former: it has no config.json.", _WANTED)
        model, info, processor = _read(name, local)
        _check(name, model, info, processor)
        model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # `to` is wrapped untyped
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        return cls(model, mean, std, torch.device(device))

    @torch.no_grad()
    def detect(self, images: Tensor, thresholds: Sequence[float]) -> list[list[Found]]:
        """What each picture shows, most confident first, at most 16 objects of a class.

        images [B,3,H,W] in 0..1; thresholds: one for each picture, in 0..1, which a score has to exceed. Boxes are
        (x0, y0, x1, y1) in px of the pictures, x1 and y1 just outside.
        """
        found: list[list[Found]] = []
        for part, limits in zip(
            images.split(BATCH), torch.tensor(list(thresholds)).split(BATCH), strict=True
        ):
            pixels, size = self.preprocess(part.to(self.device, torch.float32))
            classes, masks = self.model(pixels)
            probabilities = classes.softmax(-1)[..., :-1]
            shape = (tuple(pixels.shape[-2:]), size, tuple(part.shape[-2:]))
            for row, limit in enumerate(limits.tolist()):
                found.append(_select(probabilities[row], masks[row], shape, limit))
        return found

    def preprocess(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """images [B,3,H,W] in 0..1 -> the network's input [B,3,h,w], and the size of the pictures in its upper left."""
        height, width = images.shape[-2:]
        factor = min(SHORT / min(height, width), LONG / max(height, width))
        size = (int(height * factor + 0.5), int(width * factor + 0.5))
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = (F.interpolate(images, size, mode="bilinear") - mean) / std
        return F.pad(pixels, (0, -size[1] % STRIDE, 0, -size[0] % STRIDE)), size


_WANTED = f"Give a folder or hub id that holds what {MODEL} does."
Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _select(probabilities: Tensor, masks: Tensor, sizes: Sizes, threshold: float) -> list[Found]:
    """The objects of one picture: probabilities [Q,classes], masks [Q,h,w] as logits.

    sizes: the network's input, the picture inside it, and the picture itself, each (height, width).
    """
    kept = probabilities.flatten().topk(min(MOST_PER_PICTURE, probabilities.numel()))
    pairs = [
        divmod(pair, probabilities.shape[1])
        for pair, probability in zip(kept.indices.tolist(), kept.values.tolist(), strict=True)
        if probability > threshold  # the mask's probability only lowers the score
    ]
    found: list[Found] = []
    for query, label in pairs:
        logits = _to_picture(masks[query], sizes)
        mask = logits > 0
        area = mask.sum()
        share = (logits.sigmoid() * mask).sum() / (area + 1e-6)
        score = float(probabilities[query, label] * share)
        if score > threshold:
            found.append(Found(Detection(CLASSES[label], _box(mask), score), mask))
    found.sort(key=lambda f: -f.detection.score)
    labels = [f.detection.label for f in found]
    return [f for i, f in enumerate(found) if labels[:i].count(labels[i]) < MOST_PER_CLASS]


def _to_picture(mask: Tensor, sizes: Sizes) -> Tensor:
    """A mask's logits [h,w] at the size of the picture: up to the input, without its padding, then to the picture."""
    padded, inner, outer = sizes
    large = F.interpolate(mask[None, None], padded, mode="bilinear")[..., : inner[0], : inner[1]]
    return F.interpolate(large, outer, mode="bilinear")[0, 0]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """The box around a mask that isn't empty."""
    xs, ys = mask.any(0).nonzero(), mask.any(1).nonzero()
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


def _read(name: str, local: bool) -> tuple[Segmenter, dict[str, Any], Any]:
    """Model, report on its weights, and preprocessing."""
    try:
        with quiet_loading():
            processor = Mask2FormerImageProcessorPil.from_pretrained(name, local_files_only=local)
            loaded: Any = Segmenter.from_pretrained(
                name,
                local_files_only=local,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise DataError(f"The weights of {name} are damaged: {error}", _WANTED) from error
    except OSError as error:
        first = str(error).strip().split("\n")[0]
        if local:
            raise DataError(f"{name} is not a complete Mask2Former: {first}", _WANTED) from error
        hint = "Check the network and the name, or give a folder that holds the model."
        raise EnvironmentFailure(f"{name} can't be loaded: {first}", hint) from error
    return *loaded, processor


def _check(name: str, model: Segmenter, info: dict[str, Any], processor: Any) -> None:
    """DataError unless it is a whole Mask2Former of COCO's classes, with plain normalised RGB as its input."""
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    unexpected = sorted(info["unexpected_keys"])
    for kind, keys in (("lack or do not fit", missing), ("have the unexpected", unexpected)):
        if keys:
            raise DataError(f"The weights of {name} {kind} {keys[0]} ({len(keys)} tensors in all).", _WANTED)
    names: Any = model.config.id2label
    if len(names) != len(CLASSES):
        raise DataError(f"{name} tells {len(names)} classes apart, not COCO's {len(CLASSES)}.", _WANTED)
    wrong = [index for index, label in ANCHORS.items() if names[index] not in (label, f"LABEL_{index}")]
    if wrong:
        index = wrong[0]
        raise DataError(
            f"Class {index} of {name} is {names[index]!r}; in COCO it is {ANCHORS[index]!r}.", _WANTED
        )
    plain = processor.do_rescale and processor.do_normalize
    if not plain or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise DataError(f"The preprocessing of {name} is not 1/255 and normalise.", _WANTED)
