"""RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654), with its published templates, at any length.

    niah_single_1     noise sentences, one number           niah_multikey_1   running text, four keys, one asked for
    niah_single_2     running text, one number              niah_multivalue   running text, four numbers of one key
    niah_single_3     running text, one uuid                niah_multiquery   running text, four keys, all asked for
    vt                variable tracking: one chain of five variables, after an example
    cwe               the ten most common words of a numbered list, after an example

A length is that of prompt and answer in the model's tokens (cwe: up to about 100,000 tokens, where the lists have no
more words). What differs from RULER: its running text is essays without
an open licence, here any text (`Haystack`); sentences end at . ! or ? instead of by NLTK; the random choices are our
own. Keys are adjective-noun pairs of the same lists (the package wonderwords).
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hola_megatron.evaluate.recall.prompts import Prompt, Text, prompts
from hola_megatron.evaluate.recall.words import NOISE, Haystack, all_words, word_lists

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
ONE = ("A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
       "the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
       " The special magic {kind} for {query} mentioned in the provided text is")
SEVERAL = ("Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you "
           "about the {kind}s afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} mentioned in "
           "the provided text? The special magic {kind}s for {query} mentioned in the provided text are")
TRACKING = ("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
            "Question: Find all variables that are assigned the value {query} in the text above. Answer: According to "
            "the chain(s) of variable assignment in the text above, {count} variables are assgined the value {query}, "
            "they are:")  # spelled as published
COMMON = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
          "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: "
          "The top 10 words that appear most often in the list are:")
DEPTHS = [round(n * 100 / 39) for n in range(40)]  # percent, of needles in running text
HOPS, EXAMPLE_NOISE = 4, 10
COMMON_WORDS, LONG = 10, 4096  # cwe: from this length on words are repeated more often


@dataclass(frozen=True)
class Needles:
    """A needle task: filling, how many keys and values of each, and how many keys are asked for."""

    kind: str  # of value: number or uuid
    in_text: bool  # running text, else noise sentences
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {"niah_single_1": Needles("number", False), "niah_single_2": Needles("number", True),
           "niah_single_3": Needles("uuid", True), "niah_multikey_1": Needles("number", True, keys=4),
           "niah_multivalue": Needles("number", True, values=4),
           "niah_multiquery": Needles("number", True, keys=4, queries=4)}
ANSWERS = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120}  # tokens generated
TASKS = tuple(ANSWERS)


def ruler_prompts(task: str, tokenizer: Any, *, length: int, count: int, seed: int, haystack: Haystack) -> list[Prompt]:
    """`count` prompts of one of TASKS. Raises RecipeError where the length does not hold it."""
    most = 2**31
    if task in NEEDLES:
        needles = NEEDLES[task]
        make: Callable[[random.Random, int], Text] = partial(_needles, needles, haystack)
        least = 50 if needles.in_text else needles.keys * needles.values
    elif task == "vt":
        make, least = _tracking, HOPS + 1
    else:
        make, least, most = partial(_common, length >= LONG), COMMON_WORDS + 1, len(all_words())
    return prompts(task, tokenizer, make, length=length, answer=ANSWERS[task], count=count, seed=seed, least=least,
                   most=most)


def _needles(task: Needles, haystack: Haystack, draw: random.Random, units: int) -> Text:
    """units: words of running text, or noise sentences."""
    nouns, adjectives, _ = word_lists()
    values: dict[str, list[str]] = {}
    while len(values) < task.keys:
        key = f"{draw.choice(adjectives)}-{draw.choice(nouns)}"
        values[key] = [_value(task.kind, draw) for _ in range(task.values)]
    needles = [NEEDLE.format(kind=task.kind, key=key, value=value) for key in values for value in values[key]]
    draw.shuffle(needles)
    if task.in_text:
        sentences = haystack.sentences(units)
        places = sorted(len(sentences) * depth // 100 for depth in draw.sample(DEPTHS, len(needles)))
    else:
        sentences = [NOISE] * units
        places = sorted(draw.sample(range(units), len(needles)))
    for place, needle in zip(reversed(places), needles, strict=True):
        sentences.insert(place, needle)
    asked = draw.sample(list(values), task.queries)
    expected = tuple(value for key in asked for value in values[key])
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    template = ONE if len(expected) == 1 else SEVERAL
    context = (" " if task.in_text else "\n").join(sentences)
    return Text(template.format(kind=task.kind, context=context, query=query), expected)


def _value(kind: str, draw: random.Random) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return str(draw.randint(1_000_000, 9_999_999))


def _tracking(draw: random.Random, units: int) -> Text:
    """units: noise sentences. The example before it has shorter names."""
    example, names = _chain(draw, EXAMPLE_NOISE, letters=3)
    question, expected = _chain(draw, units, letters=5)
    return Text(f"{example} {' '.join(names)}\n\n{question}", tuple(expected))


def _chain(draw: random.Random, noise: int, letters: int) -> tuple[str, list[str]]:
    """(question with its text, the names of the chain)."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = draw.randint(10_000, 99_998)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]
    lines = [f"{NOISE}\n"] * noise
    for n, place in enumerate(sorted(draw.sample(range(noise), len(chain)))):
        lines.insert(place + n, chain[n])
    context = " ".join(lines).replace(". \n", ".\n")
    return TRACKING.format(context=context, query=value, count=len(names)), names


def _common(long: bool, draw: random.Random, units: int) -> Text:
    """units: different words. An example of a list comes first."""
    example, words = _list(draw, 40 if long else 20, *((10, 3) if long else (3, 1)))
    question, expected = _list(draw, units, *((30, 3) if long else (6, 1)))
    answer = " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))
    return Text(f"{example}{answer}\n{question}", tuple(expected))


def _list(draw: random.Random, different: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """(question with its list, the common words)."""
    words = draw.sample(all_words(), different)
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listed = common * often + others * seldom
    draw.shuffle(listed)
    return COMMON.format(context=" ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))), common
