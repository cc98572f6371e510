"""The structure of the packages, read from their sources: no circles of imports, files and functions of limited size.

Every import counts: those inside functions and those for type annotations too.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 450, 70
LONG_KERNELS = {"_pair_gradient_kernel": 93}  # split in two, its machine code is another
SOURCES = [path for folder in ("hola_megatron", "kernels/hola_kernels", "tools")
           for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(root: Path, package: str) -> dict[str, set[str]]:
    """{module: modules of the same package that it imports}, whole dotted names."""
    modules = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in modules.items():
        wanted = {target for node in ast.walk(ast.parse(path.read_text())) for target in _targets(node, name, path)}
        found[name] = {known for target in wanted for known in (target, target.rpartition(".")[0])
                       if known in modules and known != name and (known == target or target not in modules)}
    return found


def _targets(node: ast.AST, module: str, path: Path) -> list[str]:
    """Names that a statement imports: package.module or package.module.name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
    start = ".".join(filter(None, (base, node.module)))
    return [f"{start}.{alias.name}" for alias in node.names]


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """"a -> b -> a" for one circle through each node that is on a circle and not on one named before."""
    found, done = [], set()
    for start in sorted(arrows):
        path = None if start in done else _path_back(arrows, start)
        if path:
            found.append(" -> ".join(path))
            done |= set(path)
    return found


def _path_back(arrows: dict[str, set[str]], start: str) -> list[str] | None:
    """The shortest way from a node along the arrows back to it."""
    paths, seen = [[start]], set()
    for path in paths:
        for target in sorted(arrows.get(path[-1], ())):
            if target == start:
                return [*path, start]
            if target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return None


def rooms(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same arrows between the entries of the package's own folder."""
    found: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        room = ".".join(name.split(".")[:2])
        found.setdefault(room, set()).update(".".join(t.split(".")[:2]) for t in targets if "." in t)
    return {room: targets - {room} for room, targets in found.items()}


# what hola_megatron may import of hola_kernels: the package's public names, one module or folder an operation, and the
# stages that context parallelism exchanges messages between
KERNELS_PUBLIC = {"backend", "cross_entropy", "delta_product", "gates", "ham", "hqlt", "kept_attention", "modules",
                  "rms_norm", "rotary", "softmax_attention", "stages", "state_delay", "swiglu", "transfer",
                  "triton_stages", "verify"}


def test_the_stack_imports_public_modules_of_the_kernels_only():
    found = set()
    for path in sorted((ROOT / "hola_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hola_kernels."):
                module = node.module.split(".")[1]
                found |= {(path.name, module)} if module not in KERNELS_PUBLIC else set()
                found |= {(path.name, alias.name) for alias in node.names if alias.name.startswith("_")}
    assert found == set()


@pytest.mark.parametrize(("root", "package"), [(ROOT, "hola_megatron"), (ROOT / "kernels", "hola_kernels")])
def test_modules_import_each_other_in_no_circle(root, package):
    assert circles(imports(root, package)) == []


def test_folders_import_each_other_in_no_circle():
    assert circles(rooms(imports(ROOT, "hola_megatron"))) == []


def test_circles_are_found(tmp_path):
    """Inside functions, for annotations, by relative imports, and between folders without one between modules."""
    sources = {"p/__init__.py": "", "p/a.py": "def f():\n    from p import b\n", "p/b.py": "from .c import x\n",
               "p/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.a\n",
               "p/one/__init__.py": "", "p/one/top.py": "from p.two.top import x\n", "p/one/low.py": "",
               "p/two/__init__.py": "", "p/two/top.py": "", "p/two/other.py": "import p.one.low\n"}
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = imports(tmp_path, "p")
    assert circles(found) == ["p.a -> p.b -> p.c -> p.a"]
    assert circles(rooms(found)) == ["p.a -> p.b -> p.c -> p.a", "p.one -> p.two -> p.one"]


def test_test_files_have_unique_names():
    """pytest imports a test file by its name alone; the second of two with one name is an error at collection."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, following in itertools.pairwise(names) if name == following] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_have_a_limited_size(path):
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    long = {node.name: lines for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            and (lines := node.end_lineno - node.lineno + 1) > LONG_KERNELS.get(node.name, FUNCTION_LINES)}
    assert long == {}
