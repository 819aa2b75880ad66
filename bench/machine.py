"""What scripts of this folder share: the machine that their figures are of, and services of their own."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1]))  # hpo need not be installed: Keras runs a script, too
from data_pipeline.cores import cores

if TYPE_CHECKING:
    from hpo.services.serving import Services
    from hpo.settings import Settings


@dataclass(frozen=True)
class Home:
    """A temporary HPO_HOME, its services running."""

    folder: Path  # for everything; removed in the end
    settings: Settings
    services: Services
    environment: dict[str, str]  # of commands: nothing of the caller's settings


@contextmanager
def temporary_home() -> Iterator[Home]:
    """Postgres and MLflow servers in a temporary folder, until the end of the block."""
    from hpo import settings
    from hpo.services import serving

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = settings.read({"HPO_HOME": str(folder / "home")})
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HPO_", "MLFLOW_"))}
        try:
            services, _ = serving.up(chosen, report=lambda line: None)
            yield Home(folder, chosen, services, environment | {"HPO_HOME": str(chosen.home)})
        finally:
            serving.erase(chosen)


def versions() -> str:
    """Return the versions of the packages that figures about services depend on."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("hpo", "mlflow", "optuna", "torch"))


def machine() -> str:
    """Return the processor's name, the number of cores this process may use, and Python's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores, Python {platform.python_version()}"
