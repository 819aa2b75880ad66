"""The engines by the names that `--on` takes."""

from hpo.errors import SettingsError
from hpo.launch.engine import Engine
from hpo.launch.ray import Ray
from hpo.launch.slurm import Slurm
from hpo.text import near_miss

ENGINES: dict[str, type[Engine]] = {"slurm": Slurm, "ray": Ray}


def engine(name: str) -> type[Engine]:
    """Return an engine by its name. Raise SettingsError."""
    if name not in ENGINES:
        raise SettingsError(f"--on: expected one of {', '.join(ENGINES)}, found {name!r}.{near_miss(name, ENGINES)}")
    return ENGINES[name]
