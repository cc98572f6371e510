"""The pages about studies, reports and reproduction: their commands exist, their hours are the plan's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hola_megatron.config import load_recipe
from hola_megatron.study.table import load_study

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("experiment", "memory_report", "reproduce")}
COMMANDS = sorted({line.split(" #")[0].strip() for page in PAGES.values()
                   for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()})


@pytest.fixture(scope="module")
def help_of():
    seen: dict[str, str] = {}

    def find(tool: str) -> str:
        if tool not in seen:
            seen[tool] = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True,
                                        check=True).stdout
        return seen[tool]
    return find


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_real(command, help_of):
    words = shlex.split(command)
    assert words[0] == "python" and words.count("python") == 1
    assert [word for word in words if word.startswith("recipes/") and not (ROOT / word).is_file()] == []
    if "hola_megatron.train" in words:
        at = words.index("hola_megatron.train") + 1
        load_recipe(ROOT / words[at], words[at + 1:])
    else:
        allowed = help_of(words[1])
        assert [flag for flag in re.findall(r"(?<= )--[a-z-]+", command) if flag not in allowed] == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_commands_of_studies_are_real(path, help_of):
    for smoke in (False, True):
        study = load_study(path, smoke=smoke)
        for command in (*study.before, *study.after):
            words = shlex.split(command)
            assert words[0] == "python" and (ROOT / words[1]).is_file()
            assert [word for word in words if word.startswith("--") and word not in help_of(words[1])] == []


def test_hours_of_the_reproduction_are_what_the_plan_prints():
    (command,) = [c for c in COMMANDS if "--hours" in c]
    printed = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.strip()
    table = PAGES["reproduce"].split("<!-- hours:begin -->")[1].split("<!-- hours:end -->")[0].strip()
    assert table == printed, f"docs/reproduce.md: put in what this prints: {command}"


def test_choices_of_the_reproduction_are_the_recipes():
    """The numbers of the page's tables and sentences, read from the recipes."""
    page = PAGES["reproduce"]
    for name in ("hola_340m", "hola_170m", "hola_46m"):
        recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
        assert f"{recipe.train.steps:,} x 524,288" in page
        assert recipe.tokens_per_step == 524_288 and recipe.data.documents == "separate"
        assert recipe.train.min_learning_rate == pytest.approx(recipe.train.learning_rate / 10)
        assert (recipe.train.beta1, recipe.train.beta2, recipe.train.adam_eps) == (0.9, 0.95, 1e-8)
        assert recipe.model.cache.gate_init == -4 and recipe.model.init_std == 0.02
        assert f"{recipe.model.mlp_hidden_size:,}" in page
