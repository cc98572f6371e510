"""The README stays true: its tree exists and is complete, its commands are real, its recipe table is computed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("```text")[1].split("```")[0]
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip()]


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")) - {""}


def test_everything_in_the_tree_exists():
    stack: list[str] = []
    for line in TREE.strip().splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        stack = stack[: indent // 2]
        if "/" in name or "." in name:
            path = ROOT.joinpath(*stack, name.rstrip("/"))
            assert path.exists(), path
        stack.append(name.rstrip("/"))
        for named in re.findall(r"(?<![\w/])([\w.]+\.py)\b", " ".join(line.split()[1:])):
            folder = ROOT.joinpath(*stack) if ROOT.joinpath(*stack).is_dir() else ROOT.joinpath(*stack[:-1])
            assert (folder / named).exists(), f"{folder / named}"


def test_every_module_and_folder_of_the_stack_is_in_the_tree():
    for path in sorted((ROOT / "hola_megatron").iterdir()):
        if path.name.startswith("__") or path.name.endswith(".egg-info"):
            continue
        assert path.name in TREE, f"{path.name} is missing from README's tree"
    for path in (ROOT / "tools").glob("*.py"):
        assert path.name in TREE, f"{path.name} is missing from README's tree"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_real(command):
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif "-m" in words and "hola_megatron.train" in words:
        at = words.index("hola_megatron.train")
        from hola_megatron.config import load_recipe

        load_recipe(ROOT / words[at + 1], [w for w in words[at + 2:] if "=" in w])
    elif words[0] == "python":
        flags = re.findall(r"(--[a-z-]+)", command)
        said = help_of(words[1]) + (help_of(words[1], words[2]) if words[1] == "tools/convert.py" else "")
        assert [flag for flag in flags if flag not in said] == []
    else:
        assert words[0] == "sbatch" and (ROOT / words[1]).exists(), command


def help_of(*arguments: str) -> str:
    program = ["-m", arguments[0]] if arguments[0].startswith("hola_") else [arguments[0]]
    done = subprocess.run([sys.executable, *program, *arguments[1:], "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_in_the_table_are_all_and_only_those_shipped():
    table = README.split("## Recipes")[1].split("##")[0]
    named = set(re.findall(r"\b((?:hola|gdn|transformer)_(?:tiny|moe_\w+|[\d.]+[mb]\w*))\b", table))
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_nothing_tracked_is_large():
    large = [name for name in tracked() if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 1_000_000]
    assert large == []


def test_links_to_files_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        pattern = r"`((?:hola_megatron|kernels|tests|tools|docs|recipes|slurm)/[\w./-]+)`"
        for name in re.findall(pattern, document.read_text()):
            # slurm/site.sh is the user's own copy of slurm/site.example.sh
            assert list(ROOT.glob(name)) or "*" in name or name == "slurm/site.sh", f"{document.name} names {name}"
