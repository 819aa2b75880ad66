"""The wheel works outside the checkout: in a fresh environment, beside foreign packages of the same names."""

import csv
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT
from shell import PATIENCE

from hpo import settings
from hpo.services import serving

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

PACKAGES = ("hpo", "models", "data_pipeline")
FOREIGN = "raise ImportError(__name__ + ' of the current folder')\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout, which leaves no build folder in the checkout itself."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "checkout")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, folder / "checkout"], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment with the wheel. What the wheel requires is that of the running environment."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    # As lines of a .pth file these folders come after the wheel, and the .pth file of an editable checkout is not read.
    required = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "required.pth").write_text("\n".join(required) + "\n")
    return folder / "bin"


class Outside:
    """Runs programs of the fresh environment in a folder that has `hpo`, `models` and `data_pipeline` of its own."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder = binaries, folder
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = inherited | {"HPO_HOME": str(folder / "home"), "HPO_TRAINERS": "1"}
        for package in PACKAGES:
            (folder / package).mkdir(parents=True)
            (folder / package / "__init__.py").write_text(FOREIGN)

    def run(self, program: str, *words: object) -> str:
        """Return what the program prints; it must succeed."""
        done = subprocess.run(
            [self.binaries / program, *map(str, words)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def outside(binaries: Path, tmp_path: Path) -> Iterator[Outside]:
    """Programs of the wheel, with embedded services of their own, which are stopped and erased at the end."""
    outside = Outside(binaries, tmp_path / "elsewhere")
    yield outside
    serving.erase(settings.read({"HPO_HOME": outside.environment["HPO_HOME"]}))


def test_the_wheel_holds_the_three_packages_with_all_their_data_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    assert names == {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {Path(name).suffix for name in names} == {".py", ".toml", ".j2", ".png", ".csv"}


def test_a_study_runs_and_its_model_predicts_where_packages_of_the_same_names_lie(outside: Outside):
    code = "import hpo, models, data_pipeline; print(hpo.__file__, models.__file__, data_pipeline.__file__)"
    paths = outside.run("python", "-P", "-c", code).split()
    assert all(Path(path).is_relative_to(outside.binaries.parent) for path in paths), paths

    outside.run("hpo", "run", "--study", "baseline", "--epochs", 2)  # the study, the data and the services of the wheel
    outside.run("hpo", "download", "champion")
    for name in ("0_isotropic.png", "3_isotropic.png"):
        shutil.copy(ROOT / "data_pipeline" / "default" / name, outside.folder)
    rows = outside.run("hpo", "predict", "champion", "0_isotropic.png", "3_isotropic.png").splitlines()
    assert [row["image"] for row in csv.DictReader(rows)] == ["0_isotropic.png", "3_isotropic.png"]
    outside.run("hpo", "report", "-o", "report")  # by the templates of the wheel
    assert (outside.folder / "report" / "report.html").stat().st_size > 10_000
    outside.run("hpo", "doctor")
    outside.run("hpo", "down")
