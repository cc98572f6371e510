"""Layer kinds by letter and by name; an unknown kind is refused; no code outside a kind's folder knows it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hola_megatron.config import load_recipe
from hola_megatron.errors import RecipeError
from hola_megatron.layers.registry import KINDS, parse_pattern

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "recipes" / "hola_tiny.yaml"


@pytest.mark.parametrize(("pattern", "labels"), [
    ("H", "H"), ("HGHA", "HGHA"), ("hola*3, attention", "HHHA"), ("gdn", "G"), ("G, hola*2", "GHH"),
    (" attention ,H*2 ", "AHH")])
def test_patterns_by_letter_and_by_name(pattern, labels):
    assert "".join(kind.label for kind in parse_pattern(pattern)) == labels


@pytest.mark.parametrize("pattern", ["", "L", "HLH", "hola*0", "hola*", "holas", "hola attention", "h", "3*hola",
                                     "hola,", "HG, "])
def test_an_unknown_kind_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match=r"allowed: hola \(H\), gdn \(G\), attention \(A\)"):
        parse_pattern(pattern)
    with pytest.raises(RecipeError, match=r"^model\.pattern: .* allowed: hola \(H\), gdn \(G\), attention \(A\)"):
        load_recipe(TINY, [f"model.pattern={pattern!r}"])


def test_a_pattern_fills_all_layers():
    model = load_recipe(TINY, ["model.layers=7", "model.pattern=hola*2, gdn"]).model
    assert [kind.name for kind in model.layer_kinds] == ["hola", "hola", "gdn"] * 2 + ["hola"]


def knows_a_kind(node: ast.AST) -> bool:
    """An import from a kind's folder, a comparison with its letter or name, a set of letters."""
    letters = {kind.letter for kind in KINDS.values() if kind.letter}

    def is_letters(value: ast.AST) -> bool:
        return isinstance(value, ast.Constant) and isinstance(value.value, str) and len(value.value) > 0 and \
            set(value.value) <= letters

    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        return any(re.match(rf"hola_megatron\.layers\.({'|'.join(KINDS)})\b", module) for module in modules)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        named = "kind" in ast.unparse(node) and any(isinstance(x, ast.Constant) and x.value in KINDS for x in sides)
        return named or any(is_letters(side) for side in sides)
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "set" and any(map(is_letters, node.args))


def test_no_code_outside_its_folder_knows_a_kind():
    found = []
    for path in sorted([*ROOT.glob("hola_megatron/**/*.py"), *ROOT.glob("tools/*.py")]):
        where = path.relative_to(ROOT).as_posix()
        if where == "hola_megatron/layers/registry.py" or (where.split("/")[2:3] and where.split("/")[2] in KINDS):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{where}:{node.lineno}: {ast.unparse(node)[:90]}" for node in ast.walk(tree) if knows_a_kind(node)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ['if kind == "H": pass', 'x = "A" in kinds', 'y = kinds & set("HG")',
                                  "from hola_megatron.layers.gdn.mixer import GatedDeltaMixer",
                                  'z = kind.name == "hola"'])
def test_such_code_would_be_found(line):
    assert any(map(knows_a_kind, ast.walk(ast.parse(line))))
