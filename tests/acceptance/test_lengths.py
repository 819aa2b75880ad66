"""Texts that grow with use or come from people: what hpo sends to MLflow of those that are too long for it."""

import secrets
from typing import cast

import cells
import pytest
import records
from mlflow.entities import LoggedModelStatus

from hpo.queue import Job
from hpo.scores import candidates
from hpo.scores.candidates import Candidate
from hpo.scores.standings import Standing
from hpo.text import cut, cut_table
from hpo.tracking import experiments, foreign, registry
from hpo.tracking.client import Tracker
from hpo.tracking.registry import Version

START = 1_750_000_000_000  # milliseconds since 1970


def unique(length: int) -> str:
    """A name of this length that nobody has."""
    return secrets.token_hex((length + 1) // 2)[:length]


@pytest.fixture
def tracker(tracking_uri: str) -> Tracker:
    return Tracker(tracking_uri)


def a_model(tracker: Tracker, experiment: str) -> str:
    """The id of a finished model."""
    made = tracker.client.create_logged_model(experiment, name="model").model_id
    tracker.client.finalize_logged_model(made, LoggedModelStatus.READY)
    return str(made)


def test_a_text_is_cut_at_its_limit_and_says_so() -> None:
    assert cut("abcde", 5) == "abcde"
    assert cut("abcdef", 5) == "abcd…"


def test_a_table_is_cut_after_a_row_and_says_how_many_are_left_out() -> None:
    rows = [f"| {number} | 0.5 |" for number in range(50)]
    table = "\n".join(["| version | score |", "|---|---|", *rows])
    assert cut_table(table, len(table)) == table
    shown = cut_table(table, 200)
    assert len(shown) <= 200
    listed = [line for line in shown.splitlines() if line.startswith("| ")][1:]
    assert listed == rows[: len(listed)] and len(listed) > 5
    assert shown.endswith(f"\n\n… and {50 - len(listed)} more.")


def test_texts_longer_than_mlflow_takes_are_cut_and_written_again_without_an_error(tracker: Tracker) -> None:
    text = "ä " * 60_000
    experiment = experiments.ensure(tracker, unique(12), description=text, params=(), owner="here")
    for _ in range(2):
        run = tracker.ensure_run(
            experiment,
            key="a",
            name=text,
            kind="trial",
            params={"filters": text},
            tags={"mlflow.note.content": text},
            start_ms=START,
        )
        tracker.set_tags(run, {"hpo.reason": text})
        tracker.log_dataset(run, name=text, digest="1" * 64, source="{}")
    found = tracker.client.get_run(run)
    assert found.info.run_name == cut(text, 250)
    assert found.data.params["filters"] == cut(text, 6000)
    assert found.data.tags["hpo.reason"] == found.data.tags["mlflow.note.content"] == cut(text, 8000)
    assert found.inputs.dataset_inputs[0].dataset.name == cut(text, 500)
    assert tracker.client.get_experiment(experiment).tags["mlflow.note.content"] == cut(text, 20_000)
    name, model = unique(12), a_model(tracker, experiment)
    for _ in range(2):
        registry.ensure_registered_model(tracker, name, description=text, tags={"a": text}, owner="here")
        described = {"description": text, "tags": {"b": text}}
        registry.register(tracker, model_name=name, owner="here", key="a", model_id=model, run_id=run, **described)  # type: ignore[arg-type]
    assert len(registry.versions(tracker, name)) == 1
    assert tracker.client.get_model_version(name, "1").description == cut(text, 5000)


def test_studies_are_compared_however_many_they_are(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [experiments.ensure(tracker, unique(12), description="d", params=(), owner="here") for _ in range(2)]
    monkeypatch.setattr(foreign, "LONGEST_VIEW_KEY", 4)  # what some fifty studies have
    studies = [records.facts(experiment_id=experiment) for experiment in ids]
    link = experiments.comparison_link(tracker, studies, ["filters"])
    key = link.partition("viewStateShareKey=")[2]
    assert key.startswith("hpo-") and len(key) == 4 + 64
    for experiment in ids:
        assert f"mlflow.sharedViewState.{key}" in tracker.client.get_experiment(experiment).tags


def test_of_very_many_versions_the_description_names_the_champion_and_the_best(tracker: Tracker) -> None:
    name, job = unique(12), cast(Job, None)
    registry.ensure_registered_model(tracker, name, description="Models.", tags={}, owner="here")
    versions = [
        Candidate(
            model=name,
            version=Version(
                number=number,
                key="",
                run_id="",
                model_id="",
                description=f"study/{number} f32 k5 d0.2 lr1e-3\n\nmore",
                aliases=("champion",) if number == 33 else (),
                tags={"hpo.verdict": "below volume fraction"},
            ),
            job=job,
            standing=Standing(point=number / 100, own=number / 100),
        )
        for number in range(1, 71)
    ]
    registry.describe_versions(tracker, name, candidates.table(versions))
    described = tracker.client.get_registered_model(name).description
    rows = [line.split(" | ") for line in described.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows[:3]] == ["| 33", "| 1", "| 2"] and "`@champion`" in rows[0][4]
    assert described.endswith(f"… and {70 - len(rows)} more.") and len(rows) > 40


WIDE = """
description = "{description}"
[data]
path = "{data}"
[model]
family = "periodic"
[sampler]
name = "random"
trials = 1
[space]
width = [4]
depth = [1]
kernel_size = [3]
stride = [2]
normalisation = ["batch"]
activation = ["relu"]
head = [8]
volume_fraction = [true]
symmetric = [false]
physics = ["none"]
batch_size = [8]
learning_rate = {{ low = 5e-3, high = 1e-2, log = true }}
weight_decay = {{ low = 1e-5, high = 1e-3, log = true }}
gradient_clipping = {{ low = 0.5, high = 1.5 }}
ema = {{ low = 0.1, high = 0.2 }}
relative = {{ low = 0.1, high = 0.2 }}
schedule = ["cosine"]
augmentation = ["none"]
[training]
epochs = 40
"""


@pytest.mark.long
@pytest.mark.acceptance
def test_a_study_with_many_parameters_and_a_long_description_closes_with_a_champion(shell, data, tmp_path):
    study = tmp_path / f"{'w' * 120}.toml"
    study.write_text(WIDE.format(data=data, description="long " * 5000))
    shell.hpo("run", "--study", study)
    (job,) = shell.trials(study.stem)
    assert (job.state, job.attempt) == ("done", 1)
    name = Tracker(shell.tracking_uri).client.get_run(job.run_id).info.run_name
    assert len(name) == 250 and name.endswith("…")
    assert "@champion is this version" in shell.hpo("promote", "--study", study.stem, "--force")


def test_a_study_name_too_long_for_mlflow_is_refused_before_anything_is_made(shell, data, tmp_path):
    study = cells.study(tmp_path, "n" * 230, data=data, epochs=2)
    assert "expected a name of at most 200 characters, found 230" in shell.hpo("run", "--study", study, code=1)
    assert not shell.queue.installed()
    assert Tracker(shell.tracking_uri).client.get_experiment_by_name("n" * 230) is None
