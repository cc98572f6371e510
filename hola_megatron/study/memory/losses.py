"""A text as windows of equal length, and the loss of every token under a model.

Shapes: R windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hola_megatron.errors import DataError

LOGIT_ROWS = 1024  # positions per chunk of logits


def windows(tokenizer: Any, documents: Iterable[str], length: int, most: int) -> np.ndarray:
    """int64 [R, T + 1]: the text cut into windows that begin with bos, if the tokenizer has one.

    Of the documents, the first `most` tokens are used; a rest shorter than a window is left out. Each window is read
    with an empty memory, as in training. Raises DataError for a text shorter than one window.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows, new = [], length + 1 - len(start)
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        rows += [start + ids[i: i + new] for i in range(0, len(ids) - new + 1, new)]
        if len(rows) * length >= most:
            break
    if not rows:
        raise DataError(f"--text: no document has the {new} tokens of one window; give a longer text, or a shorter "
                        "--window")
    return np.array(rows[: max(1, most // length)], np.int64)


@torch.no_grad()
def token_losses(model: Any, tokens: np.ndarray, batch: int) -> np.ndarray:
    """float64 [R, T]: the loss of every token of a window but the first, in nats."""
    found = []
    for first in range(0, len(tokens), batch):
        rows = torch.from_numpy(tokens[first: first + batch]).to(model.device)
        hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        labels = rows[:, 1:].flatten()
        nats = [F.cross_entropy(model.lm_head(hidden[i: i + LOGIT_ROWS]).float(), labels[i: i + LOGIT_ROWS],
                                reduction="none") for i in range(0, len(labels), LOGIT_ROWS)]
        found.append(torch.cat(nats).view(len(rows), -1).double().cpu().numpy())
    return np.concatenate(found)


def same_tokens(first: Any, second: Any, texts: Iterable[str]) -> bool:
    """Whether two tokenizers give the same ids for these texts."""
    def ids(tokenizer: Any, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return first.bos_token_id == second.bos_token_id and all(ids(first, text) == ids(second, text) for text in texts)
