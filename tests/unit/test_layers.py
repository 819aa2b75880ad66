"""Who may import whom: hpo -> models, data_pipeline; those two do not know each other."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

ALLOWED = {
    "data_pipeline": {"data_pipeline", "numpy", "pandas", "PIL", "pyarrow", "scipy", "skfem"},
    "models": {"models", "numpy", "safetensors", "sklearn", "threadpoolctl", "torch", "torchvision"},
}
BINARY = ("os.open", "tarfile.open", "gzip.open", "Image.open", "archive.open")
TRAINS = {
    f"hpo.worker.{name}" for name in ("train_trial", "traced_programs", "scoring", "probing", "inputs", "code_check")
}  # may import torch
ORDER = [  # each package imports only from those after it
    "hpo.notebook",
    "hpo.cli",
    "hpo.api",
    "hpo.operations",
    "hpo.launch",
    "hpo.worker",
    "hpo.closing",
    "hpo.report",
    "hpo.planning",
    "hpo.scores",
    "hpo.recording",
    "hpo.search",
    "hpo.tracking",
    "hpo.services",
    "hpo.queue",
    "hpo.study",
    "hpo",  # the ground: its modules that are no packages
    "models",
    "data_pipeline",
]


TOP = {"hpo.__main__": "hpo.cli", "hpo": "hpo.notebook"}  # modules that stand on a package's floor


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


def modules() -> dict[str, Path]:
    """The file of each module of the product, by its dotted name."""
    files = [path for package in ("hpo", "models", "data_pipeline") for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    return {name: path for path, name in names.items()}


def package_of(module: str) -> str:
    """The package of ORDER that a module belongs to."""
    if module in TOP:
        return TOP[module]
    return next(package for package in ORDER if f"{module}.".startswith(f"{package}."))


def imported(path: Path, names: dict[str, Path]) -> set[str]:
    """The modules of the product that a file imports, at any place in it."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names} & names.keys()
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
            targets |= whole or {node.module} & names.keys()
    return targets


def test_each_module_imports_from_packages_below_its_own_only() -> None:
    names = modules()
    upward = [
        f"{module} imports {target}"
        for module, path in names.items()
        for target in imported(path, names)
        if ORDER.index(package_of(target)) < ORDER.index(package_of(module))
    ]
    assert not upward


@pytest.mark.parametrize("package", ALLOWED)
def test_within_a_package_below_hpo_no_modules_import_each_other(package: str) -> None:
    names = {module: path for module, path in modules().items() if package_of(module) == package}
    TopologicalSorter({module: imported(path, names) for module, path in names.items()}).prepare()  # or CycleError


def test_no_module_but_the_trainer_imports_torch() -> None:
    free = sorted(name for name in modules() if name.startswith("hpo") and name not in TRAINS | {"hpo.__main__"})
    code = f"import sys, {', '.join(free)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_trainer_imports_no_client_of_a_server() -> None:
    code = (
        "import sys, hpo.worker.train_trial; print(*{'mlflow', 'optuna', 'sqlalchemy', 'psycopg'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


def test_a_command_that_starts_services_or_reads_the_database_imports_no_mlflow() -> None:
    code = (
        "import sys; from hpo import api; from hpo.report import display, results\n"
        "api.up, api.down, api.status, api.studies, api.trials, api.show, api.run\n"  # `hpo run` of a finished study
        "print(*{'mlflow', 'optuna', 'matplotlib', 'torch'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


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


def test_functions_classes_and_modules_stay_small():
    too_long = []
    for package in ("hpo", "models", "data_pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            pieces = [("module", path.stem, len(source.splitlines()), 400)]
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    kind, most = ("class", 250) if isinstance(node, ast.ClassDef) else ("function", 60)
                    pieces.append((kind, node.name, (node.end_lineno or 0) - node.lineno + 1, most))
            too_long += [
                f"{path.relative_to(ROOT)}: {kind} {name} has {lines} lines, at most {most}"
                for kind, name, lines, most in pieces
                if lines > most
            ]
    assert not too_long
