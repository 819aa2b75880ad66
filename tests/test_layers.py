"""Who may import whom: hpo -> models, data_pipeline; those two do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "data_pipeline": {"data_pipeline", "numpy", "pandas", "PIL", "scipy", "skfem"},
    "models": {"models", "numpy", "torch", "torchvision", "safetensors"},
}
BINARY = ("os.open", "tarfile.open", "gzip.open", "Image.open", "archive.open")
TORCH_FREE = [
    "cli",
    "worker",
    "suggester",
    "planning",
    "report",
    "compare",
    "plots",
    "figures",
    "sections",
    "alarms",
    "display",
    "dry_run",
    "services",
    "slurm",
    "registry",
    "predict",
    "packaging",
]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_each_layer_imports_only_what_it_may(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        foreign = imports(path) - ALLOWED[package] - set(sys.stdlib_module_names)
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_the_supervisor_and_the_command_line_do_not_import_torch() -> None:
    modules = ", ".join(f"hpo.{module}" for module in TORCH_FREE)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_text_is_utf8_whatever_the_locale_says():
    found = []
    for path in [file for folder in ("hpo", "models", "data_pipeline") for file in (ROOT / folder).rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            name, modes = ast.unparse(call.func), [each.value for each in call.args if isinstance(each, ast.Constant)]
            what = name.rpartition(".")[2]
            opens = what in ("open", "fdopen") and not any("b" in str(each) for each in modes) and name not in BINARY
            opens = opens and not ast.unparse(call).startswith("(folder / 'lock')")  # nothing is written there
            if (opens or what in ("read_text", "write_text")) and "encoding" not in {
                each.arg for each in call.keywords
            }:
                found.append(f"{path.name}:{call.lineno}: {name}")
    assert not found
