"""VQAScore and GenEval2 on a tiny Qwen3-VL, against the published way: the library's processor and `generate`."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rtdmd_cli.engine.rewards.geneval2 import GenEval2
from rtdmd_cli.engine.rewards.registry import find_reward
from rtdmd_cli.engine.rewards.vqascore import VqaScore
from rtdmd_cli.errors import DataError, EnvironmentFailure
from tests.tiny_hub import offline_hub, publish
from tests.tiny_vlm import as_pil, picture, save_qwen3

CPU = torch.device("cpu")
YES = ("Yes", "yes", " Yes", " yes")
TWO = ("two", "Two", " two", " Two", "2", " 2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def vqascore(folder: Path) -> VqaScore:
    return VqaScore.load(CPU, str(folder))


def published(folder: Path, image: Tensor, text: str, answers: Sequence[str]) -> float:
    """Sum over the spellings of the probability of their first token, after one generated token."""
    tokenizer: Any = Qwen2Tokenizer.from_pretrained(folder)
    processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    seen = processor(as_pil(image), return_tensors="pt")
    marks = "<|image_pad|>" * (int(seen.image_grid_thw.prod()) // 4)
    asked = tokenizer(
        f"<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n",
        return_tensors="pt",
    )
    output = model.generate(
        **asked,
        **seen,
        mm_token_type_ids=(asked.input_ids == model.config.image_token_id).int(),
        max_new_tokens=1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    probabilities = output.scores[0].softmax(-1)[0]
    return sum(float(probabilities[tokenizer.encode(answer)[0]]) for answer in answers)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_vqascore_is_the_published_one(size: tuple[int, int], folder: Path, vqascore: VqaScore) -> None:
    image, prompt = picture(*size), 'a "red" circle'
    text = f'Does this image show "{prompt}"? Answer the question with Yes or No.'
    expected = published(folder, image, text, YES)
    score = vqascore.score(image[None], [prompt], [{}])
    assert score.dtype == torch.float32 and score.shape == (1,)
    assert 1e-4 < expected < 1 and score.item() == pytest.approx(expected, rel=1e-4)


def test_a_picture_that_is_resized(folder: Path, vqascore: VqaScore) -> None:
    image = picture(90, 61)
    text = 'Does this image show "two"? Answer the question with Yes or No.'
    assert vqascore.score(image[None], ["two"], [{}]).item() == pytest.approx(
        published(folder, image, text, YES), rel=3e-2
    )


def test_vqascore_of_a_batch_is_that_of_its_pictures(vqascore: VqaScore) -> None:
    images = torch.stack([picture(24, 32, seed) for seed in range(2)])
    prompts = ["two", "a red circle in a long prompt"]
    batch = vqascore.score(images, prompts, [{}, {}])
    singles = [vqascore.score(images[i : i + 1], prompts[i : i + 1], [{}]) for i in range(2)]
    torch.testing.assert_close(batch, torch.cat(singles))
    swapped = vqascore.score(images, prompts[::-1], [{}, {}])
    assert (batch / swapped - 1).abs().min() > 1e-3  # pictures and prompts both count


def test_the_gradient_reaches_the_pixels(vqascore: VqaScore) -> None:
    """The directional derivative along the gradient is its length; the picture is resized on the way."""
    assert vqascore.differentiable
    image = (0.2 + 0.6 * picture(40, 60))[None].requires_grad_()
    vqascore.score(image, ["a red circle"], [{}]).sum().backward()
    assert image.grad is not None
    length = image.grad.norm()
    direction, step = image.grad / length, 0.02
    with torch.no_grad():
        up, down = (
            vqascore.score(image + sign * step * direction, ["a red circle"], [{}]).double()
            for sign in (1, -1)
        )
    assert ((up - down) / (2 * step)).item() == pytest.approx(length.item(), rel=2e-2)
    assert all(parameter.grad is None for parameter in vqascore.judge.model.parameters())


def test_geneval2_is_the_published_one(folder: Path, vqascore: VqaScore) -> None:
    images = torch.stack([picture(32, 32, seed) for seed in range(2)])
    first = [["How many circles are in the image?", "two"], ["Are the circles red?", "Yes"]]
    second = [["Is it red?", "Yes"], ["How many?", "two"], ["Are there circles in the image at all?", "Yes"]]
    metadata = [
        {"prompt": "two red circles", "atom_count": 2, "vqa_list": first, "skills": ["count", "attribute"]},
        {"prompt": "two circles", "atom_count": 3, "vqa_list": second, "skills": 3 * ["object"]},
    ]
    prompts = [str(known["prompt"]) for known in metadata]
    reward = GenEval2(vqascore.judge)
    scores = reward.score(images, prompts, metadata)
    assert scores.shape == (2,) and scores.dtype == torch.float32 and not reward.differentiable
    for image, questions, score in zip(images, (first, second), scores, strict=True):
        atoms = [
            published(folder, image, f"{text} Answer in one word.", TWO if answer == "two" else YES)
            for text, answer in questions
        ]
        product = 1.0
        for atom in atoms:
            product *= atom
        assert score.item() == pytest.approx(product ** (1 / len(atoms)), rel=1e-4)
    single = reward.score(images[1:], prompts[1:], metadata[1:])
    torch.testing.assert_close(single, scores[1:])


def test_more_questions_than_fit_at_once(vqascore: VqaScore) -> None:
    reward = GenEval2(vqascore.judge)
    questions = [["Is it red?" + number * " Is it a circle?", "Yes"] for number in range(11)]
    image = picture(16, 16)[None]
    (together,) = reward.atom_scores(image, [""], [{"vqa_list": questions}])
    alone = [reward.atom_scores(image, [""], [{"vqa_list": [asked]}])[0] for asked in questions]
    torch.testing.assert_close(together, torch.cat(alone))
    assert len(set(together.tolist())) == 11


def test_a_transformers_that_leaves_the_cache_alone_is_refused(
    vqascore: VqaScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes any keyword, so a name of an older version is passed over, and with it the picture."""
    network = vqascore.judge.model.model
    real = type(network).forward

    @wraps(real)
    def forward(self: Any, *given: Any, past_key_values: Any = None, **named: Any) -> Any:
        return real(self, *given, **named)

    monkeypatch.setattr(type(network), "forward", forward)
    with pytest.raises(EnvironmentFailure, match="does not read a picture once"):
        vqascore.score(picture(16, 16)[None], ["a red ring"], [{}])


