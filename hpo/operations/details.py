"""A planned study in full: what it is, what made it, and what it gave."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.errors import StudyError
from hpo.operations.connection import connect
from hpo.planning.preparation import folder_of
from hpo.queue import Attempt, Job, StudyRow
from hpo.scores import learning_curve
from hpo.scores.learning_curve import LearningCurve
from hpo.study import differences, file_name, load
from hpo.tracking import foreign, links

FOLLOWED = (
    "weights",
    "starts_from",
    "best_of",
    "start_from",
)  # digests of files and of an earlier study: no settings of its own


@dataclass(frozen=True, kw_only=True)
class Details:
    """A planned study in full."""

    row: StudyRow
    jobs: Sequence[Job]  # trials, repeats and the closing
    links: Mapping[str, str]  # name and URL of MLflow's pages about it
    file: str  # its study file
    changed: Mapping[str, tuple[Any, Any]] | None  # settings: in the file now, and here; None without the file
    image: Path | None  # one of the data set, if it is on this machine

    @property
    def learning_curve(self) -> LearningCurve | None:
        """Its learning curve, if it is a study of one."""
        return learning_curve.of_study(self.row, self.jobs)


def show(study: str) -> Details:
    """Return everything about a planned study. Raise NotFound if there is none of this name."""
    with connect(mlflow=False) as connection:
        row = connection.queue.study(study)
        uri = row.facts.data.uri
        return Details(
            row=row,
            jobs=connection.queue.jobs(row.name),
            links=links_of(connection.services.tracking_uri, row),
            file=row.facts.file or file_name(row.name),
            changed=_changed(row),
            image=next(iter(sorted(folder_of(uri).glob("*.png"))), None),
        )


def attempts(trial: str) -> list[Attempt]:
    """Return the attempts of a trial (STUDY/NUMBER, or STUDY/NUMBER/REPEAT), in their order. Raise NotFound."""
    from hpo.report import names

    study, _, rest = trial.partition("/")
    with connect(mlflow=False) as connection:
        row = connection.queue.study(study)
        job = names.trial(connection.queue, row, rest)
        return connection.queue.attempts(row.name).get(job.id, [])


def links_of(tracking_uri: str, row: StudyRow) -> dict[str, str]:
    """Return name and URL of MLflow's pages about a study."""
    uri, facts, experiment = tracking_uri.rstrip("/"), row.facts, row.facts.experiment_id
    pages = {"list": links.trials(uri, experiment), "charts": links.charts(uri, experiment)}
    if facts.page is not None:
        pages["data"] = f"{uri}/{foreign.file_link(experiment, facts.study_run_id, facts.page)}"
    return pages


def _changed(row: StudyRow) -> dict[str, tuple[Any, Any]] | None:
    """Return the settings in which a study differs from its file as that is now; None if the file cannot be read."""
    data = row.facts.data
    try:
        original = load(row.facts.file or file_name(row.name))
    except StudyError:
        return None
    augmentation, padding = row.specification.training.get("augmentation"), row.specification.model.get("padding")
    canonical = original.suited(
        is_periodic=padding == "circular" or augmentation == "shift", has_symmetries=augmentation == "symmetry"
    ).canonical(
        data_digest=data.digest,
        split_digest=data.split,
        weights=defaultdict(str),
        starts=defaultdict(str),
        phases=row.canonical.get("phases"),
        folds_digest=row.facts.folds,
    )
    there, here = (
        {key: value for key, value in spec.items() if key not in FOLLOWED} | {"data.path": path}
        for spec, path in ((canonical, original.data_path), (row.canonical, data.uri))
    )
    return differences(there, here)
