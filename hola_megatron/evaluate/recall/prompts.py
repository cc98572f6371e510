"""Prompts of a wanted length in tokens whose answers must contain given words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hola_megatron.errors import RecipeError
from hola_megatron.evaluate.reader import Reader


@dataclass(frozen=True)
class Text:
    """A prompt, and what its answer must contain."""

    prompt: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A Text as token ids, bos included."""

    ids: list[int]
    expected: tuple[str, ...]


Make = Callable[[random.Random, int], Text]  # (source of chance, units of filling) -> Text


def prompts(name: str, tokenizer: Any, make: Make, *, length: int, answer: int, count: int, seed: int, least: int,
            most: int = 2**31) -> list[Prompt]:
    """`count` prompts that with an answer of `answer` tokens have at most `length` tokens, and nearly as many.

    Each is a function of name, length, seed and its number. make: longer with more units, `least` to `most` of them.
    Raises RecipeError where not even those fit.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encoded(number: int, units: int) -> Prompt:
        text = make(random.Random(f"{name} {length} {seed} {number}"), units)
        ids = tokenizer(text.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return Prompt(start + ids, text.expected)

    limit = length - answer
    units = _longest(lambda units: len(encoded(0, units).ids) <= limit, least, most)
    found = []
    for number in range(count):
        fitting = units
        while len((prompt := encoded(number, fitting)).ids) > limit:
            if fitting <= least:
                raise RecipeError(f"{name}: {length} tokens do not hold its question and an answer of {answer} tokens, "
                                  f"which take {len(prompt.ids) + answer}; give a larger length")
            fitting = max(fitting - max(fitting // 50, 1), least)
        found.append(prompt)
    return found


def _longest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` to `most` that fits, or `least`; what fits must fit with fewer too."""
    low, high = least, least + 8
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def shares_found(reader: Reader, tokenizer: Any, asked: Sequence[Prompt], answer: int, name: str) -> list[float]:
    """Of every prompt the share of its expected words that the greedy answer of `answer` tokens contains.

    Upper and lower case are one, as in RULER.
    """
    def found(number: int, ids: list[int]) -> float:
        text, words = tokenizer.decode(ids, skip_special_tokens=True).lower(), asked[number].expected
        return sum(word.lower() in text for word in words) / len(words)

    said = reader.answers([prompt.ids for prompt in asked], answer, lambda n, ids: found(n, ids) == 1.0, name)
    return [found(n, ids) for n, ids in enumerate(said)]
