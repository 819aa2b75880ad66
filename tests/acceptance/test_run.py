"""`hpo run` as users run it: real processes on a real Postgres and a real MLflow server."""

import itertools
import json
import re
import subprocess
import sys

import cells
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from shell import PATIENCE, check_recorded_once, mirrored

from hpo.closing import promotion
from hpo.operations import invariants
from hpo.operations.predict import predict
from hpo.study.records import SourceTrial
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance


def test_the_grid_runs_to_its_end_and_its_champion_can_be_used(shell, tmp_path):
    shell.is_inside = False  # each command is a process, as users have it
    data = cells.make(tmp_path / "tiny", seed=1)  # its own: all studies on one data set compete for one champion
    words = ("run", "--study", "grid", "--data", data, "--epochs", 15, "--trainers", 2)
    output = shell.hpo(*words)
    study = shell.json("studies")[0]["name"]
    assert re.fullmatch(r"grid\+[0-9a-f]{8}", study)
    check_recorded_once(shell, study, points=24, epochs=15)
    assert "volume fraction, cubic" in output and "mean of the training labels" in output

    again = shell.hpo(*words)
    table = output[output.index("┏") : output.index("Go on with")]
    assert table in again, "the same command prints the same result"
    assert {job.attempt for job in shell.trials(study)} == {1}, "and trains nothing"

    listed = shell.json("trials", "--study", study)
    best = min(listed, key=lambda trial: trial["value"])
    assert [trial["config"] for trial in listed] == list(range(24))
    assert listed[22]["params"] == {"filters": 32, "kernel_size": 5, "dropout": 0.2, "learning_rate": 1e-3}

    client = MlflowClient(shell.tracking_uri)
    for place, trial in enumerate(sorted(listed, key=lambda trial: trial["value"])):
        pictures = {"loss.png", "parity.png"} if place < 10 else set()
        pictures |= {"parity-test.png"} if place == 0 else set()
        assert {each.path for each in client.list_artifacts(trial["run_id"], "plots")} == {
            f"plots/{picture}" for picture in pictures
        }

    champion = tmp_path / "champion"
    downloaded = shell.hpo("download", champion)
    image = data / "3_cell.png"
    rows = json.loads(shell.hpo("predict", champion, image, "--json"))
    assert rows["unit"] == "GPa"
    ours = [value for name, value in rows["predictions"][0].items() if name != "image"]
    registered = shell.queue.study(study).facts.model_name
    (model,) = [each for each in client.search_registered_models() if each.name == registered]
    version = client.get_model_version_by_alias(model.name, "champion")
    assert version.run_id == best["run_id"]
    mark = "it does NOT beat a cubic polynomial in the volume fraction"  # after a few epochs
    assert mark in output and mark in version.description and version.tags["hpo.beats_volume_fraction"] == "false"
    assert "cubic polynomial in the volume fraction predicts better than this model" in downloaded

    client.delete_registered_model_alias(model.name, "champion")
    assert "@champion is this version" in shell.hpo("promote", "--study", study)
    assert client.get_model_version_by_alias(model.name, "champion").version == version.version
    assert f"MLflow: {shell.tracking_uri}" in shell.hpo("status")
    assert shell.json("status")["studies"][0]["state"] == "closed"
    plain = f"""
import mlflow.pyfunc, numpy, PIL.Image
image = numpy.asarray(PIL.Image.open({str(image)!r}), numpy.float32) / 255
print(mlflow.pyfunc.load_model("models:/{model.name}@champion").predict(image[None, None]).tolist())
"""
    theirs = subprocess.run(
        [sys.executable, "-c", plain], env=shell.environment, capture_output=True, text=True, check=True
    )
    assert np.allclose(json.loads(theirs.stdout)[0], ours, rtol=1e-5)

    assert f"Deleted the study {study}" in shell.hpo("delete", "--study", study, "--yes")
    assert shell.json("studies") == []
    assert [each.aliases for each in client.search_registered_models() if each.name == model.name] in ([{}], [])


