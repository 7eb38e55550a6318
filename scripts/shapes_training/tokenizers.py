"""Word-level tokenizers in CLIP's and T5's own classes, for the few dozen words of the captions."""

from functools import cache

from transformers import CLIPTokenizer, T5TokenizerFast  # type: ignore[attr-defined] # a lazy name

from rtdmd_cli.shapes.grammar import NUMBERS, RELATIONS, TASKS, all_captions
from rtdmd_cli.shapes.render import COLOURS

CLIP_LENGTH = 13
"""Longest caption, "a photo of a red ring left of a blue cross" (11 words), with its two marks."""
T5_LENGTH = 12
"""The same with T5's one mark; `text_length` of the presets."""


@cache
def words() -> tuple[str, ...]:
    """Every word of the grammar, sorted."""
    found = {word for task in TASKS for caption in all_captions(task) for word in caption.text.split()}
    return tuple(
        sorted(found | set(COLOURS) | set(NUMBERS.values()) | {w for r in RELATIONS for w in r.split()})
    )


def _byte_alphabet() -> list[str]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges build exactly the words of the grammar."""
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)  # type: ignore[arg-type]


@cache
def t5_tokenizer() -> T5TokenizerFast:
    """A unigram vocabulary of the words, with letters for everything else."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("▁" + word, -2.0) for word in words()]
    vocabulary += [("▁", -3.0), *((letter, -10.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-'")]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)
