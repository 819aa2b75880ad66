"""`hpo compare`: any way to name a trial, side by side, differences marked, no score alone."""

import json
import re

import cells
import pytest
from shell import Shell, fresh_database

from hpo import settings, study
from hpo.errors import NotFound
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import AttemptOutcome
from hpo.queue.attempts import COUNTED_LIMIT
from hpo.report import comparison
from hpo.tracking.client import Tracker
from models.metrics import SCORES, Scores

pytestmark = pytest.mark.acceptance

EPOCHS = 20  # enough to beat the mean, so that there is a version


@pytest.fixture(scope="module")
def here(services, tmp_path_factory):
    """Two closed studies on data sets of their own: `one`, and `other`, which trains each point twice."""
    folder = tmp_path_factory.mktemp("compare")
    with fresh_database(services) as url:
        shell = Shell(folder / "home", url, services.tracking_uri)
        for seed, name in enumerate(("one", "other"), start=70):
            data, twice = cells.make(folder / f"cells-{name}", seed=seed), name == "other"
            rates = "[1e-3]" if twice else "[1e-3, 1e-4]"
            path = cells.study(folder, name, data=data, epochs=EPOCHS, rates=rates)
            path.write_text(("repeats = 2\n" if twice else "") + path.read_text())
            shell.hpo("run", "--study", path)
            shell.hpo("promote", "--study", name, "--force")
        yield shell
        shell.close()


def compared(shell: Shell, *names: str) -> comparison.Comparison:
    return comparison.compare(shell.queue, Tracker(shell.tracking_uri), names)


def best(shell: Shell, name: str):
    return min(shell.trials(name), key=lambda job: job.result.best_val_nmse)


def rows(output: str) -> list[tuple[str, str, list[str]]]:
    """Label, mark and cells of each row of a printed table that has cells."""
    found = []
    for line in output.splitlines():
        label, *cells_ = [cell.strip() for cell in line.strip("│").split("│")]
        if line.startswith("│") and label and any(cells_):
            found.append((label, cells_[0], cells_[1:]))
    return found


def test_a_study_a_trial_a_run_and_a_version_are_names_of_the_same_trial(here):
    job, model = best(here, "one"), here.queue.study("one").facts.model_name
    names = ["one", f"one/{job.number}", f"one/{job.number}/0", job.run_id]
    names += [f"{model}/1", f"{model}@champion", f"{model}@one", "@one"]
    found = here.json("compare", *names)
    assert [thing["name"] for thing in found["things"]] == names
    assert {thing["run_id"] for thing in found["things"]} == {job.run_id}
    assert {(thing["version"], thing["aliases"]) for thing in found["things"]} == {(f"{model}/1", "@champion @one")}
    assert found["differences"] == []
    assert here.hpo("compare", *names, "--differences").startswith("No difference")


def test_a_point_trained_twice_stands_for_its_better_repeat(here):
    first, second = (job for job in here.trials("other") if job.number == 1)
    best_of_both = min(first, second, key=lambda job: job.result.best_val_nmse)
    whole, *repeats = (thing.values for thing in compared(here, "other/1", "other/1/0", "other/1/1").things)
    assert whole["run_id"] == best_of_both.run_id
    assert [each["run_id"] for each in repeats] == [first.run_id, second.run_id]
    assert [each["repeat"] for each in repeats] == [0, 1]
    mean = (first.result.best_val_nmse + second.result.best_val_nmse) / 2
    assert [each["repeats_nmse_mean"] for each in repeats] == pytest.approx([mean, mean])


def test_what_differs_is_marked_and_nothing_else_and_can_be_shown_alone(here):
    names = ("one/0", "one/1")  # they differ in the learning rate alone
    found = here.json("compare", *names)
    everything, alone = rows(here.hpo("compare", *names)), rows(here.hpo("compare", *names, "--differences"))
    marked = [label for label, mark, _ in everything if mark == "≠"]
    assert [label for label, *_ in alone] == marked and {mark for _, mark, _ in alone} == {"≠"}
    assert len(marked) == len(found["differences"])
    assert [key for key in found["differences"] if key.startswith(("model.", "training."))] == [
        "training.learning_rate"
    ]
    for label, mark, (first, second, *_) in everything:
        if not mark:
            assert first == second, label
    same = {label for label, mark, _ in everything if not mark}
    assert {"study", "state", "model.filters", "training.epochs", "seed", "parameters", "data", "split", "host"} <= same
    assert ("training.learning_rate", "≠", ["1e-3", "1e-4", "", ""]) in alone