@pytest.mark.parametrize(
    "workers",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.long)],
    ids="{} beside".format,
)
def test_two_runs_and_workers_at_once_train_no_point_twice(shell, data, workers):
    seed = 80 + workers  # a study of its own for each case
    words = ("--data", data, "--epochs", 1, "--seed", seed, "--set", "space.filters=[2, 3, 4]")
    words += ("--set", "space.dropout=[0.2]")
    first = shell.start("run", "--study", "grid", *words, "--trainers", 1)
    study = shell.until(
        lambda: next((row.name for row in shell.queue.studies() if row.specification.seed == seed), None), "plan"
    )
    shell.until(lambda: shell.queue.study(study).facts.planned, "the plan")
    others = [shell.start("worker", "--study", study, "--trainers", 1) for _ in range(workers)]
    others.append(shell.start("run", "--study", "grid", *words, "--trainers", 1))
    for process in [first, *others]:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    check_recorded_once(shell, study, points=12, epochs=1)
    assert {job.attempt for job in shell.trials(study)} == {1}
    assert len({job.worker for job in shell.trials(study)}) > 1


@pytest.mark.long
def test_a_sampler_fills_its_slots_when_they_are_claimed_in_any_time_zone(shell, data, tmp_path):
    shell.environment |= {"TZ": "Pacific/Auckland"}
    rates = "{low = 1e-4, high = 1e-2, log = true}"
    study = cells.study(tmp_path, "tpe", data=data, epochs=2, rates=rates)
    study.write_text(study.read_text() + '[sampler]\nname = "tpe"\ntrials = 2\n')
    assert "opened once" in shell.hpo("run", "--study", study)
    check_recorded_once(shell, "tpe", points=2, epochs=2)
    with shell.queue.engine.connect() as connection:
        age = "SELECT extract(epoch FROM clock_timestamp() - changed_at) FROM hpo.job"
        assert all(0 <= seconds < PATIENCE for seconds in connection.exec_driver_sql(age).scalars())

    row, trained = shell.queue.study("tpe"), shell.trials("tpe")
    output = " ".join(shell.hpo("run", "--study", "tpe", "--trials", 4, "--until", "nmse=1000").split())
    assert "Ended by --until nmse=1000 at validation NMSE" in output and "2 trials wait" in output
    after, closing = shell.queue.study("tpe"), shell.queue.repeats("tpe", -1)[0].closing
    assert (after.identity, after.trials, closing.openings, closing.budget.left) == (row.identity, 4, 2, 2)
    assert [job.result for job in shell.trials("tpe")] == [*(job.result for job in trained), None, None]
    with mirrored(shell, "tpe") as shown:
        assert invariants.check(shown) == []
    run = MlflowClient(shell.tracking_uri).get_run(row.facts.study_run_id).data
    assert run.tags["hpo.test_openings"] == "2" and run.tags["hpo.budget"].startswith("Ended by --until")
    assert "\n4 trials; data set" in run.tags["mlflow.note.content"]


@pytest.mark.long
def test_a_study_that_a_budget_ended_goes_on_with_more_trials(shell, data, tmp_path):
    study = cells.study(tmp_path, "spent", data=data, epochs=300, rates="{low = 1e-4, high = 1e-2, log = true}")
    study.write_text(study.read_text() + '[sampler]\nname = "random"\ntrials = 3\n')
    shell.hpo("run", "--study", study, "--trainers", 1, "--until", "nmse=1000")
    done = {job.number: job.result for job in shell.trials("spent") if job.state == "done"}
    assert 0 < len(done) < 3 and shell.queue.study("spent").budget.budget == "--until nmse=1000"
    output = shell.hpo("run", "--study", "spent", "--max-hours", 0)
    assert re.search(rf"Ended by --max-hours 0 at \d+ s; {3 - len(done)} trial", " ".join(output.split()))
    shell.hpo("run", "--study", "spent", "--trials", 4)
    check_recorded_once(shell, "spent", points=4, epochs=300)
    again = {job.number: job.result for job in shell.trials("spent")}
    assert {number: again[number] for number in done} == done, "what was trained stays"
    assert shell.queue.study("spent").budget is None and shell.queue.repeats("spent", -1)[0].closing.openings == 3


