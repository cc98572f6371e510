"""Perplexity of a text under an exported model, with its policy and convention stated.

    windows   every document is cut into windows of N tokens, each read with an empty memory, as the
              model was trained; the usual number
    stream    every document is read in one go, the state carried along: the model's use of
              a context of any length, in constant memory (softmax-attention layers excepted)
    rolling   windows as in lm-evaluation-harness: the first starts with bos (eos where there is no bos), the
              others with the last token of the one before, and the last is filled up with earlier tokens
Each token is predicted exactly once. Windows and streams start with bos; where the tokenizer has none, the first
token there is not predicted (and not counted).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hola_megatron.errors import DataError

IGNORED = -100
LOGIT_ROWS = 1024  # positions per chunk of logits
STREAM_CHUNK = 2048  # tokens of a call that carries its memory along


class Counted(NamedTuple):
    """A text to read, and the words and UTF-8 bytes by which its likelihood is divided."""

    text: str
    words: int
    bytes: int


def count_words(text: str) -> int:
    """Number of words as in lm-evaluation-harness: blanks at an end add an empty word."""
    return len(re.split(r"\s+", text))


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log likelihood of a text, and what it is divided by.

    nats: summed over the `predicted` of `tokens` tokens; words, bytes: counted as in `convention`.
    """

    policy: str
    convention: str
    nats: float
    predicted: int
    tokens: int
    words: int
    bytes: int
    documents: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.predicted, 1)

    @property
    def per_token(self) -> float:
        return _exp(self.nats_per_token)

    @property
    def per_word(self) -> float:
        return _exp(self.nats / max(self.words, 1))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"nats_per_token": self.nats_per_token, "perplexity_per_token": self.per_token,
                               "perplexity_per_word": self.per_word, "bits_per_byte": self.bits_per_byte}

    def __str__(self) -> str:
        return (f"policy               {self.policy}\n"
                f"convention           {self.convention}\n"
                f"text                 {self.documents:,} documents, {self.bytes:,} bytes, {self.words:,} words, "
                f"{self.tokens:,} tokens ({self.predicted:,} predicted)\n"
                f"nats a token         {self.nats_per_token:.4f}\n"
                f"perplexity a token   {self.per_token:.3f}\n"
                f"perplexity a word    {self.per_word:,.3f}\n"
                f"bits a byte          {self.bits_per_byte:.4f}")


def perplexity(model: Any, tokenizer: Any, documents: Iterable[str | Counted], *, window: int | None,
               batch: int = 8, rolling: bool = False) -> Perplexity:
    """Of `documents`.

    Args:
        model, tokenizer: as transformers loads them.
        documents: texts, or texts with the words and bytes of what they were made from.
        window: tokens of a window, or None to carry the memory through each document.
        batch: windows at a time.
        rolling: windows and words as in lm-evaluation-harness.

    Raises:
        DataError: there is nothing to predict.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before = start or [tokenizer.eos_token_id]
    total = {"nats": 0.0, "predicted": 0, "tokens": 0, "words": 0, "bytes": 0, "documents": 0}
    rows: list[tuple[list[int], int]] = []
    originals = False
    for document in documents:
        originals |= isinstance(document, Counted)
        text, words, size = _counted(document, rolling)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        counts = {"tokens": len(ids), "words": words, "bytes": size, "documents": 1}
        total = {name: value + counts.get(name, 0) for name, value in total.items()}
        if window is None:
            _add(total, _stream_loss(model, start + ids))
            continue
        rows += _rolling(before, ids, window) if rolling else _windows(start, ids, window)
        while len(rows) >= batch:
            _add(total, _window_loss(model, rows[:batch]))
            rows = rows[batch:]
    if rows:
        _add(total, _window_loss(model, rows))
    if not total["predicted"]:
        raise DataError("the text has no token to predict; give one with more text")
    return Perplexity(_policy(window, rolling, bool(start)), _convention(rolling, originals), **total)


def _counted(document: str | Counted, rolling: bool) -> Counted:
    if isinstance(document, Counted):
        return document
    words = count_words(document) if rolling else len(document.split())
    return Counted(document, words, len(document.encode("utf-8")))


def _policy(window: int | None, rolling: bool, bos: bool) -> str:
    if rolling:
        return (f"rolling windows of {window:,} tokens, the first after {'bos' if bos else 'eos (no bos)'}, the others "
                "after the last token of the one before")
    where = "bos" if bos else "nothing (no bos: first tokens are not predicted)"
    if window:
        return f"windows of {window:,} tokens, each with an empty memory, after {where}"
    return f"stream: memory carried through each document, which starts after {where}"


def _convention(rolling: bool, originals: bool) -> str:
    if originals:
        return "lm-eval's task wikitext: pages detokenised, words and bytes of the pages as stored in the file"
    if rolling:
        return "lm-eval's loglikelihood_rolling: words between blanks, as re.split counts them; bytes of the text"
    return "the text as it is: words and bytes of what the model read (not lm-eval's)"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _add(total: dict[str, Any], found: tuple[float, int]) -> None:
    total["nats"] += found[0]
    total["predicted"] += found[1]


def _windows(start: list[int], ids: list[int], window: int) -> Iterator[tuple[list[int], int]]:
    """(row of at most window + 1 tokens, how many of its last ones are predicted): all but the first."""
    for i in range(0, len(ids), window):
        row = start + ids[i: i + window]
        if len(row) > 1:
            yield row, len(row) - 1


def _rolling(before: list[int], ids: list[int], window: int) -> Iterator[tuple[list[int], int]]:
    """The same for lm-evaluation-harness's windows; in the last one of several only the new tokens are predicted."""
    if ids:
        yield before + ids[:window], len(ids[:window])
    for i in range(window, len(ids), window):
        end = min(i + window, len(ids))
        yield ids[end - window - 1: end], end - i


@torch.no_grad()
def _window_loss(model: Any, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """(summed loss, predicted tokens) of rows padded on the right."""
    longest = max(len(row) for row, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, counted = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for n, (row, predicted) in enumerate(rows):
        tokens[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
        counted[n, len(row) - predicted: len(row)] = 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    labels = tokens.masked_fill(counted.to(model.device) == 0, IGNORED)[:, 1:]
    hidden = model.model(tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=False).last_hidden_state
    return _loss(model, hidden, labels), int((labels != IGNORED).sum())


@torch.no_grad()
def _stream_loss(model: Any, ids: list[int]) -> tuple[float, int]:
    """(summed loss, predicted tokens) of one sequence of any length."""
    cache, nats = None, 0.0
    for i in range(0, len(ids) - 1, STREAM_CHUNK):
        chunk = torch.tensor([ids[i: i + STREAM_CHUNK + 1]], device=model.device)
        output = model.model(chunk[:, :-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        nats += _loss(model, output.last_hidden_state, chunk[:, 1:])
    return nats, max(len(ids) - 1, 0)


def _loss(model: Any, hidden_BTD: Tensor, labels_BT: Tensor) -> float:
    """Summed cross-entropy, float32, without holding all logits at once."""
    hidden, labels, total = hidden_BTD.flatten(0, 1), labels_BT.flatten(), 0.0
    for i in range(0, labels.numel(), LOGIT_ROWS):
        logits = model.lm_head(hidden[i: i + LOGIT_ROWS]).float()
        total += float(F.cross_entropy(logits, labels[i: i + LOGIT_ROWS], ignore_index=IGNORED, reduction="sum"))
    return total
