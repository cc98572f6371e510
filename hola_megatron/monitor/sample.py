"""Sample text from the model in training: the quickest look at what it has learnt."""

from __future__ import annotations

import torch

from hola_megatron.data.tokenizer import Tokenizer
from hola_megatron.engine.base import Engine


def sample_text(engine: Engine, tokenizer: Tokenizer, prompt: str, tokens: int, *, seed: int,
                temperature: float = 0.8) -> str:
    """Continue `prompt` by up to `tokens` tokens; every rank calls it and gets the same text.

    The draw depends on `seed` alone, never on a random state that training would then lack.
    """
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    ids = start + tokenizer.encode(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        logits = engine.next_logits(torch.tensor(ids))[: tokenizer.vocab_size].cpu()
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode([i for i in ids if i not in (tokenizer.bos_id, tokenizer.eos_id)])