@pytest.mark.long
def test_the_periodic_studys_champion_moves_with_the_image(shell, tmp_path):
    # Its own: all studies on one data set compete for one champion. The smallest cells for the point to start from.
    data = cells.make(tmp_path / "cells", size=18, seed=2)
    with (data / "dataset.toml").open("a") as file:
        file.write(cells.PHASES.format(matrix=3.5, inclusion=70.0))
    overrides = ("space.depth=[2, 3]", "space.width=[4, 24]", "sampler.trials=2", "points=1", "repeats=2")
    words = tuple(itertools.chain.from_iterable(("--set", each) for each in overrides))
    output = shell.hpo("run", "--study", "periodic", "--data", data, "--epochs", 2, *words)
    best, searched = sorted(row.name for row in shell.queue.studies())
    check_recorded_once(shell, searched, points=2, epochs=2)
    trials, again = shell.trials(searched), shell.trials(best)
    first = trials[0].spec.point
    assert (first["width"], first["ema"]) == (24, 0.99), "the point the file starts from"
    nmse = lambda job: job.result.best_val_nmse  # noqa: E731
    chosen = min(trials, key=nmse)
    origin = SourceTrial(study=searched, trial=chosen.number, run_id=chosen.run_id)
    assert [job.spec.point for job in again] == [chosen.spec.point] * 2
    assert [(job.spec.seed, job.spec.best_of) for job in again] == [(1, origin), (2, origin)]

    client = MlflowClient(shell.tracking_uri)
    run = client.get_run(again[0].run_id).data
    assert run.params["best_of.trial"] == str(chosen.number)
    assert run.tags["hpo.best_of"] == f"trial {chosen.number} of {searched}, run {chosen.run_id}"
    model = shell.queue.study(best).facts.model_name
    champion = min([chosen, *again], key=nmse)  # of all networks of the point that is best on average
    version = client.get_model_version_by_alias(model, "champion")
    assert version.run_id == champion.run_id
    (winner,) = client.search_model_versions(f"name = '{model}' and run_id = '{min(again, key=nmse).run_id}'")
    assert f"The point is that of trial {chosen.number} of {searched}. It is trained with 2 seeds" in winner.description
    assert "mean of its point" in client.get_registered_model(model).description
    said = "stays version" if champion is chosen else "is this version"
    assert re.search(r"validation, repeats │ +mean [0-9.e-]+ ± [0-9.e-]+", output), "in the comparison"
    assert f"@champion {said}" in output.partition(f"as {model} version {winner.version}")[2]

    folder = promotion.fetch(Tracker(shell.tracking_uri), champion, tmp_path / "champion")
    image = Image.open(data / "3_cell.png")
    image.transpose(Image.Transpose.TRANSPOSE).save(tmp_path / "transposed.png")
    before, after = predict(folder, [data / "3_cell.png", tmp_path / "transposed.png"]).to_dict("records")
    for name, other in (("C11", "C22"), ("C23", "C13"), ("C44", "C55"), ("C33", "C33"), ("C66", "C66")):
        assert before[name] == pytest.approx(after[other], rel=1e-5)


def test_a_dry_run_shows_the_plan_and_leaves_nothing_behind(shell, data):
    output = shell.hpo("run", "--study", "grid", "--data", data, "--dry-run")
    assert "118,281" in output and "Nothing was started or written." in output  # F=32, K=5 at 16x16 pixels
    assert not shell.home.exists()
    assert not shell.queue.installed()


