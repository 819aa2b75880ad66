"""Experiments: one a study, with its note, its saved views and the links that open them."""

import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
from mlflow.entities import Experiment

from hpo.errors import StudyConflict
from hpo.study.records import StudyFacts
from hpo.text import cut
from hpo.tracking import artifacts, foreign, transfers
from hpo.tracking.client import OWNER, Tracker, pages, quoted
from hpo.tracking.errors import ABSENT, EXISTS, TrackingUnavailable, passing, server
from hpo.tracking.links import CHARTS_VIEW, LIST_VIEW


@server()
def ensure(tracker: Tracker, study: str, *, description: str, params: Sequence[str], owner: str) -> str:
    """Return the id of the study's experiment, created if there is none, with its note and saved views over `params`.

    `owner` is the queue's database: two databases on one server must not share runs. Raise StudyConflict if the
    experiment has another owner, or was deleted in MLflow: it is neither used nor replaced.
    """
    tags = foreign.EXPERIMENT_KIND | views(params)
    tags |= {foreign.NOTE: cut(description, foreign.LONGEST_EXPERIMENT_TAG), OWNER: owner}
    experiment = tracker.client.get_experiment_by_name(study)
    if experiment is None:
        with passing(EXISTS):  # another process was quicker
            tracker.client.create_experiment(study, tags=tags)
        experiment = tracker.client.get_experiment_by_name(study)
    if experiment is None or experiment.lifecycle_stage != "active":
        number = experiment.experiment_id if experiment else "?"
        raise StudyConflict(
            f"The MLflow experiment of {study} (id {number}) was deleted in MLflow. "
            f"Restore it with `mlflow experiments restore --experiment-id {number}`, "
            f"or start afresh after `hpo delete --study {study}`."
        )
    if experiment.tags.get(OWNER) != owner:
        raise StudyConflict(
            f"The MLflow server at {tracker.uri} has an experiment '{study}' (id {experiment.experiment_id}) that was "
            "not made from this database. Nothing was touched. Use a copy of the study file under another name, or "
            "the database that made the experiment, or rename the experiment in MLflow."
        )
    _set_tags(tracker, experiment, tags)
    return str(experiment.experiment_id)


def views(params: Sequence[str]) -> dict[str, str]:
    """Return the tags that hold the saved views over `params`."""
    charts = foreign.view(params, trials_only=True)
    return {foreign.view_tag(LIST_VIEW): foreign.view(params), foreign.view_tag(CHARTS_VIEW): charts}


@server()
def renew_views(tracker: Tracker, experiment_id: str, params: Sequence[str]) -> None:
    """Make the saved views those of this version: those of an earlier one list runs of other kinds among the trials."""
    _set_tags(tracker, tracker.client.get_experiment(experiment_id), views(params))


def _set_tags(tracker: Tracker, experiment: Experiment, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        if experiment.tags.get(name) != value:
            tracker.client.set_experiment_tag(experiment.experiment_id, name, value)


@contextmanager
def undone_on_failure(tracker: Tracker, study: str, *, owner: str) -> Iterator[None]:
    """Delete the study's experiment again if the block makes it and fails, as far as the server allows."""
    with server():
        is_new = tracker.client.get_experiment_by_name(study) is None
    try:
        yield
    except Exception:
        with suppress(Exception):  # the first error is the one to tell
            experiment = tracker.client.get_experiment_by_name(study)
            if is_new and experiment is not None and experiment.tags.get(OWNER) == owner:
                delete(tracker, experiment.experiment_id)
        raise


@server()
def exists(tracker: Tracker, experiment_id: str) -> bool:
    """Whether the server has this experiment, deleted or not."""
    with passing(ABSENT):
        tracker.client.get_experiment(experiment_id)
        return True
    return False


@server()
def owned(tracker: Tracker, owner: str) -> list[Experiment]:
    """Return all active experiments that were made from the queue's database `owner`."""
    condition = f"tags.`{OWNER}` = {quoted(owner)}"
    return pages(lambda token: tracker.client.search_experiments(filter_string=condition, page_token=token))


@server()
def delete(tracker: Tracker, experiment_id: str) -> None:
    """Delete the study's experiment and all its files; the name is free again. Safe to repeat.

    Registered versions made from its models lose their files: delete them first (`registry.delete_version`).
    MLflow keeps rows of deleted experiments until `mlflow gc`; this one is renamed to "<study> (deleted <id>)".
    """
    if not exists(tracker, experiment_id):
        return  # `mlflow gc` has done it
    experiment: Experiment = tracker.client.get_experiment(experiment_id)
    suffix = f" (deleted {experiment_id})"
    if not experiment.name.endswith(suffix):
        if experiment.lifecycle_stage != "active":
            tracker.client.restore_experiment(experiment_id)  # only an active one can be renamed
        tracker.client.rename_experiment(experiment_id, experiment.name + suffix)
        experiment = tracker.client.get_experiment(experiment_id)
    if experiment.lifecycle_stage == "active":
        tracker.client.delete_experiment(experiment_id)
    artifacts.delete(tracker.repository(experiment.artifact_location))


@server()
def comparison_link(tracker: Tracker, studies: Sequence[StudyFacts], params: Sequence[str]) -> str:
    """Return the page that lists the trials of several studies with columns for `params`, the best first.

    Baseline predictors that several of the studies have are listed once. MLflow looks the view up in one of the
    experiments, not always the first: every one gets it, under its own key.
    """
    experiment_ids, predictors = [study.experiment_id for study in studies], dict[tuple[str, ...], str]()
    repeated = []
    for study in studies:
        for name, run_id in (study.predictor_run_ids or {}).items():
            first = predictors.setdefault((name, study.data.digest, study.data.split, *study.data.target_names), run_id)
            repeated += [run_id] if run_id != first else []
    key = "-".join([LIST_VIEW, *experiment_ids])
    if len(key) > foreign.LONGEST_VIEW_KEY:
        key = f"{LIST_VIEW}-{hashlib.sha256(key.encode()).hexdigest()}"
    for experiment_id in experiment_ids:
        tag = foreign.view_tag(key)
        tracker.client.set_experiment_tag(experiment_id, tag, foreign.view(params, without=repeated))
    return foreign.experiments_link(tracker.uri, experiment_ids, view=key)


PROOF = b"hpo"  # what the file holds that proves a store


@server()
def prove_store(tracker: Tracker, experiment_id: str, folder: Path) -> None:
    """Write a small file beside the runs of an experiment, read it and remove it again; `folder` is for copies here.

    Raise StoreRefuses if the store takes no file, TrackingUnavailable if it answers otherwise than a store, else what
    the store's client raises.
    """
    repository = tracker.repository(tracker.client.get_experiment(experiment_id).artifact_location)
    name = f"proof-{socket.gethostname()}-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".proof-") as temporary:
        file, copy = Path(temporary, name), Path(temporary, "copy")
        file.write_bytes(PROOF)
        with tracker.storing(file):
            repository.log_artifact(str(file))
        try:
            transfers.download_file(repository, name, copy)
        except requests.HTTPError as error:
            if transfers.is_missing(error):
                raise TrackingUnavailable(f"the artifact store does not have {name}, which it has just taken") from None
            raise
        if copy.read_bytes() != PROOF:
            raise TrackingUnavailable(f"the artifact store returns another {name} than it was given")
        with suppress(TrackingUnavailable):  # one that removes nothing takes trials all the same
            artifacts.delete(repository, name)
