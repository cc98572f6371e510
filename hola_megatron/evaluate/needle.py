"""A number hidden in a long text: what the exact memory is for.

Like RULER's S-NIAH-1 (recall/ruler.py, niah_single_1) in its noise and its needle, and not that task: no introduction
says that something is hidden, keys are eight nouns, depths are even from start to end, and the answer is not counted in
the length. The model answers by greedy decoding; the answer is right when it contains the number.

`needle_documents` are texts of the same form with their answers, to mix into a corpus for models
too small to find the task out by themselves (tools/needle_text.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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
CHARACTERS = (800, 6000)  # of a needle document's noise; with needles and questions 200 to 1,900 tokens of English


@dataclass(frozen=True)
class NeedleResult:
    """Right answers among `samples` at one text length (tokens)."""

    length: int
    samples: int
    right: int

    def __str__(self) -> str:
        return f"needle {self.length:>8,} tokens  {self.right}/{self.samples} found ({self.right / self.samples:.2f})"


def needle(model: Any, tokenizer: Any, length: int, *, samples: int = 20, batch: int = 1,
           seed: int = 0) -> NeedleResult:
    """Hide a number in `samples` texts of `length` tokens, at depths from start to end; `batch` texts at a time.

    RecipeError where needle and question do not fit.
    """
    draw, texts = random.Random(f"asked, {length} tokens, {seed}"), []
    for n in range(samples):
        key, number = draw.choice(KEYS), _number(draw)
        texts.append((haystack(tokenizer, length, key, number, depth=n / max(samples - 1, 1)), number))
    right = 0
    for first in range(0, samples, batch):
        group = texts[first:first + batch]
        found = answers(model, tokenizer, [ids for ids, _ in group])
        right += sum(number in answer for (_, number), answer in zip(group, found, strict=True))
    return NeedleResult(length, samples, right)


def check_lengths(tokenizer: Any, lengths: Sequence[int]) -> None:
    """RecipeError that names every length in which needle and question do not fit, to ask before long work.

    A number whose digits make more tokens than the one tried here is left to `haystack`.
    """
    start = tokenizer.bos_token_id is not None
    least = start + max(len(_encode(tokenizer, key, "1234567", 0, 0)) for key in KEYS)
    if short := [_too_short(length, least) for length in lengths if length < least]:
        raise RecipeError(short)


def _too_short(length: int, least: int) -> str:
    return f"--needle: {length} tokens do not hold needle and question, which take {least}"


def haystack(tokenizer: Any, length: int, key: str, number: str, depth: float) -> list[int]:
    """Token ids of a text of at most `length` tokens, its needle at `depth` (0 to 1); RecipeError if that cannot be.

    The text is encoded whole: segments encoded separately start with marks that the text does not have.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    limit = length - len(start)
    one, two = (len(_encode(tokenizer, key, number, times, depth)) for times in (1, 2))
    unit_tokens = max(two - one, 1)
    times = max(1 + (limit - one) // unit_tokens, 0)
    while len(ids := _encode(tokenizer, key, number, times, depth)) > limit and times:
        times = max(times + (limit - len(ids)) // unit_tokens, 0)  # not every repetition was as short as the second
    if len(ids) > limit:
        raise RecipeError(_too_short(length, len(start) + len(ids)))
    return start + ids


def _encode(tokenizer: Any, key: str, number: str, times: int, depth: float) -> list[int]:
    before = round(times * depth)
    text = NOISE * before + NEEDLE.format(key=key, number=number) + NOISE * (times - before)
    return tokenizer(text + QUESTION.format(key=key), add_special_tokens=False, verbose=False)["input_ids"]


def needle_documents(count: int, noise: Sequence[str], seed: int = 0) -> Iterator[str]:
    """`count` texts: one to four numbers among noise (CHARACTERS of it), then questions for all with their answers.

    Every other text has the task's own noise, the others run through `noise` (sentences), where it has any. Numbers
    are drawn apart from those that `needle` asks for, also with the same seed.
    """
    draw = random.Random(f"documents, {seed}")
    for n in range(count):
        size = int(CHARACTERS[0] * (CHARACTERS[1] / CHARACTERS[0]) ** draw.random())  # log-uniform
        sentences = _sentences(size, noise if n % 2 else (), draw)
        numbers = {key: _number(draw) for key in draw.sample(KEYS, draw.randint(1, 4))}
        for key, number in numbers.items():
            sentences.insert(draw.randint(0, len(sentences)), NEEDLE.format(key=key, number=number))
        samples = draw.sample(sorted(numbers), len(numbers))
        yield "".join(sentences) + " ".join(f"{QUESTION.format(key=key)} {numbers[key]}." for key in samples)


def _sentences(characters: int, noise: Sequence[str], draw: random.Random) -> list[str]:
    """Sentences in order from a random position, up to a number of characters."""
    source = noise or [f"{sentence}. " for sentence in NOISE.split(". ")[:-1]]
    at, taken, total = draw.randrange(len(source)) if noise else 0, [], 0
    while total < characters:
        taken.append(source[at % len(source)])
        total, at = total + len(taken[-1]), at + 1
    return taken


def _number(draw: random.Random) -> str:
    return str(draw.randint(1_000_000, 9_999_999))


@torch.no_grad()
def answers(model: Any, tokenizer: Any, texts: list[list[int]]) -> list[str]:
    """What follows each text (token ids), by greedy decoding; shorter ones are padded in front."""
    most = max(map(len, texts))
    given = torch.tensor([[0] * (most - len(ids)) + ids for ids in texts])
    mask = torch.tensor([[0] * (most - len(ids)) + [1] * len(ids) for ids in texts])
    out = model.generate(given.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=ANSWER_TOKENS,
                         do_sample=False)
    return [tokenizer.decode(row[most:], skip_special_tokens=True) for row in out]