def test_in_a_pipe_every_row_is_one_line_however_many_columns_there_are(here):
    names = ["one", "other", "one/0", "one/1", "other/1/0", "other/1/1"]
    output = here.hpo("compare", *names)
    printed, found = rows(output), here.json("compare", *names)["things"]
    settings_ = {key for thing in found for key in thing if key.startswith(("model.", "training.", "version."))}
    assert settings_ <= {label for label, *_ in printed}
    lines = [line for line in output.splitlines() if line.startswith("│")]
    assert not [line for line in lines if not line.split("│")[1].strip()], "what a row goes on with in the next line"


def test_the_values_are_those_of_the_database(here):
    found = here.json("compare", "one/0", "one/1")
    assert found["warning"] is None
    for thing, job in zip(found["things"], here.trials("one"), strict=False):
        result, validation = job.result, job.result.validation
        assert (thing["trial"], thing["config"], thing["state"], thing["attempt"]) == (
            job.number,
            job.config,
            "done",
            1,
        )
        assert {key: thing[f"model.{key}"] for key in job.spec.model} == job.spec.model
        assert {key: thing[f"training.{key}"] for key in job.spec.training} == job.spec.training
        for key in ("seed", "parameters", "trainable_parameters", "data", "split", "identity", "numerics"):
            assert thing[key] == getattr(job.spec, key), key
        for key in ("best_val_nmse", "best_val_mse", "best_epoch", "last_val_nmse", "last_val_mse", "epochs"):
            assert thing[key] == getattr(result, key), key
        assert thing["train_seconds"] == result.seconds
        assert [thing[f"best_val_{key}"] for key in ("r2", "nrmse", "mape")] == [
            getattr(validation, key) for key in ("r2", "nrmse", "mape")
        ]
        for score in ("nmse", "r2"):
            listed = [thing[f"best_val_{score}/{name}"] for name in result.target_names]
            assert listed == validation.per_target[score]


def test_no_score_stands_alone_and_the_test_split_is_shown_only_where_it_was_opened(here):
    job = best(here, "one")
    other = next(each for each in here.trials("one") if each.number != job.number)
    found = here.json("compare", "one", f"one/{other.number}")
    winner, loser = found["things"]
    mean, cubic = found["predictors"]
    closing = next(each.closing for each in here.queue.jobs("one") if each.kind == "closing")
    assert winner["test_nmse"] == closing.winner.test.nmse
    assert not [key for key in loser if key.startswith("test")]
    predictors = here.queue.study("one").facts.predictors
    for shown, name in ((mean, "mean"), (cubic, "volume fraction")):
        assert shown["best_val_nmse"] == predictors[name].validation.nmse
        assert shown["test_r2/C11"] == closing.predictors[name].test.per_target["r2"][0]
    scores = {key for key in winner if re.match("best_val_|test_", key)}
    assert scores == {key for key in cubic if re.match("best_val_|test_", key)}, "each has a trivial one beside it"
    unopened = here.json("compare", f"one/{other.number}", f"one/{other.number}")
    assert not [key for each in unopened["predictors"] for key in each if key.startswith("test")]


def test_the_best_of_each_score_is_marked_predictors_included(here):
    found = compared(here, "one/0", "one/1")
    columns = [*found.things, *found.predictors]
    output = {label: cells_ for label, _, cells_ in rows(here.hpo("compare", "one/0", "one/1"))}
    for label, key, best_of in (("NRMSE", "best_val_nrmse", min), ("R² C33", "best_val_r2/C33", max)):
        values = [each.values[key] for each in columns]
        assert [cell.endswith("*") for cell in output[label]] == [value == best_of(values) for value in values]


def test_scores_on_different_data_are_said_not_to_be_comparable(here):
    digests = [here.queue.study(name).facts.data.digest for name in ("one", "other")]
    output = here.hpo("compare", "one", "other")
    assert "NOT COMPARABLE: the scores are of different data or splits" in output
    assert all(digest[:8] in output for digest in digests)
    assert not any(cell.endswith("*") for _, _, cells_ in rows(output) for cell in cells_)
    found = here.json("compare", "one", "other")
    assert found["warning"].startswith("NOT COMPARABLE")
    assert [each["data"] for each in found["predictors"]] == [digests[0]] * 2 + [digests[1]] * 2


