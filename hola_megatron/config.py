"""The public names of recipes; they are defined in `hola_megatron.recipe`.

    python -m hola_megatron.config [TEXT]      every field with TEXT in its name: default and meaning
"""

import json

from hola_megatron.arguments import Parser
from hola_megatron.errors import RecipeError, run_cli
from hola_megatron.recipe.fields import default_values, describe_fields
from hola_megatron.recipe.loading import build_recipe, load_recipe
from hola_megatron.recipe.schema import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    DataSource,
    Fp8Config,
    GuardConfig,
    HamConfig,
    HqltConfig,
    InitConfig,
    LogConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
    ValidConfig,
)

__all__ = [
    "CacheConfig", "CheckpointConfig", "DataConfig", "DataSource", "Fp8Config", "GuardConfig", "HamConfig",
    "HqltConfig", "InitConfig", "LogConfig", "ModelConfig", "MoeConfig", "ParallelConfig", "Recipe", "TrainConfig",
    "ValidConfig",
    "build_recipe", "default_values", "describe_fields", "load_recipe",
]


def main(argv: list[str] | None = None) -> int:
    """Print every field of a recipe, its default and its meaning."""
    parser = Parser(prog="python -m hola_megatron.config", description="Print every field of a recipe.")
    parser.add_argument("text", nargs="?", default="", metavar="TEXT", help="only fields with this text in their names")
    text = parser.parse_args(argv).text
    defaults = default_values()
    fields = [(key, " ".join(meaning.split())) for key, _, meaning in describe_fields() if text in key]
    if not fields:
        raise RecipeError(f"{text}: no field has this text in its name; without it all fields are printed")
    width = max(len(key) for key, _ in fields)
    for key, meaning in fields:
        print(f"{key:{width}}  {json.dumps(defaults[key]) if key in defaults else 'required'}  {meaning}")
    return 0


if __name__ == "__main__":
    run_cli(main)
