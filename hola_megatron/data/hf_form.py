"""tokenizer.json texts: of raw bytes, and of a given one with the bos that training puts before documents."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors


def byte_level_form(bos: str, eos: str) -> str:
    """A byte-level BPE without merges: id = byte for 0..255, then `bos`, then `eos`."""
    letters = _byte_letters()
    form = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    form.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    form.decoder = decoders.ByteLevel()
    form.add_special_tokens([_special(bos), _special(eos)])
    form.post_processor = leading(bos, 256)
    return form.to_str()


def with_leading_bos(form: str, bos: str | None, bos_id: int | None) -> str:
    """`form` so that it puts `bos`, or nothing, before a text and nothing after it, as documents are trained.

    The same text where it does already. Other steps of its post-processor are dropped.
    """
    loaded = Tokenizer.from_str(form)
    loaded.no_truncation()
    plain, whole = (loaded.encode("a b", add_special_tokens=special).ids for special in (False, True))
    if whole == ([] if bos is None else [bos_id]) + plain:
        return form
    steps = [step for step in _steps(json.loads(form)["post_processor"]) if step["type"] == "ByteLevel"]
    if bos is not None:
        bare = Tokenizer(models.BPE())
        bare.post_processor = leading(bos, bos_id)
        steps.append(json.loads(bare.to_str())["post_processor"])
    changed = json.loads(form)
    sequence = {"type": "Sequence", "processors": steps} if len(steps) > 1 else None
    changed["post_processor"] = sequence or (steps[0] if steps else None)
    return json.dumps(changed, ensure_ascii=False)


def _steps(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The single steps of a post-processor, nested sequences flattened."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [step for inner in processor["processors"] for step in _steps(inner)]
    return [processor]


def _byte_letters() -> list[str]:
    """The character by which byte-level models write each byte: itself if printable, else one from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spare = iter(sorted(letter for letter in alphabet if ord(letter) >= 256))
    return [chr(byte) if chr(byte) in alphabet else next(spare) for byte in range(256)]


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def leading(token: str, token_id: int) -> processors.TemplateProcessing:
    """A post-processor that puts `token` before every text."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
    )