def test_a_dry_run_measures_a_search_where_it_starts_and_at_the_ends_of_its_space(shell, data, tmp_path):
    (tmp_path / "searched.toml").write_text(
        "[model]\nfamily = 'cnn'\nkernel_size = 3\ndropout = 0.0\n[sampler]\nname = 'tpe'\ntrials = 3\n"
        "[training]\nepochs = 5\nlearning_rate = 1e-3\n"
        "[[start]]\nfilters = 8\n[space]\nfilters = [4, 8, 16]\n"
    )
    output = shell.hpo("run", "--study", tmp_path / "searched.toml", "--data", data, "--dry-run")
    rows = [line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["start", "smallest", "largest"]
    least, first, most = (int(rows[at][1].replace(",", "")) for at in (1, 0, 2))
    assert least < first < most and "3 trials, chosen by the sampler 'tpe'" in " ".join(output.split())
    assert not shell.queue.installed()


def test_cells_that_were_made_here_are_good_data(shell, tmp_path):
    folder = tmp_path / "made"
    shell.hpo("data", "make", folder, "--count", 2, "--size", 48, "--seed", 3)
    checked = " ".join(shell.hpo("data", "check", folder, code=1).split())
    assert "read, with errors below. 2 images of 48 x 48 pixels, digest" in checked
    assert "No study can be trained on it: expected at least 20 images, found 2." in checked
    next(folder.glob("1_*.png")).unlink()
    assert "row 1: expected one image 1_*.png, found none" in shell.hpo("data", "check", folder, code=1)


def test_other_data_or_an_edited_file_under_a_name_is_refused_and_the_study_is_kept(shell, tmp_path):
    data = cells.make(tmp_path / "cells", count=30)
    study = cells.study(tmp_path, "mine", data=data, epochs=1, rates="[1e-3]")
    shell.hpo("run", "--study", study)
    table = data / "1-30_Cij_pbc.csv"
    table.write_text(re.sub(r"^1,\d+", "1,77", table.read_text()))
    output = shell.hpo("run", "--study", study, code=1)
    assert re.search(r"Refusing .*'mine'.* data\.digest: expected [0-9a-f]{8} as recorded, found [0-9a-f]{8}", output)
    assert "hpo delete --study mine" in output
    study.write_text(study.read_text().replace("epochs = 1", "epochs = 2"))
    output = shell.hpo("run", "--study", study, code=1)
    assert "training.epochs: expected 1 as recorded, found 2" in output
    assert shell.json("studies")[0]["state"] == "closed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "--study", "gird"), "Did you mean 'grid'"),
        (("run", "--study", "grid", "--epochs", "0"), "expected a whole number, at least 1"),
        (("run", "--study", "grid", "--data", "/nowhere"), "/nowhere"),
        (("trials", "--study", "grid"), "No study 'grid' has been planned here"),
        (("worker", "--study", "grid"), "No study 'grid' has been planned here"),
        (("download", "x"), "No study has been planned here"),
        (("predict", "/nowhere", "x.png"), "no such file"),
        (("data", "check", "/nowhere"), "/nowhere"),
        (("delete", "--study", "grid", "--yes"), "No study 'grid' has been planned here"),
        (("status", "--watch", "--json"), "--json and --watch: expected one of them, found both."),
        (("compare", "a", "b", "--differences", "--json"), "--json and --differences: expected one of them"),
        (("run", "--study", "grid", "--dry-run", "--workers", "4"), "--dry-run and --workers: expected one of them"),
        (("run", "--study", "grid", "--dry-run", "--slurm", "time=1"), "--dry-run and --slurm: expected one of them"),
        (("run", "--study", "grid", "--dry-run", "--on", "slurm"), "--dry-run and --on: expected one of them"),
        (("run", "--study", "grid", "--dry-run", "--retry"), "--dry-run and --retry: expected one of them"),
        (
            ("run", "--study", "grid", "--epochs", "3", "--set", "training.epochs=4"),
            "--epochs and --set training.epochs",
        ),
        (
            ("run", "--study", "protocol", "--seed", "3", "--set", "seed=4"),
            "--seed and --set seed=…: expected one",
        ),
        (("run", "--study", "grid", "--data", "caf\udce9"), "--data caf\\udce9: expected a path in UTF-8"),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_1(shell, words, message):
    output = shell.hpo(*words, code=1)
    assert message in output and output.startswith("hpo: ")


def test_an_unreachable_database_is_said_so(shell):
    shell.environment |= {"HPO_DATABASE_URL": "postgresql://a:secret@127.0.0.1:9/b"}
    output = shell.hpo("studies", code=1)
    assert "The database cannot be reached" in output and "secret" not in output
