"""LAMBADA: prediction of a passage's last word.

The word is everything after the passage's last space. It counts as found when each of its tokens
is the model's first choice, given the ones before; its perplexity is exp of the mean negative log
likelihood a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from hola_megatron.errors import DataError


@dataclass(frozen=True)
class LastWord:
    """Number of passages, words predicted correctly, summed negative log likelihood of the words."""

    passages: int
    found: int
    nats: float

    @property
    def accuracy(self) -> float:
        return self.found / self.passages

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.passages, 700))

    def __str__(self) -> str:
        return (f"last word            {self.passages:,} passages, accuracy {self.accuracy:.4f}, perplexity a word "
                f"{self.perplexity:,.3f}")


def last_word(model: Any, tokenizer: Any, passages: Iterable[str], *, batch: int = 8) -> LastWord:
    """Predict the last word of every passage with at least two words. Raises DataError where there is none."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = (_row(tokenizer, start, text.strip()) for text in passages if " " in text.strip())
    total, found, nats = 0, 0, 0.0
    while group := list(islice(rows, batch)):
        for right, loss in _ask(model, group):
            total, found, nats = total + 1, found + right, nats + loss
    if not total:
        raise DataError("no passage of two or more words; give one passage a line or record")
    return LastWord(total, found, nats)


def _row(tokenizer: Any, start: list[int], text: str) -> tuple[list[int], int]:
    """(ids of the passage, how many of them are its last word's)."""
    whole, head = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, text.rpartition(" ")[0]))
    same = 0
    while same < min(len(head), len(whole) - 1) and head[same] == whole[same]:
        same += 1
    return start + whole, len(whole) - max(same, 0 if start else 1)


@torch.no_grad()
def _ask(model: Any, group: list[tuple[list[int], int]]) -> Iterator[tuple[bool, float]]:
    longest = max(len(ids) for ids, _ in group)
    tokens = torch.zeros(len(group), longest, dtype=torch.int64)
    for n, (ids, _) in enumerate(group):
        tokens[n, : len(ids)] = torch.tensor(ids)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in group])
    hidden = model.model(tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False)[0]
    for n, (ids, last) in enumerate(group):
        logs = model.lm_head(hidden[n, len(ids) - last - 1: len(ids) - 1]).float().log_softmax(-1).cpu()
        word = torch.tensor(ids[-last:])
        yield bool((logs.argmax(-1) == word).all()), -float(logs.gather(1, word[:, None]).sum())
