"""The documents stay true: paths and links exist, commands parse, generated pages and tables are current."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "kernels/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
ARCHIVE = ROOT / "docs/log.md"  # dated notes: they name what there was then
TREE = CONTRIBUTING.split("```text")[1].split("```")[0]
COMMANDS = [line.split(" #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip()]
OPTIONAL = {"slurm/site.sh"}  # the user's own copy of slurm/site.example.sh


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


def test_every_folder_of_the_stack_and_every_tool_is_in_the_tree():
    for path in sorted((ROOT / "hola_megatron").iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"{path.name}/" in TREE, f"{path.name}/ is missing from CONTRIBUTING.md's tree"
    for path in (ROOT / "tools").glob("*.py"):
        assert path.name in TREE, f"{path.name} is missing from CONTRIBUTING.md's tree"


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
        allowed = help_of(words[1]) + (help_of(words[1], words[2]) if words[1] == "tools/convert.py" else "")
        assert [flag for flag in flags if flag not in allowed] == []
        assert [word for word in words if word.startswith("recipes/") and not (ROOT / word).exists()] == []
    else:
        assert words[0] in ("sbatch", "cp") and (ROOT / words[1]).exists(), command


@functools.cache
def help_of(*arguments: str) -> str:
    program = ["-m", arguments[0]] if arguments[0].startswith("hola_") else [arguments[0]]
    done = subprocess.run([sys.executable, *program, *arguments[1:], "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", re.findall(r"finished: .*; runs/(\w+)", README))
def test_the_last_lines_of_runs_follow_from_their_recipes(recipe):
    """As trainer prints them when a run ends: its steps, its tokens, its folder."""
    from hola_megatron.config import load_recipe

    loaded = load_recipe(ROOT / f"recipes/{recipe}.yaml")
    (line,) = re.findall(rf"finished: .*; runs/{recipe}\b", README)
    steps, tokens = re.fullmatch(r"finished: ([\d,]+) steps, ([\d.]+[kMB]) tokens; .*", line).groups()
    assert int(steps.replace(",", "")) == loaded.train.steps
    scale = {"k": 1e3, "M": 1e6, "B": 1e9}[tokens[-1]]
    assert float(tokens[:-1]) * scale == pytest.approx(loaded.train.steps * loaded.tokens_per_step, rel=5e-3)


def test_recipes_in_the_table_are_all_and_only_those_shipped():
    table = README.split("## Recipes")[1].split("##")[0]
    named = set(re.findall(r"^\|.*$", table, re.M))
    name = r"\b((?:hola|gdn|ham|hqlt|deltaproduct|bmojo|transformer)_(?:tiny|moe_\w+|(?:[a-z]+_)*[\d.]+[mb]\w*))\b"
    named = set(re.findall(name, "\n".join(named)))
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_the_python_example_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels", capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == re.search(r"print\(.*# (.*)", code).group(1)


def test_hours_are_what_the_tool_prints(capsys, monkeypatch):
    (command,) = [c for c in COMMANDS if "--hours" in c]
    tool = load_tool("plan")
    monkeypatch.setattr(sys, "argv", ["tools/plan.py", *[str(ROOT / w) if w.startswith("recipes/") else w
                                                          for w in command.split()[2:]]])
    assert tool.main() == 0
    table = README.split("<!-- hours:begin -->")[1].split("<!-- hours:end -->")[0].strip()
    assert table == capsys.readouterr().out.strip(), f"README.md: put in what this prints: {command}"


def test_recipe_page_is_what_the_tool_prints():
    assert (ROOT / "docs/recipe.md").read_text() == load_tool("recipe_reference").reference(), (
        "run: python tools/recipe_reference.py > docs/recipe.md")


def test_recipe_page_has_every_field_of_the_schema():
    from hola_megatron.config import describe_fields

    page = (ROOT / "docs/recipe.md").read_text()
    missing = [key for key, _, meaning in describe_fields()
               if f"| `{key}` |" not in page or " ".join(meaning.split()).replace("|", "\\|") not in page]
    assert missing == []


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_tracked_is_large():
    large = [name for name in tracked() if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 1_000_000]
    assert large == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != ARCHIVE], ids=lambda p: f"{p.parent.name}_{p.name}")
def test_paths_and_links_exist(page):
    text = page.read_text()
    pattern = r"`((?:hola_megatron|kernels|tests|tools|docs|recipes|slurm)/[\w./-]+)`"
    missing = [name for name in re.findall(pattern, text) if name not in OPTIONAL and not list(ROOT.glob(name))]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(link)
    assert missing == []


def anchors(file: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.S), re.M)}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name}" not in index] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p not in (ARCHIVE, ROOT / "docs/README.md")],
                         ids=lambda p: f"{p.parent.name}_{p.name}")
def test_no_page_refers_to_the_archive(page):
    allowed = page.name == "CONTRIBUTING.md"  # says where negative results are written down
    assert allowed or "log.md" not in page.read_text()


@pytest.mark.parametrize("page", [p for p in PAGES if p != ARCHIVE], ids=lambda p: f"{p.parent.name}_{p.name}")
def test_lines_of_prose_are_short(page):
    """At most 120 characters, but for tables, code and lines that are one link."""
    text = re.sub(r"```.*?```", lambda block: "\n" * block.group().count("\n"), page.read_text(), flags=re.S)
    long = [number for number, line in enumerate(text.splitlines(), 1)
            if len(line) > 120 and not line.startswith(("|", "    "))]
    assert long == []


def test_no_cell_of_a_table_in_the_readme_is_long():
    assert [cell for line in README.splitlines() if line.startswith("|") for cell in line.split("|")
            if len(cell) > 200] == []