def test_without_mlflow_everything_is_shown_that_the_database_knows(here, tmp_path):
    away = Shell(tmp_path / "home", here.database_url, "http://127.0.0.1:9")
    output = away.hpo("compare", "one/0", "one/1")
    away.close()
    assert "MLflow does not answer: machines and registered versions are left out." in output
    labels = {label for label, *_ in rows(output)}
    assert {"NMSE C11", "attempt", "run id"} <= labels and not {"host", "version", "aliases"} & labels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onee", "found 'onee'. Did you mean one?"),
        ("one/9", "no trial '9': expected a number of 0 to 3. `hpo trials --study one` lists them."),
        ("one/0/1", "no trial '0/1': expected a number of 0 to 3."),
        ("other/0/2", "expected a number of 0 to 1, then perhaps / and a repeat of 0 to 1."),
        ("one/-1", "no trial '-1'"),
        ("@champion", "'@champion' stands for several versions: expected one of "),
        ("@onn", "found '@onn'. Did you mean @one?"),
        ("{model}@onn", "has no version 'onn'. There are: @champion, @one, 1."),
        ("{model}/2", "has no version '2'. There are: @champion, @one, 1."),
        ("{model}x@one", "Did you mean {model}@one"),
        ("{study_run}", "is of no trial, but of the study one as a whole: name one."),
        ("0" * 32, "an MLflow run (32 hexadecimal digits) or a registered version"),
    ],
)
def test_a_name_that_stands_for_nothing_gets_one_message(here, name, message):
    facts = here.queue.study("one").facts
    known = {"model": facts.model_name, "study_run": facts.study_run_id}
    with pytest.raises(NotFound, match=re.escape(message.format(**known))):
        compared(here, "one", name.format(**known))


def test_a_mistyped_name_ends_the_command_with_exit_code_1(here):
    assert here.hpo("compare", "one", "onee", code=1).startswith("hpo: Expected a study")
    assert "required" in here.hpo("compare", "one", code=2)


def test_trials_that_are_not_done_show_what_they_have(here, tmp_path, data):
    path = cells.study(tmp_path, "open", data=data, epochs=50)
    ready = prepare(study.load(str(path)))
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    plans.plan(ready, here.queue, Tracker(here.tracking_uri), read, here.database_url)
    dead, running, *others = (here.queue.claim("open", worker="w", lease=60) for _ in range(4))
    for attempt in range(COUNTED_LIMIT):  # the others are held: nothing else can be claimed
        here.queue.give_back(dead, AttemptOutcome.FAILED, reason="trainer ended")
        dead = here.queue.claim("open", worker="w", lease=60) if attempt < COUNTED_LIMIT - 1 else dead
    for job in others:
        here.queue.give_back(job, AttemptOutcome.HANDED_BACK, reason="handed back")
    losses = [0.9, 0.4, 0.7]
    epochs = [
        (number, 1_750_000_000_000, {"val/nmse": loss, "val/mse": 10 * loss, "seconds": 0.5})
        for number, loss in enumerate(losses, start=1)
    ]
    here.queue.add_epochs(running, epochs)
    waiting = next(job for job in here.trials("open") if job.attempt == 0)
    with pytest.raises(NotFound, match=r"no finished trial that could stand for it\. Name one, as in open/0"):
        compared(here, "open", "one")

    found = here.json("compare", *(f"open/{job.number}" for job in (running, dead, waiting)))
    first, second, third = found["things"]
    assert (first["state"], first["epochs"], first["train_seconds"]) == ("running", 3, 1.5)
    assert (first["best_val_nmse"], first["best_val_mse"], first["best_epoch"]) == (0.4, 4.0, 2)
    assert (first["last_val_nmse"], first["last_val_mse"]) == (0.7, 7.0)
    assert (second["state"], second["reason"], second["attempt"]) == ("dead", "trainer ended", COUNTED_LIMIT)
    assert (third["state"], third["epochs"]) == ("waiting", 0)
    assert "best_val_nmse" not in second and "best_val_nmse" not in third
    assert {"state", "best_val_nmse", "reason"} <= set(found["differences"])
    assert len(found["predictors"]) == 2 and found["warning"] is None
    json.dumps(found, allow_nan=False)


def test_scores_that_do_not_exist_are_left_out():
    means = dict.fromkeys(SCORES) | {"mse": 2.0}
    scores = Scores(**means, per_target={"nmse": [None, 0.5], "r2": [None, None]})
    sections = comparison._score_sections({}, scores, scores, ["C11", "C12"])
    assert {key: value for each in sections.values() for key, value in each.items()} == {
        "best_val_nmse/C12": 0.5,
        "test_mse": 2.0,
        "test_nmse/C12": 0.5,
    }
