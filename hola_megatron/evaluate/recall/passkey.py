"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300): a number at a given depth of a text of noise."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from hola_megatron.evaluate.recall.prompts import Prompt, Text, prompts
from hola_megatron.evaluate.recall.words import NOISE

INTRODUCTION = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will "
                "quiz you about the important information there.")
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = 12  # tokens generated: five digits, also as bytes


def passkey_prompts(tokenizer: Any, *, length: int, depth: float, count: int, seed: int) -> list[Prompt]:
    """`count` prompts with the key at `depth`, 0 (start) to 1 (end). Raises RecipeError where `length` is too short."""
    return prompts(f"passkey {depth:.4f}", tokenizer, partial(_passkey, depth), length=length, answer=ANSWER,
                   count=count, seed=seed, least=1)


def _passkey(depth: float, draw: random.Random, units: int) -> Text:
    """units: noise sentences."""
    key, before = str(draw.randint(10_000, 99_999)), round(units * depth)
    lines = [INTRODUCTION, *[NOISE] * before, KEY.format(key=key), *[NOISE] * (units - before), QUESTION]
    return Text("\n".join(lines), (key,))
