"""hpo as Python functions: what the commands do, for a notebook or a program.

    from hpo import api

    api.run("grid", compute=api.Compute(trainers=2))
    api.results("grid")  # a pandas frame
    api.download(Path("champion"))

Every function reads its settings from the environment, as the commands do. It prints nothing and ends no process. It
raises a `UserError` (hpo.errors) for what the caller can correct, and `Unreachable` while a service is away.

Each name is imported at its first use, with what it needs: MLflow alone takes a second. Of all imports, those here, in
`hpo.cli`, in `hpo.operations.connection` and of pandas in `hpo.report` are put off for that reason.
"""

# ruff: noqa: F401 (the names of __all__ are imported for type checkers)
import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.operations.arrays import predict_arrays, write_data
    from hpo.operations.auto import Auto, auto
    from hpo.operations.backup import Backup, backup
    from hpo.operations.budgets import Budget
    from hpo.operations.cluster import Cluster
    from hpo.operations.compute import Compute
    from hpo.operations.connection import Connection, connect
    from hpo.operations.data import Phase, Understanding, check_data, describe_data, make_data
    from hpo.operations.deletion import delete
    from hpo.operations.details import Attempt, Details, attempts, show
    from hpo.operations.doctor import Checkup, doctor
    from hpo.operations.dry_run import Estimate, dry_run
    from hpo.operations.evaluate import Evaluation, copy_model, evaluate
    from hpo.operations.models import Download, download
    from hpo.operations.overview import Status, StudySummary, jobs, results, status, studies, trial_frame, trials
    from hpo.operations.pool import Detached, Left, detach, hand_in, serve
    from hpo.operations.predict import predict
    from hpo.operations.preparing import Plan, Study, load
    from hpo.operations.probe import Probed, probe
    from hpo.operations.reports import Promotion, Report, compare, promote, report
    from hpo.operations.restore import restore
    from hpo.operations.services import Services, down, export_lines, up
    from hpo.operations.stopping import Cancelled, Stopped, cancel, stop, stop_pool
    from hpo.operations.weights import PretrainedWeights, adopt_weights, weights, weights_folder
    from hpo.operations.work import Begun, Job, Outcome, Run, Stop, StudyRow, Watch, run, worker

_NAMES = {  # by the module of hpo.operations
    "arrays": "predict_arrays write_data",
    "auto": "Auto auto",
    "backup": "Backup backup",
    "budgets": "Budget",
    "cluster": "Cluster",
    "compute": "Compute",
    "connection": "Connection connect",
    "data": "Phase Understanding check_data describe_data make_data",
    "deletion": "delete",
    "details": "Attempt Details attempts show",
    "doctor": "Checkup doctor",
    "dry_run": "Estimate dry_run",
    "evaluate": "Evaluation copy_model evaluate",
    "models": "Download download",
    "overview": "Status StudySummary jobs results status studies trial_frame trials",
    "pool": "Detached Left detach hand_in serve",
    "predict": "predict",
    "preparing": "Plan Study load",
    "probe": "Probed probe",
    "reports": "Promotion Report compare promote report",
    "restore": "restore",
    "services": "Services down export_lines up",
    "stopping": "Cancelled Stopped cancel stop stop_pool",
    "weights": "PretrainedWeights adopt_weights weights weights_folder",
    "work": "Begun Job Outcome Run Stop StudyRow Watch run worker",
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'hpo.api' has no attribute {name!r}")
    was_enabled = gc.isenabled()
    gc.disable()  # imports leave no garbage, and looking for it takes a fifth of their time
    try:
        value = globals()[name] = getattr(import_module(f"hpo.operations.{_MODULE[name]}"), name)
    finally:
        if was_enabled:
            gc.enable()
    return value


def __dir__() -> list[str]:
    return __all__
