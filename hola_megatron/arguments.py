"""Arguments of the command-line programs: one parser class, one set of number types.

`Parser` answers a wrong argument with a RecipeError of one line, which `errors.run_cli` prints and turns into code 2;
argparse itself prints its whole usage. The types take plain ASCII numbers only: no nan, inf, 1e400, underscores,
digits of other scripts or empty text, and nothing beyond what the program can use.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

from hola_megatron.errors import RecipeError, shown

LARGEST = 2**31 - 1
_WHOLE, _DECIMAL = re.compile(r"[+-]?[0-9]+"), re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Parser(argparse.ArgumentParser):
    """Raises RecipeError instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())[:500]
        raise RecipeError(f"{text.removeprefix('argument ')}; --help of {self.prog} shows the options")


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    def parse(text: str) -> int:
        if not _WHOLE.fullmatch(text) or len(text) > 30:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} must be at most {most}")
        return value

    return parse


def number(above: float = 0.0, most: float = 1e12) -> Callable[[str], float]:
    """An argparse type: a finite number above `above`, at most `most`."""
    def parse(text: str) -> float:
        value = float(text) if _DECIMAL.fullmatch(text) and len(text) <= 100 else math.nan
        if not above < value <= most:
            text = text if math.isfinite(value) else shown(text)
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number above {above:g}, {most:g} at most")
        return value

    return parse


def text(value: str) -> str:
    """An argparse type: text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("'' is empty; give a value, or leave the option away")
    return value


def names(value: str) -> list[str]:
    """An argparse type: names with commas between them."""
    found = [name.strip() for name in value.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{shown(value)} has an empty name; give names with one comma between them")
    return found


count = whole(1)
any_whole = whole(-LARGEST)  # where the program itself says what is allowed
positive = number()
any_number = number(above=-1e12)
gigabytes = number(above=1e-6, most=1e6)  # of one file; the bytes of it are a whole number above 0


def environment_number(name: str, default: str, kind: Callable[[str], Any]) -> Any:
    """The number in an environment variable, or `default`; RecipeError names the variable."""
    try:
        return kind(os.environ.get(name, default))
    except argparse.ArgumentTypeError as error:
        raise RecipeError(f"{name} (environment): {error}; unset it or give such a number") from None
