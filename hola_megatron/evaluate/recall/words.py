"""Words and filling text of the recall tasks."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from hola_megatron.data.documents import DocumentReader
from hola_megatron.data.sources import bundled_source, find_sources
from hola_megatron.errors import DataError, InstallError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LEAST_WORDS = 200
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@cache
def word_lists() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(nouns, adjectives, verbs) of the package wonderwords, which RULER draws from. Raises InstallError without it."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise InstallError("--ruler: needs the package wonderwords, which is not installed: pip install -e '.[eval]'"
                           ) from None
    words = RandomWord()
    nouns, adjectives, verbs = (tuple(words.filter(include_categories=[kind])) for kind in
                                ("noun", "adjective", "verb"))
    return nouns, adjectives, verbs


@cache
def all_words() -> tuple[str, ...]:
    """Every word of the lists once, sorted."""
    return tuple(sorted({word for words in word_lists() for word in words}))


class Haystack:
    """Running text to hide needles in: the words of files, from the start, again from the start where it ends.

    path: a file, folder or pattern as for --text; None: the text that comes with the project. Raises DataError.
    """

    def __init__(self, path: str | None = None):
        sources = [bundled_source("train")] if path is None else find_sources([path])
        text = " ".join(DocumentReader(sources))
        self._words = text.split()
        if len(self._words) < LEAST_WORDS:
            raise DataError(f"--haystack: {path} has {len(self._words)} words; give a text of at least {LEAST_WORDS}")
        self.name = "bundled Shakespeare" if path is None else Path(path).name
        self.sha256 = hashlib.sha256(" ".join(self._words).encode()).hexdigest()

    def sentences(self, words: int) -> list[str]:
        """The first `words` words as sentences; the last one may be cut."""
        taken = self._words[:words]
        while len(taken) < words:
            taken = taken + self._words[: words - len(taken)]
        return _SENTENCE_END.split(" ".join(taken))
