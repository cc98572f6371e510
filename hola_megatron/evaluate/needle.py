"""A number hidden in a long text: what the exact memory is for.

As RULER's first single-needle task: noise sentences, one sentence that names a number at a
given depth, and a question at the end. The model answers by greedy decoding; the answer is
right when it contains the number. Texts are cut to a length in tokens, question included.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from hola_megatron.errors import RecipeError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "One of the special magic numbers for {key} is: {number}. "
QUESTION = ("What is the special magic number for {key} mentioned in the provided text? "
            "The special magic number for {key} mentioned in the provided text is")
KEYS = ("harbor", "lantern", "meadow", "copper", "willow", "violin", "glacier", "saddle")
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class NeedleResult:
    """Right answers among `asked` at one text length (tokens)."""

    length: int
    asked: int
    right: int

    def __str__(self) -> str:
        return f"needle {self.length:>8,} tokens  {self.right}/{self.asked} found ({self.right / self.asked:.2f})"


def needle(model: Any, tokenizer: Any, length: int, *, asked: int = 20, seed: int = 0) -> NeedleResult:
    """Hide a number in `asked` texts of `length` tokens, at depths from start to end."""
    draw, right = random.Random(seed), 0
    for n in range(asked):
        key, number = draw.choice(KEYS), str(draw.randint(1_000_000, 9_999_999))
        ids = haystack(tokenizer, length, key, number, depth=n / max(asked - 1, 1))
        right += number in _answer(model, tokenizer, ids)
    return NeedleResult(length, asked, right)


def haystack(tokenizer: Any, length: int, key: str, number: str, depth: float) -> list[int]:
    """Token ids of a text of at most `length` tokens; RecipeError where needle and question do not fit."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    inside, question = encode(NEEDLE.format(key=key, number=number)), encode(QUESTION.format(key=key))
    noise = encode(NOISE)
    room = length - len(start) - len(inside) - len(question)
    if room < 0:
        raise RecipeError(f"--needle: {length} tokens do not hold needle and question, which take {length - room}")
    times = room // len(noise)
    before = round(times * depth)
    return start + noise * before + inside + noise * (times - before) + question


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, ids: list[int]) -> str:
    given = torch.tensor([ids], device=model.device)
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, len(ids):], skip_special_tokens=True)
