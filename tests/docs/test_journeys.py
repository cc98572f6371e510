"""The commands of the pages on journeys are real: recipes load with their options, tools know their flags."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hola_megatron.config import build_recipe, load_recipe
from hola_megatron.files.yaml_text import parse_yaml

ROOT = Path(__file__).parents[2]
PAGES = ("continue.md", "watch.md", "fine_tuning.md", "serving.md", "troubleshooting.md")


def blocks(page: str) -> list[str]:
    """Indented blocks of a page, without indentation, their continued lines joined."""
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", (ROOT / "docs" / page).read_text(), re.M)
    return [re.sub(r"^    ", "", block, flags=re.M).replace("\\\n", " ") for block in found]


COMMANDS = sorted({line.split(" # ")[0].strip() for page in PAGES for block in blocks(page)
                   for line in block.splitlines() if line.startswith("python ")})


@functools.cache
def help_of(tool: str, *command: str) -> str:
    words = [sys.executable, ROOT / tool, *command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_real(command):
    _, first, *words = shlex.split(command)
    if first == "-m" and words[0] == "hola_megatron.train":
        load_recipe(ROOT / words[1], words[2:])
    elif first == "-m":
        assert words[0] == "hola_megatron.config"
    else:
        known = help_of(first, *words[:1]) if first in ("tools/checkpoint.py", "tools/convert.py") else help_of(first)
        assert [word for word in words if word.startswith("--") and word not in known] == []


def test_there_are_commands_of_every_journey():
    text = "\n".join(COMMANDS)
    for word in ("init.from=", "train.sequence_length=32768", "init.optimizer=keep", "checkpoint.upload=", "average",
                 "prune", "fetch", "tools/plot.py", "data.valid=", "to-hf", "tools/evaluate.py"):
        assert word in text, word


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)
                                   if block.startswith(("data:", "train:"))])
def test_every_section_of_a_recipe_is_one(block):
    values = load_recipe(ROOT / "recipes/hola_340m.yaml").to_dict()
    for section, fields in parse_yaml(block).items():
        values[section] |= fields
    values["train"]["steps"] = 10**7  # the phases of the page are long
    build_recipe(values)
