"""What the tasks ask of a model: likelihoods of token rows, and greedy continuations, in constant memory.

`ModelReader` reads an exported model. Rows are sorted by length and read several at a time; the model packs them
without their padding. A row longer than CHUNK is read in pieces, its memory carried along, so that a sequence of any
length needs the memory of one piece (softmax-attention layers keep their keys and values, as they must).
With several processes (torchrun) each reads its share of the batches, and all get all results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hola_megatron.evaluate.load import LogitsModel

CHUNK = 4096  # tokens of a piece
LOGIT_ROWS = 1024  # positions whose logits are held at a time


class Row(NamedTuple):
    """Token ids, of which the last `predicted` are scored given the ones before; at least one comes before."""

    ids: list[int]
    predicted: int


class Score(NamedTuple):
    """Log likelihood (nats) of a row's predicted tokens, and whether each of them is the model's first choice."""

    log_likelihood: float
    greedy: bool


class Reader(Protocol):
    """A model as tasks use it. The methods return their results in the order of what they were given."""

    def scores(self, rows: Sequence[Row], name: str = "") -> list[Score]:
        """The scores of `rows`. name: of the progress bar."""
        ...

    def choices(self, rows: Sequence[list[int]], places: Sequence[list[int]], name: str = "") -> list[list[int]]:
        """The model's first choice for the token after each of a row's `places` (rising), given the row up to it."""
        ...

    def answers(self, prompts: Sequence[list[int]], most: int, ended: Callable[[int, list[int]], bool],
                name: str = "") -> list[list[int]]:
        """Greedy continuations of `prompts`, of at most `most` tokens, without the end-of-text token.

        ended: given a prompt's number and its continuation so far, whether it needs no more tokens. name: of the bar.
        """
        ...


class ModelReader:
    """A Reader of an exported model, or of another one as `evaluate.load` gives it.

    Args:
        model, tokenizer: from `evaluate.load.load`.
        batch: rows read at a time, at most; scored together they have at most max(batch * window, CHUNK) tokens.
        window: tokens that the model was trained at.
        progress: show progress bars, on a standard error that is a terminal.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch: int = 8, window: int = 2048, progress: bool = False):
        self.model, self.tokenizer, self.batch, self.progress = model, tokenizer, batch, progress
        self._tokens = max(batch * window, CHUNK)
        self._ours = not isinstance(model, LogitsModel)  # others hold their memory in forms we do not know

    def scores(self, rows: Sequence[Row], name: str = "") -> list[Score]:
        return self._shared(self._batches([len(row.ids) for row in rows], self._tokens), len(rows), name,
                            lambda batch: self._scores([rows[n] for n in batch]))

    def choices(self, rows: Sequence[list[int]], places: Sequence[list[int]], name: str = "") -> list[list[int]]:
        return self._shared(self._batches([len(ids) for ids in rows], self._tokens), len(rows), name,
                            lambda batch: self._choices([rows[n] for n in batch], [places[n] for n in batch]))

    def answers(self, prompts: Sequence[list[int]], most: int, ended: Callable[[int, list[int]], bool],
                name: str = "") -> list[list[int]]:
        def answer(batch: list[int]) -> list[list[int]]:
            given = [prompts[n] for n in batch]
            return self._greedy(given, batch, most, ended) if self._ours else self._generated(given, most)

        batches = self._batches([len(ids) for ids in prompts], math.inf if self._ours else self._tokens)
        return self._shared(batches, len(prompts), name, answer)

    def _batches(self, lengths: list[int], tokens: float) -> list[list[int]]:
        """Numbers of the rows of each batch, longest first, so that memory runs out at once or never.

        tokens: of a batch of several rows, at most.
        """
        batches: list[list[int]] = []
        for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
            if batches and len(batches[-1]) < self.batch \
                    and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
                batches[-1].append(n)
            else:
                batches.append([n])
        return batches

    def _shared(self, batches: list[list[int]], count: int, name: str, work: Callable[[list[int]], list[Any]]
                ) -> list[Any]:
        """work(batch) of every batch, done by all processes together; the results of all rows, in order."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        done: list[Any] = []
        with torch.no_grad(), tqdm(total=count, desc=name, leave=False, unit="row",
                                   disable=None if self.progress and rank == 0 else True) as bar:
            for number, batch in enumerate(batches):
                if number % ranks == rank:
                    done += zip(batch, work(batch), strict=True)
                bar.update(len(batch))
        if ranks > 1:
            parts: list[Any] = [None] * ranks
            dist.all_gather_object(parts, done)
            done = [pair for part in parts for pair in part]
        found = dict(done)
        return [found[n] for n in range(count)]

    def _choices(self, rows: list[list[int]], places: list[list[int]]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in rows]
        for at, hidden in self._pieces(rows):
            for n, asked in enumerate(places):
                here = [place - at for place in asked if at <= place < at + hidden.shape[1]]
                for first in range(0, len(here), LOGIT_ROWS):
                    found[n] += self.model.lm_head(hidden[n, here[first: first + LOGIT_ROWS]]).argmax(-1).tolist()
        return found

    def _pieces(self, rows: list[list[int]]) -> Iterator[tuple[int, Tensor]]:
        """(first column, hidden states [B, up to CHUNK, D]) of rows, which are padded at the end."""
        longest, cache = max(map(len, rows)), None
        tokens, mask = self._padded([ids + [0] * (longest - len(ids)) for ids in rows],
                                    [[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
        if not self._ours or longest <= CHUNK:
            yield 0, self.model.model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
            return
        for at in range(0, longest, CHUNK):
            output = self.model.model(tokens[:, at: at + CHUNK], attention_mask=mask[:, : at + CHUNK],
                                      past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield at, output.last_hidden_state

    def _scores(self, rows: list[Row]) -> list[Score]:
        found = [Score(0.0, True)] * len(rows)
        for at, hidden in self._pieces([row.ids[:-1] for row in rows]):
            for n, row in enumerate(rows):
                first = max(len(row.ids) - row.predicted - 1, at)
                end = min(len(row.ids) - 1, at + hidden.shape[1])
                if first < end:
                    part = self._score(hidden[n, first - at: end - at], row.ids[first + 1: end + 1])
                    found[n] = Score(found[n].log_likelihood + part.log_likelihood, found[n].greedy and part.greedy)
        return found

    def _score(self, hidden_ND: Tensor, ids: list[int]) -> Score:
        """Of tokens, by the hidden states before them."""
        total, greedy = 0.0, True
        for at in range(0, len(ids), LOGIT_ROWS):
            logs = self.model.lm_head(hidden_ND[at: at + LOGIT_ROWS]).float().log_softmax(-1)
            targets = torch.tensor(ids[at: at + LOGIT_ROWS], device=logs.device)
            total += float(logs.gather(1, targets[:, None]).sum())
            greedy = greedy and bool((logs.argmax(-1) == targets).all())
        return Score(total, greedy)

    def _padded(self, ids: list[list[int]], mask: list[list[int]]) -> tuple[Tensor, Tensor]:
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _in_front(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(tokens, mask) [B, T], padded in front."""
        most = max(map(len, prompts))
        return self._padded([[0] * (most - len(ids)) + ids for ids in prompts],
                            [[0] * (most - len(ids)) + [1] * len(ids) for ids in prompts])

    def _greedy(self, prompts: list[list[int]], numbers: list[int], most: int,
                ended: Callable[[int, list[int]], bool]) -> list[list[int]]:
        tokens, mask = self._in_front(prompts)
        cache, eos = None, self.tokenizer.eos_token_id
        for at in range(0, tokens.shape[1], CHUNK):
            end = min(at + CHUNK, tokens.shape[1])
            output = self.model.model(tokens[:, at:end], attention_mask=mask[:, :end], past_key_values=cache,
                                      use_cache=True)
            cache = output.past_key_values
        said: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for number in range(most):
            last = self.model.lm_head(output.last_hidden_state[:, -1]).float().argmax(-1)
            for n, token in enumerate(last.tolist()):
                if n in running and token != eos:
                    said[n].append(token)
                if n in running and (token == eos or ended(numbers[n], said[n])):
                    running.discard(n)
            if not running or number == most - 1:
                break
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = self.model.model(last[:, None], attention_mask=mask, past_key_values=cache, use_cache=True)
        return said

    def _generated(self, prompts: list[list[int]], most: int) -> list[list[int]]:
        """By transformers."""
        tokens, mask = self._in_front(prompts)
        eos = self.tokenizer.eos_token_id
        out = self.model.generate(tokens, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=eos)
        rows = [row[tokens.shape[1]:].tolist() for row in out]
        return [ids[: ids.index(eos)] if eos in ids else ids for ids in rows]