def test_geneval2_without_questions(vqascore: VqaScore) -> None:
    image = picture(16, 16)[None]
    with pytest.raises(DataError, match="`vqa_list`"):
        GenEval2(vqascore.judge).score(image, ["two toys"], [{"tag": "counting"}])


def test_a_template_with_the_question_before_the_picture(vqascore: VqaScore) -> None:
    template = "{{ messages[0]['content'][1]['text'] }}<|image_pad|>"
    judge = replace(vqascore.judge, chat=replace(vqascore.judge.chat, template=template))
    questions = [["Is it red?", "Yes"], ["Is it a circle?", "Yes"]]
    with pytest.raises(DataError, match="question before its picture"):
        GenEval2(judge).score(picture(16, 16)[None], ["a"], [{"vqa_list": questions}])


def test_lengths_that_do_not_match(vqascore: VqaScore) -> None:
    images = torch.zeros(2, 3, 16, 16)
    for prompts, metadata in ((["a"], [{}, {}]), (["a", "b"], [{}])):
        with pytest.raises(ValueError, match="2 images for 1"):
            vqascore.score(images, prompts, metadata)
    with pytest.raises(ValueError, match=r"\[B,3,H,W\]"):
        vqascore.score(images[0], ["a"] * 3, [{}] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lack or do not fit lm_head.weight"),
        ("unexpected", "have the unexpected model.language_model.extra.weight"),
        ("shape", r"lack or do not fit model.visual.merger.norm.weight \(1 tensors"),
        ("truncated", "can't be loaded"),
        ("absent", "can't be loaded"),
    ],
)
def test_weights_that_do_not_fit(change: str, message: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights["lm_head.weight"]
    elif change == "unexpected":
        weights["model.language_model.extra.weight"] = torch.zeros(2)
    elif change == "shape":
        weights["model.visual.merger.norm.weight"] = torch.zeros(3)
    save_file(weights, file, metadata={"format": "pt"})
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "absent":
        file.unlink()
    with pytest.raises(DataError, match=message) as caught:
        VqaScore.load(CPU, str(copy))
    assert caught.value.hint


def test_weights_in_several_files_and_half_precision(folder: Path, tmp_path: Path) -> None:
    """The layout of the published model: bfloat16 in shards with an index."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(copy, max_shard_size="100KB")
    assert len(json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    reward = VqaScore.load(CPU, str(copy))
    assert {parameter.dtype for parameter in reward.judge.model.parameters()} == {torch.bfloat16}
    image = picture(32, 32)[None].requires_grad_()
    score = reward.score(image, ["a red circle"], [{}])
    exact = VqaScore.load(CPU, str(folder)).score(image, ["a red circle"], [{}])
    assert score.dtype == torch.float32 and score.item() == pytest.approx(exact.item(), rel=0.2)
    score.sum().backward()
    assert image.grad is not None and image.grad.dtype == torch.float32 and image.grad.abs().max() > 0


def test_settings_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text())
    settings["text_config"]["hidden_size"] = "wide"
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="can't be loaded"):
        VqaScore.load(CPU, str(copy))


def test_the_default_source(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vqascore: VqaScore
) -> None:
    hub = offline_hub(tmp_path / "hub", monkeypatch)
    with pytest.raises(
        EnvironmentFailure, match=r"config\.json of Qwen/Qwen3-VL-8B-Instruct is not in the local"
    ):
        VqaScore.load(CPU, None)
    publish(hub, "Qwen/Qwen3-VL-8B-Instruct", *folder.iterdir())
    image = picture(32, 32)[None]
    assert torch.equal(*(r.score(image, ["two"], [{}]) for r in (VqaScore.load(CPU, None), vqascore)))


@pytest.mark.parametrize(
    ("name", "differentiable", "key"), [("vqascore", True, ""), ("geneval2", False, "vqa_list")]
)
def test_the_rows_of_the_table(name: str, differentiable: bool, key: str, folder: Path) -> None:
    row = find_reward(name)
    assert (row.differentiable, row.metadata) == (differentiable, key)
    reward = row.load(CPU, str(folder))
    known = {"vqa_list": [["Is it red?", "Yes"]]}
    score = reward.score(picture(16, 16)[None], ["a red circle"], [known])
    assert reward.differentiable == differentiable and row.low <= score.item() <= row.high
