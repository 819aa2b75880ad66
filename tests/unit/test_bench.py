"""The scripts of bench/ go with the code: what they import and call of ours is there, and `make bench` names them."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from places import ROOT

SCRIPTS = sorted((ROOT / "bench").glob("*.py"))
PACKAGES = ("hpo", "models", "data_pipeline")


def is_module(name: str) -> bool:
    """Return whether a module of that dotted name can be imported."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def has(module: str, name: str) -> bool:
    """Return whether there is such a module, with such an attribute or with such a module below it."""
    return is_module(module) and (hasattr(importlib.import_module(module), name) or is_module(f"{module}.{name}"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_takes_from_the_packages_is_there(script: Path):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    taken = [(str(node.module), alias) for node in imports for alias in node.names]
    ours = [(module, alias) for module, alias in taken if module.partition(".")[0] in PACKAGES]
    assert [f"{module}.{alias.name}" for module, alias in ours if not has(module, alias.name)] == []
    names = {alias.asname or alias.name: f"{module}.{alias.name}" for module, alias in ours}
    used = {
        (names[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }
    assert [f"{name}.{attribute}" for name, attribute in used if is_module(name) and not has(name, attribute)] == []


def test_the_scripts_of_make_bench_exist_and_the_page_has_a_row_for_each():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = re.findall(r"\$\(BIN\)/python (bench/\w+\.py)", makefile)
    assert run and all((ROOT / name).exists() for name in run)
    page = (ROOT / "docs" / "reference" / "performance.md").read_text(encoding="utf-8")
    assert [path.name for path in SCRIPTS if path.stem != "machine" and f"| `bench/{path.name}" not in page] == []
