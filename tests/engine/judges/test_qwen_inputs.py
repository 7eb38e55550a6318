"""Pixels and tokens of the Qwen-VL family against the library's own processor and a hand-written conversation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rtdmd_cli.engine.judges.qwen_inputs import Chat, find_folder, load_chat, read_preprocess
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_vlm import TEMPLATE, as_pil, picture, save_qwen3, tokenizer

PUBLISHED = {
    "Qwen3-VL-8B-Instruct": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "Qwen2-VL-7B-Instruct": {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("qwen3"))


def write_preprocessor(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("size", [(64, 64), (256, 320), (300, 200), (37, 71)])
def test_patches_are_the_processors(model: str, size: tuple[int, int], tmp_path: Path) -> None:
    write_preprocessor(tmp_path, PUBLISHED[model])
    image = picture(*size)
    patches, grid = read_preprocess(tmp_path)(image[None])
    theirs: Any = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(as_pil(image), return_tensors="pt")
    assert torch.equal(grid, theirs.image_grid_thw)
    level = 1 / 255 / min(PUBLISHED[model]["image_std"])  # type: ignore[call-overload]
    difference = (patches - theirs.pixel_values).abs()
    resized = size not in ((256, 320),) or model.startswith("Qwen2")
    assert difference.max() < (
        1.1 * level if resized else 1e-6
    )  # theirs is rounded to 8 bits after each axis
    assert difference.mean() < 0.4 * level


def test_a_batch_is_preprocessed_as_its_pictures(folder: Path) -> None:
    preprocess = read_preprocess(folder)
    images = torch.stack([picture(24, 30, seed) for seed in range(3)])
    patches, grid = preprocess(images)
    singles = [preprocess(image[None]) for image in images]
    assert torch.equal(patches, torch.cat([single for single, _ in singles]))
    assert (
        torch.equal(grid, torch.cat([single for _, single in singles])) and grid.tolist() == [[1, 6, 8]] * 3
    )


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"resample": 2}, {"rescale_factor": 0.5}])
def test_other_preprocessing_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    write_preprocessor(tmp_path, PUBLISHED["Qwen3-VL-8B-Instruct"] | change)
    with pytest.raises(DataError, match="is not Qwen-VL's"):
        read_preprocess(tmp_path)


def test_tokens_are_those_of_the_whole_conversation(folder: Path) -> None:
    own: Any = Qwen2Tokenizer.from_pretrained(folder)
    chat = load_chat(folder, own.convert_tokens_to_ids("<|image_pad|>"))
    text = "Is the red circle in the image?\n\n"
    head, tail = chat.tokens(text, 3)
    whole = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        f"{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert head + tail == own(whole).input_ids
    assert head[-3:] == 3 * own.convert_tokens_to_ids(["<|image_pad|>"]) and tail[0] != head[-1]


def test_a_prompt_with_the_mark_of_a_picture_is_refused() -> None:
    made = tokenizer()
    chat = Chat(made, TEMPLATE, made.convert_tokens_to_ids("<|image_pad|>"))
    with pytest.raises(DataError, match="image_pad"):
        chat.tokens("a <|image_pad|> circle", 2)


def test_first_tokens_count_once() -> None:
    made = tokenizer()
    chat = Chat(made, TEMPLATE, 0)
    space, one = made.convert_tokens_to_ids(["Ġ", "1"])
    assert chat.first_tokens([" 1", "1", " 2", "1"]) == sorted([space, one])


def test_the_template_file_comes_before_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    made: Any = Qwen2Tokenizer.from_pretrained(copy)
    made.chat_template = "of the tokenizer"
    made.save_pretrained(copy)
    token = made.convert_tokens_to_ids("<|image_pad|>")
    jinja = copy / "chat_template.jinja"
    jinja.unlink(missing_ok=True)
    assert load_chat(copy, token).template == TEMPLATE  # of chat_template.json
    jinja.write_text("of the newer file")
    assert load_chat(copy, token).template == "of the newer file"


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    assert find_folder(str(folder), (), "qwen3_vl") == folder
    with pytest.raises(DataError, match="is a qwen3_vl, not a qwen2_vl"):
        find_folder(str(folder), (), "qwen2_vl")
    for missing, message in (
        ("config.json", r"lacks config\.json"),
        ("preprocessor_config.json", "lacks preprocessor"),
        ("tokenizer.json", r"lacks tokenizer\.json or vocab\.json"),
    ):
        copy = shutil.copytree(folder, tmp_path / missing)
        (copy / missing).unlink()
        with pytest.raises(DataError, match=message):
            find_folder(str(copy), (), "qwen3_vl")
    (folder_with_text := shutil.copytree(folder, tmp_path / "text") / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json can't be read"):
        find_folder(str(folder_with_text.parent), (), "qwen3_vl")


def test_chats_that_are_incomplete(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(DataError, match="no token 100000"):
        load_chat(copy, 100000)
    (copy / "chat_template.json").unlink()
    with pytest.raises(DataError, match="no chat template"):
        load_chat(copy, tokenizer().convert_tokens_to_ids("<|image_pad|>"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer in .* can't be loaded"):
        load_chat(copy, 1)


def test_what_the_hub_cannot_deliver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match=r"config\.json of owner/name is not in the local cache"):
        find_folder("owner/name", ("*.json",), "qwen3_vl")
    with pytest.raises(DataError, match="neither a folder nor a hub id"):
        find_folder(str(tmp_path / "no" / "folder"), ("*.json",), "qwen3_vl")
