"""Sample text from the model in training."""

from __future__ import annotations

import torch

from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.engine.base import Engine
from hola_megatron.engine.sampling import next_logits


class NoSample(Exception):
    """No text could be generated; the message is the reason."""


def sample_text(engine: Engine, tokenizer: Tokenizer, prompt: str, tokens: int, *, seed: int,
                temperature: float = 0.8) -> str:
    """Continue `prompt` by up to `tokens` tokens. A collective; returns the same text on every rank.

    The sampling depends on `seed` only and changes no global random state. Raises NoSample, on every rank, when logits
    are not finite or the prompt cannot be encoded.
    """
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    try:
        ids = start + tokenizer.encode(prompt)
    except (ValueError, TypeError) as error:
        raise NoSample(f"log.sample_prompt cannot be encoded ({error})") from None
    if not ids:
        ids = [tokenizer.eos_id]  # a text starts after the end of another
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        logits = next_logits(engine, torch.tensor(ids))[: tokenizer.vocab_size].cpu()
        if not logits.isfinite().all():
            raise NoSample("the model's logits are not finite")
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode([i for i in ids if i not in (tokenizer.bos_id, tokenizer.eos_id)])
