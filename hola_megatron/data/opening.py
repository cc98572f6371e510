"""Opening of a recipe's tokenizer and datasets, with checks against the recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hola_megatron.data.recut import open_dataset
from hola_megatron.data.stream import Mixture, PackedDataset, check_tokenizer
from hola_megatron.data.tokenizer import Tokenizer, load_tokenizer
from hola_megatron.errors import DataError
from hola_megatron.recipe.schema import Recipe


@dataclass
class Data:
    """What a run reads."""

    mixture: Mixture
    valid: dict[str, PackedDataset]  # by name; one without a name is ""
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        return self.mixture.fingerprint

    @property
    def valid_fingerprint(self) -> str | None:
        """Of all validation sets and their names; None without one."""
        if list(self.valid) in ([], [""]):
            return self.valid[""].fingerprint if self.valid else None
        named = [f"{name} {dataset.fingerprint}" for name, dataset in sorted(self.valid.items())]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()


def open_data(recipe: Recipe) -> Data:
    """The mixture, the validation sets and the tokenizer, checked against each other and the recipe."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    mixture = open_mixture(recipe, recipe.data.cache)
    named = recipe.data.valid or {}
    valid = {name: open_dataset(path, recipe.train.sequence_length, cache=recipe.data.cache)
             for name, path in ({"": named} if isinstance(named, str) else named).items()}
    for dataset in [*mixture.datasets, *valid.values()]:
        check_tokenizer(dataset, tokenizer)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(f"{recipe.data.tokenizer}: has {tokenizer.vocab_size} tokens, model.vocab_size is "
                        f"{recipe.model.vocab_size}; make model.vocab_size at least as large")
    for dataset in valid.values():  # else damage shows at the first validation, hours later
        dataset.verify_first(recipe.valid.samples)
    return Data(mixture, valid, tokenizer)


def open_mixture(recipe: Recipe, cache: str | None) -> Mixture:
    """The recipe's datasets as one sequence of samples. cache: local folder for shards of remote data."""
    opened: dict[str, PackedDataset] = {}

    def dataset(path: str) -> PackedDataset:
        if path not in opened:
            opened[path] = open_dataset(path, recipe.train.sequence_length, cache=cache)
        return opened[path]

    sources = recipe.data.train
    paths = [sources] if isinstance(sources, str) else [source.path for source in sources]
    weights = None if isinstance(sources, str) else [source.weight for source in sources]
    budgets = [[(dataset(stream.path), recipe.samples_of(stream.tokens)) for stream in phase.streams]
               for phase in recipe.data.phases or ()]
    return Mixture([dataset(path) for path in paths], weights=weights, seed=recipe.train.seed, budgets=budgets)
