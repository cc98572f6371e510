"""What to prepare, and what was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hola_megatron import __version__
from hola_megatron.data.shards import FORMAT, FORMAT_VERSION
from hola_megatron.data.sources import BUNDLED_PARTS
from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.data.urls import filesystem, is_url
from hola_megatron.errors import RecipeError
from hola_megatron.paths import path_problem

DEFAULT_SHARD_SIZE = 1 << 26
_MAX_SHARD_SIZE = (1 << 32) - 1  # MDS stores offsets within a shard as uint32
_MOST_PARTS = 99_999
PACKINGS = ("stream", "whole")


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare; the fields are the options of tools/prepare_data.py.

    Attributes:
        inputs: files, folders or glob patterns, also as URLs; empty if `bundled` is given.
        out: folder to make, or a URL.
        tokenizer: as in `load_tokenizer`.
        sequence_length: tokens predicted by a sample (>= 1).
        bundled: "train" or "valid": the text that comes with the project, instead of `inputs`.
        text_field: key (jsonl) or column (parquet) of the text.
        split_on: txt only: the line that parts documents ("" = blank lines); None = a file is a document.
        workers: tokenizing processes (>= 1); the output does not depend on it.
        shard_size: most bytes of a shard.
        keep_tail: pad the last, partial sample with eos instead of dropping it (validation sets).
        packing: "stream" cuts one stream of all documents into samples; "whole" never cuts a document that fits one
            (best_fit.py).
        drop_duplicates: leave out documents whose text was there before; else they are counted only.
        overwrite: replace `out` if it is a dataset already.
        parts: cut the input into so many parts, each packed by itself, which `workers` processes make; the output
            depends on it.
        part: (I, N): make part I (1 .. N) of N alone, as the folder `out`/part-IIIII-of-NNNNN.
        work: where `out` is a URL: local folder in which parts are made before they are uploaded.
    """

    inputs: Sequence[str]
    out: str
    tokenizer: str
    sequence_length: int
    bundled: str | None = None
    text_field: str = "text"
    split_on: str | None = None
    workers: int = 1
    shard_size: int = DEFAULT_SHARD_SIZE
    keep_tail: bool = False
    packing: str = "stream"
    drop_duplicates: bool = False
    overwrite: bool = False
    parts: int = 1
    part: tuple[int, int] | None = None
    work: str | None = None

    def check(self) -> None:
        """Raise `RecipeError` with every option that cannot be used."""
        problems = [problem for given in self.inputs if (problem := _input_problem(given))]
        problems += self._output_problems()
        if bool(self.inputs) == bool(self.bundled):
            problems.append("inputs: give input files or --bundled, one of the two")
        if self.bundled and self.bundled not in BUNDLED_PARTS:
            problems.append(f"--bundled {self.bundled}: allowed are {', '.join(BUNDLED_PARTS)}")
        if self.sequence_length < 1:
            problems.append(f"--sequence-length {self.sequence_length}: must be 1 or more")
        if self.workers < 1:
            problems.append(f"--workers {self.workers}: must be 1 or more")
        if self.shard_size > _MAX_SHARD_SIZE:
            problems.append(f"--shard-size {self.shard_size}: must be {_MAX_SHARD_SIZE} or less")
        if self.packing not in PACKINGS:
            problems.append(f"--packing {self.packing}: allowed are {', '.join(PACKINGS)}")
        if self.packing == "whole" and self.keep_tail:
            problems.append("--keep-tail: is for --packing stream; whole packing drops no document; leave it away")
        if not 1 <= self.parts <= _MOST_PARTS:
            problems.append(f"--parts {self.parts}: must be 1 to {_MOST_PARTS}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1] <= _MOST_PARTS:
            problems.append(f"--part {self.part[0]}/{self.part[1]}: must be 1/N to N/N, N at most {_MOST_PARTS}")
        if self.part is not None and self.parts > 1:
            problems.append("--part: makes one part, --parts all of them; give one of the two")
        if self.bundled and (self.parts > 1 or self.part):
            problems.append("--bundled: is one small file, which is not cut into parts; leave --parts and --part away")
        if problems:
            raise RecipeError(problems)

    def _output_problems(self) -> list[str]:
        if not is_url(self.out):
            problem = path_problem("--out", self.out)
            return [problem] if problem else []
        found = [problem] if (problem := _url_problem("--out", self.out)) else []
        if self.work is None:
            found.append(f"--out {self.out}: needs --work, a local folder for what is not uploaded yet")
        elif problem := path_problem("--work", self.work):
            found.append(problem)
        if self.bundled or self.overwrite:
            found.append(f"--out {self.out}: a URL takes neither --bundled nor --overwrite; give another --out")
        return found[:1]

    def shape(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Everything but the input files that the bytes of the dataset depend on."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "project_version": __version__,
                "tokenizer": tokenizer.identity(), "sequence_length": self.sequence_length,
                "text_field": self.text_field, "split_on": self.split_on, "shard_size": self.shard_size,
                "keep_tail": self.keep_tail, "packing": self.packing, "drop_duplicates": self.drop_duplicates}


def _input_problem(given: str) -> str | None:
    return _url_problem("inputs", given) if is_url(given) else path_problem("inputs", given, use="is read")


def _url_problem(name: str, url: str) -> str | None:
    try:
        filesystem(url)
    except RecipeError as error:
        return f"{name}: {error}"
    return None


@dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        out: the folder.
        documents, empty: documents packed, and left out because they had no text.
        duplicates, dropped: documents whose text was there before, and whether they were left out.
        tokens: tokens of the whole stream, bos and eos included.
        samples, shards: samples written and the files they lie in.
        text_bytes: UTF-8 bytes of the documents.
        padding: places of the samples that hold no token; None where documents are cut.
    """

    out: str
    documents: int
    empty: int
    duplicates: int
    dropped: bool
    tokens: int
    samples: int
    shards: int
    text_bytes: int
    padding: int | None
    sequence_length: int

    def __str__(self) -> str:
        notes = [f"{self.empty:,} without text left out"] if self.empty else []
        if self.duplicates:
            notes.append(f"{self.duplicates:,} duplicates {'left out' if self.dropped else 'among them'}")
        said = f" ({', '.join(notes)})" if notes else ""
        lines = [
            f"documents      {self.documents:,}{said}",
            f"tokens         {self.tokens:,}",
            f"samples        {self.samples:,} in {self.shards:,} shards",
            f"bytes a token  {self.text_bytes / self.tokens:.3f}",
            f"out            {self.out}",
        ]
        if self.padding is not None:
            share = self.padding / (self.samples * (self.sequence_length + 1))
            lines.insert(3, f"padding        {100 * share:.2f} %")
        return "\n".join(lines)
