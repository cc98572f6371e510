"""hola_kernels as one file: what an exported model computes with where the package is not installed.

The file is made from the package's own source, so there is no second implementation that could
drift. Starting from the public operations, every module they import is included unchanged,
with three mechanical changes: imports between the modules go away, functions that reach for
Triton become None, and a private name that two modules use gets its module's name appended.
One module is replaced, `backend`: without the package there is nothing to choose from.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import hola_kernels

PACKAGE = "hola_kernels"
REPLACED = f"{PACKAGE}.backend"
# modules that name what is public: where the bundle starts from
ROOTS = (PACKAGE, f"{PACKAGE}.modules")
PUBLIC = ("GatedDeltaNet", "HamAttention", "HolaAttention", "HolaState", "HqltAttention", "HqltState", "KernelError",
          "LayerCache", "PackedDocuments", "decay_rate", "gated_delta_rule", "gated_delta_step", "gated_rms_norm",
          "hola_attention", "hola_attention_step", "short_conv", "short_conv_step", "step_bias")

HEADER = '''"""The operations of a HOLA layer in plain PyTorch, as one module.

Made by hola_megatron from the source of hola_kernels: change it there, not here.
"""
'''

BACKEND = '''
BACKENDS = ("reference", "torch")
_logger = logging.getLogger(__name__)


def choose_backend(backend: str, device: torch.device, refusal: str | None = None) -> str:
    """ "auto" becomes "torch", which runs anywhere; the Triton kernels are in the package hola_kernels."""
    if backend == "auto":
        _announce(device.type)
        return "torch"
    if backend not in BACKENDS:
        raise KernelError(f"backend: {backend!r} is not one of auto, {', '.join(BACKENDS)} (the Triton kernels come "
                          "with the package hola_kernels)")
    return backend


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: there are none."""
    return False


@functools.cache
def _announce(device_type: str) -> None:
    if device_type != "cpu":
        _logger.warning("plain PyTorch operations on %s; the package hola_kernels brings faster ones", device_type)
'''


@dataclass
class _Module:
    """One module of the package: its name, source, syntax tree and what it takes from the package."""

    name: str
    source: str
    tree: ast.Module

    @classmethod
    def read(cls, name: str) -> _Module:
        base = Path(hola_kernels.__file__).parent.joinpath(*name.split(".")[1:])
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        source = path.read_text(encoding="utf-8")
        return cls(name, source, ast.parse(source))

    @property
    def needs(self) -> list[str]:
        """Modules of the package that it imports at its top."""
        return [node.module for node in self.tree.body if _from_package(node)]

    @property
    def defined(self) -> dict[str, ast.stmt]:
        """Top-level names and the statements that define them."""
        names: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        return names

    def text(self, node: ast.stmt) -> str:
        """The source of a statement, with its decorators and the comments right above it."""
        lines = self.source.splitlines()
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(lines[first: node.end_lineno])


def bundle() -> str:
    """The text of hola_ops.py."""
    modules = _in_order()
    taken: set[str] = set()
    parts = [HEADER, "from __future__ import annotations\n", _imports(modules)]
    for module in modules:
        parts.append(_comment(module))
        parts.append(BACKEND if module.name == REPLACED else _body(module, taken))
    parts.append(f"\n\n__all__ = {list(PUBLIC)!r}\n")
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(parts))


def _imports(modules: list[_Module]) -> str:
    """What the modules import from elsewhere, once."""
    plain = {"import functools", "import logging"}
    named: dict[str, set[str]] = {}
    for node in (node for module in modules if module.name != REPLACED for node in module.tree.body):
        if isinstance(node, ast.Import):
            plain.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not _from_package(node) and node.module != "__future__":
            named.setdefault(node.module or "", set()).update(ast.unparse(name) for name in node.names)
    return "\n".join(sorted(plain) + [f"from {module} import {', '.join(sorted(named[module]))}" for module in named])


def _in_order() -> list[_Module]:
    """The modules the public operations need, each after those it imports."""
    found: dict[str, _Module] = {}

    def add(name: str) -> None:
        module = _Module.read(name)
        for needed in module.needs:
            if needed not in found:
                add(needed)
        found[name] = module

    for root in ROOTS:
        add(root)
    return [module for name, module in found.items() if name not in ROOTS]


def _body(module: _Module, taken: set[str]) -> str:
    """The module's statements, Triton functions emptied, clashing names renamed; adds its names to `taken`."""
    parts = []
    for node in module.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node) or _defines(node, "__all__"):
            continue
        if isinstance(node, ast.FunctionDef) and any(_from_package(inner) for inner in ast.walk(node)):
            parts.append(f"{node.name} = None  # with the package hola_kernels")
        else:
            spaced = isinstance(node, ast.FunctionDef | ast.ClassDef)
            parts.append(("\n\n" if spaced else "") + module.text(node) + ("\n" if spaced else ""))
    text = "\n".join(parts)
    suffix = "_" + module.name.removeprefix(f"{PACKAGE}.").replace(".", "_")
    for name in module.defined:
        if name in taken and name != "__all__":
            text = re.sub(rf"(?<![\w.]){re.escape(name)}\b", name + suffix, text)
        else:
            taken.add(name)
    return text


def _comment(module: _Module) -> str:
    """The module's name and docstring as a comment."""
    lines = [module.name.replace(".", "/"), "", *(ast.get_docstring(module.tree) or "").splitlines()]
    return "\n\n" + "\n".join(f"# {line}".rstrip() for line in lines) + "\n"


def _from_package(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _defines(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
