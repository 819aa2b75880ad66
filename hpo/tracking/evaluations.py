"""Evaluations of a model on further images: runs of a kind of their own in the experiment of the model's study."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModelInput

from hpo.tracking import foreign
from hpo.tracking.client import Tracker
from hpo.tracking.errors import server


def log(
    tracker: Tracker,
    experiment_id: str,
    *,
    key: str,
    name: str,
    note: str,
    model_id: str,
    tags: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    data: tuple[str, str, str],
    files: Iterable[Path],
) -> str:
    """Return the id of the one run with this key; the model is its input. Safe to repeat.

    `data`: name, digest and folder of the images. `files` are uploaded to the run's folder `evaluation`.
    """
    now = time.time_ns() // 1_000_000
    run_id = tracker.ensure_run(
        experiment_id,
        key=key,
        name=name,
        kind="evaluation",
        params={"data": data[1]},
        tags={foreign.NOTE: note, **tags},
        start_ms=now,
    )
    tracker.log_summary(run_id, metrics, timestamp_ms=now)
    source = json.dumps({"uri": data[2]})
    tracker.log_dataset(run_id, name=data[0], digest=data[1], source=source, context="evaluation")
    _name_model(tracker, run_id, model_id)
    for file in files:
        tracker.upload(run_id, file, "evaluation")
    tracker.set_status(run_id, "FINISHED", end_ms=now)
    return run_id


@server()
def _name_model(tracker: Tracker, run_id: str, model_id: str) -> None:
    inputs = tracker.client.get_run(run_id).inputs
    if model_id not in {model.model_id for model in (inputs.model_inputs if inputs else [])}:
        with tracker.races.written_once(f"the model of the run {run_id}"):
            tracker.client.log_inputs(run_id, models=[LoggedModelInput(model_id=model_id)])
