"""Which tokens of a Hugging Face tokenizer begin a document, end one, and pad a batch.

The files beside a tokenizer.json decide, in this order: tokenizer_config.json and special_tokens_map.json
(they name tokens), generation_config.json and config.json (they give ids). Where none of them says anything,
the added tokens that are marked `"special": true` and have a usual name decide, if exactly one does. A
token that is not marked special is ordinary text: Gemma's vocabulary has `</s>` as an HTML tag.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from hola_megatron.errors import DataError
from hola_megatron.files import FileProblem, MissingFile, read_json
from hola_megatron.files.schemas import SPECIAL_IDS, TOKENIZER_SETTINGS

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<｜end▁of▁sentence｜>", "[EOS]", "<EOS>")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<｜begin▁of▁sentence｜>", "[BOS]",
             "<BOS>")
PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endofpad|>",
             "<｜▁pad▁｜>")
# tokens that vocabularies reserve for whoever needs one
SPARE = re.compile(r"<\|?(reserved_special_token_|reserved_?|unused_?|extra_|extra_id_|dummy_?)\d+\|?>|\[unused\d+\]")


# in the order in which they decide
NAME_FILES = ("tokenizer_config.json", "special_tokens_map.json")
ID_FILES = ("generation_config.json", "config.json")
Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SpecialTokens:
    """eos ends a document; bos begins one, or None; pad fills batches and is nothing else, or None."""

    eos: str
    bos: str | None
    pad: str | None


def choose_special_tokens(model: tokenizers.Tokenizer, folder: Path | None, where: str) -> SpecialTokens:
    """The special tokens of `model`.

    Args:
        model: as loaded, post-processor included.
        folder: where the files that accompany it lie; None: there are none.
        where: names the tokenizer in errors.

    Raises:
        DataError: no token ends a document, or several may; a file beside the tokenizer cannot be read.
    """
    files = _read(folder) if folder is not None else {}
    eos = _named(model, files, "eos", where) or _by_name(model, "eos", EOS_NAMES, files, where)
    if eos is None:
        raise DataError(_no_eos(model, where))
    bos = _bos(model, files, where)
    bos = None if bos == eos else bos
    return SpecialTokens(eos, bos, _pad(model, files, {eos, bos}, where))


def leads_with(model: tokenizers.Tokenizer) -> str | None:
    """The special token that the post-processor puts before a text, or None."""
    plain = model.encode("a", add_special_tokens=False).tokens
    whole = model.encode("a", add_special_tokens=True).tokens
    return whole[0] if len(whole) > len(plain) and whole[0] not in plain[:1] else None


def spare_name(special: dict[str, int]) -> str | None:
    """Of special tokens and their ids: one that pads by its name, else the first that is reserved, else None."""
    reserved = sorted((number, name) for name, number in special.items() if SPARE.fullmatch(name))
    return next((name for name in [*PAD_NAMES, *(name for _, name in reserved)] if name in special), None)


def _read(folder: Path) -> Files:
    """The accompanying files that exist, by name."""
    found = {}
    for name in (*NAME_FILES, *ID_FILES):
        try:
            found[name] = read_json(folder / name, TOKENIZER_SETTINGS if name in NAME_FILES else SPECIAL_IDS)
        except MissingFile:
            continue
        except FileProblem as problem:
            raise DataError(f"tokenizer {folder / name}: {problem}; repair the file, or remove it") from None
    return found


def _named(model: tokenizers.Tokenizer, files: Files, kind: str, where: str) -> str | None:
    """The token that the accompanying files name as `kind` (bos, eos, pad), or None."""
    names = {file: _content(files[file].get(f"{kind}_token")) for file in NAME_FILES if file in files}
    names = {file: name for file, name in names.items() if name}
    if len(set(names.values())) > 1:
        shown = ", ".join(f"{name!r} ({file})" for file, name in names.items())
        raise DataError(f"{where}: {kind}_token is named twice and differently: {shown}; make the two files agree")
    for file, name in names.items():
        if model.token_to_id(name) is None:
            raise DataError(f"{where}: {file} names {name!r} as {kind}_token, which is no token of the vocabulary; "
                            "name one that is")
        return name
    return _one_id(model, files, kind)


def _one_id(model: tokenizers.Tokenizer, files: Files, kind: str) -> str | None:
    """The token of the first file that gives exactly one id; a list of several says where turns end, not documents."""
    for file in ID_FILES:
        ids = _ids(files, file, kind)
        if len(set(ids)) == 1 and ids[0] >= 0 and (name := model.id_to_token(ids[0])) is not None:
            return name
    return None


def _by_name(model: tokenizers.Tokenizer, kind: str, usual: tuple[str, ...], files: Files,
             where: str) -> str | None:
    """The one special added token with a usual name; those whose ids a file lists come first."""
    special = _special(model)
    found = [name for name in usual if name in special]
    listed = {number for file in ID_FILES for number in _ids(files, file, kind)}
    found = [name for name in found if special[name] in listed] or found
    if len(found) > 1:
        raise DataError(f"{where}: {len(found)} special tokens may be its {kind}: {', '.join(found)}; "
                        f"{_how(kind, found[0])}")
    return found[0] if found else None


def _bos(model: tokenizers.Tokenizer, files: Files, where: str) -> str | None:
    """The token before a document. A file that says there is none, and a template that adds none, are believed."""
    leading = leads_with(model)
    configured = files.get("tokenizer_config.json")
    if configured is not None:
        silent = configured.get("bos_token", "") is None
        if silent or (configured.get("add_bos_token") is False and leading is None):
            return None
    named = _named(model, files, "bos", where)
    if named is not None:
        return named
    if leading in BOS_NAMES and leading in _special(model):
        return leading
    return _by_name(model, "bos", BOS_NAMES, files, where)


def _pad(model: tokenizers.Tokenizer, files: Files, taken: set[str | None], where: str) -> str | None:
    """A special token that stands for nothing else: the one named, one with a usual name, or a reserved one."""
    special = {name: number for name, number in _special(model).items() if name not in taken}
    unknown = getattr(model.model, "unk_token", None)
    if not getattr(model.model, "byte_fallback", False):
        special.pop(unknown, None)  # texts produce it
    named = next((name for file in NAME_FILES if (name := _content(files.get(file, {}).get("pad_token")))), None)
    named = named or _one_id(model, files, "pad")
    return named if named in special else spare_name(special)


def _special(model: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: number for number, token in model.get_added_tokens_decoder().items() if token.special}


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _ids(files: Files, file: str, kind: str) -> list[int]:
    ids = files.get(file, {}).get(f"{kind}_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _how(kind: str, example: str) -> str:
    return f'choose one in a tokenizer_config.json beside the tokenizer.json: {{"{kind}_token": "{example}"}}'


def _no_eos(model: tokenizers.Tokenizer, where: str) -> str:
    added = model.get_added_tokens_decoder().values()
    ordinary = [token.content for token in added if token.content in EOS_NAMES]
    if ordinary:
        return (f"{where}: {', '.join(ordinary)} is not marked special, so text that holds it would end a document; "
                f'mark it "special": true, or {_how("eos", ordinary[0])}')
    return (f"{where}: none of its {len(added)} added tokens is an end of text, looked for {', '.join(EOS_NAMES)}; "
            f"add one of these as a special token, or {_how('eos', EOS_NAMES[0])}")
