"""RULER, passkey and MQAR as jobs of an evaluation (suite/jobs.py)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hola_megatron.evaluate.recall import mqar
from hola_megatron.evaluate.recall.passkey import ANSWER, passkey_prompts
from hola_megatron.evaluate.recall.prompts import Prompt, shares_found
from hola_megatron.evaluate.recall.ruler import ANSWERS, NEEDLES, ruler_prompts
from hola_megatron.evaluate.recall.words import Haystack
from hola_megatron.evaluate.suite.jobs import Reading, Subject, reading_settings, share
from hola_megatron.evaluate.suite.results import Outcome

SAMPLES = {"mqar": mqar.mqar, "far_mqar": mqar.far_mqar}


@dataclass(frozen=True)
class Asked:
    """How often is asked. seed: of the prompts; MQAR's test samples are the same for all."""

    samples: int = 100
    seed: int = 0


@dataclass
class RulerJob:
    """One of RULER's tasks at one length (tokens)."""

    name: str
    length: int
    asked: Asked
    reading: Reading
    haystack: Haystack

    @property
    def task(self) -> str:
        return f"{self.name}/{self.length}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        in_text = self.name in NEEDLES and NEEDLES[self.name].in_text
        return {"kind": "ruler", "samples": self.asked.samples, "seed": self.asked.seed,
                "haystack": self.haystack.sha256 if in_text else None, "dtype": reading_settings(self.reading)["dtype"]}

    def check(self, subject: Subject) -> None:
        """Raise RecipeError where the length does not hold the task."""
        self._prompts(subject.tokenizer, 1)

    def run(self, subject: Subject) -> Outcome:
        start = time.monotonic()
        prompts = self._prompts(subject.tokenizer, self.asked.samples)
        found = shares_found(subject.reader, subject.tokenizer, prompts, ANSWERS[self.name], self.task)
        return Outcome(self.task, {"found": share(found)}, len(found), time.monotonic() - start, self.settings)

    def _prompts(self, tokenizer: Any, count: int) -> list[Prompt]:
        return ruler_prompts(self.name, tokenizer, length=self.length, count=count, seed=self.asked.seed,
                             haystack=self.haystack)


@dataclass
class PasskeyJob:
    """Passkeys at one length (tokens), at `depths` places from start to end."""

    length: int
    depths: int
    asked: Asked
    reading: Reading
    task: str = field(init=False)

    def __post_init__(self) -> None:
        self.task = f"passkey/{self.length}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "passkey", "samples": self.asked.samples, "seed": self.asked.seed, "depths": self.depths,
                "dtype": reading_settings(self.reading)["dtype"]}

    def check(self, subject: Subject) -> None:
        passkey_prompts(subject.tokenizer, length=self.length, depth=0.0, count=1, seed=self.asked.seed)

    def run(self, subject: Subject) -> Outcome:
        """All depths are asked together; cells has one row for each."""
        start, count = time.monotonic(), self.asked.samples
        depths = [n / max(self.depths - 1, 1) for n in range(self.depths)]
        prompts = [prompt for depth in depths for prompt in
                   passkey_prompts(subject.tokenizer, length=self.length, depth=depth, count=count,
                                   seed=self.asked.seed)]
        found = shares_found(subject.reader, subject.tokenizer, prompts, ANSWER, self.task)
        cells = [{"length": self.length, "depth": depth, "value": sum(found[n * count: (n + 1) * count]) / count}
                 for n, depth in enumerate(depths)]
        return Outcome(self.task, {"found": share(found)}, len(found), time.monotonic() - start, self.settings, cells)


@dataclass
class MqarJob:
    """mqar or far_mqar at one length with one number of pairs."""

    kind: str
    length: int
    pairs: int
    samples: int
    reading: Reading

    @property
    def task(self) -> str:
        return f"{self.kind}/{self.length}/{self.pairs}_pairs"

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "samples": self.samples, "seed": mqar.TEST_SEED,
                "dtype": reading_settings(self.reading)["dtype"]}

    def check(self, subject: Subject) -> None:
        mqar.check(self.length, self.pairs, subject.loaded[0].config.vocab_size)

    def run(self, subject: Subject) -> Outcome:
        """The share of answers that are the model's first choice in the whole vocabulary."""
        start, vocabulary = time.monotonic(), subject.loaded[0].config.vocab_size
        drawn = mqar.fixed_samples(SAMPLES[self.kind], length=self.length, vocabulary=vocabulary, pairs=self.pairs,
                                   first=0, rows=self.samples)
        order = drawn.asked.argsort(1)
        places = [sorted(row) for row in drawn.asked.tolist()]
        wanted = [answers[by].tolist() for answers, by in zip(drawn.answers, order, strict=True)]
        said = subject.reader.choices(drawn.tokens.tolist(), places, self.task)
        right = [float(a == b) for found, answers in zip(said, wanted, strict=True)
                 for a, b in zip(found, answers, strict=True)]
        return Outcome(self.task, {"accuracy": share(right)}, len(right), time.monotonic() - start, self.settings)
