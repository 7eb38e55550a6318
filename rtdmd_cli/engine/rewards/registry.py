"""The table of rewards. Each row's loader imports its module only when it is called."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from rtdmd_cli.engine.rewards.base import Need, Reward, RewardEntry
from rtdmd_cli.engine.rewards.user import user_entry
from rtdmd_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

REWARDS: dict[str, RewardEntry] = {}

# The CLIP family ----------------------------------------------------------------------------------------------


def _pickscore(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards import pickscore

    return pickscore.load(device, path)


def _clipscore(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards import clipscore

    return clipscore.load(device, path)


def _hpsv2(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards import hpsv2

    return hpsv2.load(device, path)


def _aesthetic(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards import aesthetic

    return aesthetic.load(device, path)


def _shapes_clip(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards import shapes_clip

    return shapes_clip.load(device, path)


def _shapes_clip_held_out(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards import shapes_clip

    return shapes_clip.load_held_out(device, path)


_CLIP_PROCESSOR = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "preprocessor_config.json",
)
_CLIP = ("config.json", "model.safetensors", *_CLIP_PROCESSOR)
_VIT_H = Need("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", _CLIP_PROCESSOR, 3_600_000, "MIT")
_VIT_L = Need("openai/clip-vit-large-patch14", _CLIP, 1_714_100_000, "MIT")
_SHAPES_SIZE = 593_050

REWARDS |= {
    entry.name: entry
    for entry in (
        RewardEntry(
            name="pickscore",
            measures="Which picture of a prompt people choose, learned from the Pick-a-Pic choices.",
            low=16.0,
            high=24.0,
            differentiable=True,
            needs=(
                Need(
                    "yuvalkirstain/PickScore_v1",
                    ("config.json", "model.safetensors"),
                    3_944_500_000,
                    "none stated",
                ),
                _VIT_H,
            ),
            load=_pickscore,
            divisor=26.0,
        ),
        RewardEntry(
            name="clipscore",
            measures="How well the picture fits the prompt: the cosine of OpenAI's CLIP ViT-L/14.",
            low=0.2,
            high=0.35,
            differentiable=True,
            needs=(_VIT_L,),
            load=_clipscore,
        ),
        RewardEntry(
            name="hpsv2",
            measures="Which picture of a prompt people prefer, learned from the rankings of HPD v2 (HPS v2.1).",
            low=0.2,
            high=0.36,
            differentiable=True,
            needs=(Need("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), 1_972_400_000, "Apache-2.0"), _VIT_H),
            load=_hpsv2,
        ),
        RewardEntry(
            name="aesthetic",
            measures="How much people like the look of the picture, whatever the prompt, on a scale of 1 to 10.",
            low=4.0,
            high=7.0,
            differentiable=True,
            needs=(
                Need(
                    "camenduru/improved-aesthetic-predictor",
                    ("sac+logos+ava1-l14-linearMSE.pth",),
                    3_714_000,
                    "Apache-2.0",
                ),
                _VIT_L,
            ),
            load=_aesthetic,
        ),
        RewardEntry(
            name="shapes-clip",
            measures="How well a picture of the shapes world fits its caption: the cosine of the built-in CLIP.",
            low=0.1,
            high=0.85,
            differentiable=True,
            needs=(Need("", ("shapes/weights/clip/*",), _SHAPES_SIZE, "Apache-2.0"),),
            load=_shapes_clip,
        ),
        RewardEntry(
            name="shapes-clip-heldout",
            measures="The same by a second built-in CLIP, trained apart: it judges and should not be trained on.",
            low=0.1,
            high=0.85,
            differentiable=True,
            needs=(Need("", ("shapes/weights/clip-judge/*",), _SHAPES_SIZE, "Apache-2.0"),),
            load=_shapes_clip_held_out,
        ),
    )
}


# Models that read the prompt while they look at the picture ------------------------------------------------------


def _imagereward(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.imagereward import ImageReward

    return ImageReward.load(device, path)


def _hpsv3(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.hpsv3 import HpsV3

    return HpsV3.load(device, path)


def _vqascore(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.vqascore import VqaScore

    return VqaScore.load(device, path)


def _geneval2(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.geneval2 import GenEval2

    return GenEval2.load(device, path)


_QWEN_INPUTS = ("*.json", "*.jinja", "merges.txt")
_QWEN3 = Need("Qwen/Qwen3-VL-8B-Instruct", ("*.safetensors", *_QWEN_INPUTS), 17_546_000_000, "Apache-2.0")

REWARDS |= {
    entry.name: entry
    for entry in (
        RewardEntry(
            name="imagereward",
            measures="Which picture of a prompt people prefer (ImageReward v1.0); 0 is the average of its training.",
            low=-2.0,
            high=2.0,
            differentiable=True,
            needs=(
                Need("THUDM/ImageReward", ("ImageReward.pt", "med_config.json"), 1_790_000_000, "Apache-2.0"),
                Need("google-bert/bert-base-uncased", ("vocab.txt",), 231_508, "Apache-2.0"),
            ),
            load=_imagereward,
        ),
        RewardEntry(
            name="hpsv3",
            measures="How people rate the picture for its prompt: HPSv3, a fine-tuned Qwen2-VL-7B.",
            low=0.0,
            high=16.0,
            differentiable=True,
            needs=(
                Need("MizzenAI/HPSv3", ("HPSv3.safetensors",), 16_592_000_000, "Apache-2.0"),
                Need("Qwen/Qwen2-VL-7B-Instruct", _QWEN_INPUTS, 11_500_000, "Apache-2.0"),
            ),
            load=_hpsv3,
        ),
        RewardEntry(
            name="vqascore",
            measures="Whether the picture shows its prompt: the probability of Qwen3-VL-8B's Yes.",
            low=0.0,
            high=1.0,
            differentiable=True,
            needs=(_QWEN3,),
            load=_vqascore,
        ),
        RewardEntry(
            name="geneval2",
            measures="Whether Qwen3-VL-8B sees each thing of a GenEval2 prompt: Soft-TIFA, the geometric mean.",
            low=0.0,
            high=1.0,
            differentiable=False,
            needs=(_QWEN3,),
            load=_geneval2,
            metadata="vqa_list",
        ),
    )
}


# Rules on what a detector or a reader finds -------------------------------------------------------------------


def _geneval(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.geneval import GenEval

    return GenEval.load(device, path)


def _geneval_soft(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.geneval import GenEval

    return GenEval.load(device, path, soft=True)


def _shapes_geneval(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.shapes import ShapesGenEval

    return ShapesGenEval.load(device, path)


def _shapes_geneval_soft(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.shapes import ShapesGenEval

    return ShapesGenEval.load(device, path, soft=True)


def _ocr(device: torch.device, path: str | None) -> Reward:
    from rtdmd_cli.engine.rewards.ocr import OcrReward

    return OcrReward.load(device, path)


_GENEVAL_NEEDS = (
    Need(
        "facebook/mask2former-swin-small-coco-instance",
        ("config.json", "model.safetensors", "preprocessor_config.json"),
        276_700_000,
        "CC BY-NC 4.0",
    ),
    Need(
        "openai/clip-vit-large-patch14",
        (
            "config.json",
            "model.safetensors",
            "tokenizer*",
            "vocab.json",
            "merges.txt",
            "preprocessor_config.json",
        ),
        1_714_100_000,
        "MIT",
    ),
)
_RULES = (
    RewardEntry(
        name="geneval",
        measures="Whether the picture shows the objects, numbers, colours and places of its GenEval line: 1 or 0.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=_GENEVAL_NEEDS,
        load=_geneval,
        metadata="include",
    ),
    RewardEntry(
        name="geneval-soft",
        measures="GenEval with partial credit for each thing that is right: for training, not for reports.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=_GENEVAL_NEEDS,
        load=_geneval_soft,
        metadata="include",
    ),
    RewardEntry(
        name="shapes-geneval",
        measures="Whether a picture of the shapes world shows its caption: 1 or 0.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=(),
        load=_shapes_geneval,
    ),
    RewardEntry(
        name="shapes-geneval-soft",
        measures="How much of its caption a picture of the shapes world shows: partial credit, as geneval-soft.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=(),
        load=_shapes_geneval_soft,
    ),
    RewardEntry(
        name="ocr",
        measures="How much of the quoted text of the prompt can be read in the picture.",
        low=0.0,
        high=1.0,
        differentiable=False,
        needs=(Need("", ("rapidocr/models/*.onnx",), 31_750_000, "Apache-2.0"),),
        load=_ocr,
        extra="ocr",
    ),
)
REWARDS |= {entry.name: entry for entry in _RULES}


def find_reward(name: str) -> RewardEntry:
    """The row of that name, or of the user's own reward `module:Class`. UsageError, with the nearest name, for none."""
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return user_entry(name)
    near = get_close_matches(name, REWARDS, n=1)
    raise UsageError(
        f"There is no reward `{name}`.",
        f"Did you mean `{near[0]}`?" if near else "List them: rtdmd rewards list",
    )
