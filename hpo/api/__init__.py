"""hpo as Python functions: what the commands do, for a notebook or a program.

    from hpo import api

    api.run("grid", compute=api.Compute(trainers=2))
    api.results("grid")  # a pandas frame
    api.download(Path("champion"))

Every function reads its settings from the environment, as the commands do. It prints nothing and ends no process. It
raises a `UserError` (hpo.errors) for what the caller can correct, and `Unreachable` while a service is away.

Each name is imported at its first use, with what it needs: MLflow alone takes three seconds. Here and in `hpo.cli` are
the only imports that are put off for that reason.
"""

# ruff: noqa: F401 (the names of __all__ are imported for type checkers)
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.phase import Phase
    from hpo.api.connection import Connection, connect
    from hpo.api.data import check_data, make_data
    from hpo.api.models import Download, PretrainedWeights, adopt_weights, download, weights, weights_folder
    from hpo.api.overview import (
        Promotion,
        Report,
        Status,
        StudySummary,
        TrialSummary,
        compare,
        jobs,
        promote,
        report,
        results,
        status,
        studies,
        trials,
    )
    from hpo.api.services import down, export_lines, up
    from hpo.api.upkeep import Backup, Cancelled, Checkup, Stopped, backup, cancel, delete, doctor, restore, stop
    from hpo.api.work import Begun, Compute, Outcome, Run, Slurm, Watch, dry_run, load, run, worker
    from hpo.operations.dry_run import Estimate
    from hpo.operations.predict import predict

_MODULES = {
    "data_pipeline.phase": ("Phase",),
    "hpo.api.connection": ("Connection", "connect"),
    "hpo.api.data": ("check_data", "make_data"),
    "hpo.api.models": ("Download", "PretrainedWeights", "adopt_weights", "download", "weights", "weights_folder"),
    "hpo.api.overview": (
        *("Promotion", "Report", "Status", "StudySummary", "TrialSummary"),
        *("compare", "jobs", "promote", "report", "results", "status", "studies", "trials"),
    ),
    "hpo.api.services": ("down", "export_lines", "up"),
    "hpo.api.upkeep": (
        "Backup",
        "Cancelled",
        "Checkup",
        "Stopped",
        "backup",
        "cancel",
        "delete",
        "doctor",
        "restore",
        "stop",
    ),
    "hpo.api.work": (
        *("Begun", "Compute", "Outcome", "Run", "Slurm", "Watch"),
        *("dry_run", "load", "run", "worker"),
    ),
    "hpo.operations.dry_run": ("Estimate",),
    "hpo.operations.predict": ("predict",),
}
_MODULE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'hpo.api' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
