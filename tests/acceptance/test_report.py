"""`hpo report`: every number in it is derived again from MLflow, the data folder and the downloaded model."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cells
import numpy as np
import pandas
import pytest
import records
from mlflow import MlflowClient
from places import ROOT
from shell import Shell, fresh_database

from data_pipeline import dataset
from data_pipeline.split import split
from hpo.report.results import fruitless
from hpo.report.winners import comparable

pytestmark = pytest.mark.acceptance
EPOCHS = 30


@pytest.fixture(scope="module")
def reported(services, tmp_path_factory):
    """Two closed studies on data of their own, a baseline and a grid of four points, and their report; the phases are
    known from the second on."""
    folder = tmp_path_factory.mktemp("reported")
    data = cells.make(folder / "cells", seed=21)
    for path in sorted(data.glob("*_cell.png"))[::2]:
        path.rename(path.with_name(path.name.replace("cell", "layered")))  # two kinds
    grid, plain = cells.study(folder, "tuned", data=data, epochs=EPOCHS), folder / "plain.toml"
    training = f"[training]\nepochs = {EPOCHS}\nlearning_rate = 1e-3\n"
    words = 'description = "a & <script>b</script>"\n'
    protocol = (ROOT / "hpo/studies/protocol.toml").read_text()
    claims = protocol[protocol.index("[[claims]]") :]
    plain.write_text(f'{words}[data]\npath = "{data}"\n[model]\nfamily = "baseline"\n{training}{claims}')
    with fresh_database(services) as url:
        shell = Shell(folder / "home", url, services.tracking_uri)
        try:
            assert "hpo report --study" in shell.hpo("run", "--study", plain)
            with (data / "dataset.toml").open("a") as facts:
                facts.write(cells.PHASES.format(matrix=3.5, inclusion=70.0))
            assert "hpo report --study" in shell.hpo("run", "--study", grid)
            assert "report.html: open it in a browser" in shell.hpo("report", "-o", folder / "report")
            yield shell, data, plain.stem, grid.stem, folder / "report"
        finally:
            shell.close()


def predicted_by_plain_mlflow(shell, uri: str, images: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "images.npy", images)
    code = f"""
import mlflow.pyfunc, numpy
images = numpy.load({str(folder / "images.npy")!r})
numpy.save({str(folder / "said.npy")!r}, mlflow.pyfunc.load_model({uri!r}).predict(images))
"""
    subprocess.run([sys.executable, "-c", code], env=shell.environment, check=True, capture_output=True)
    return np.load(folder / "said.npy").astype(np.float64)


def isotropic(young: float, poisson: float) -> np.ndarray:
    """Stiffness (6, 6) in Voigt's notation, in the unit of Young's modulus."""
    compliance = (np.diag(6 * [1 + poisson]) - np.pad(np.full((3, 3), poisson), (0, 3))) / young
    compliance[3:, 3:] *= 2
    return np.linalg.inv(compliance)


def orthotropic(row: np.ndarray) -> np.ndarray:
    """(6, 6) from C11, C22, C33, C12, C23, C13, C44, C55, C66."""
    c11, c22, c33, c12, c23, c13, *shear = row
    found = np.diag([c11, c22, c33, *shear])
    found[:3, :3] += [[0, c12, c13], [c12, 0, c23], [c13, c23, 0]]
    return found


@pytest.mark.slow
def test_every_number_equals_what_mlflow_the_folder_and_the_models_give(reported, tmp_path):
    shell, folder, plain, grid, report = reported
    client = MlflowClient(shell.tracking_uri)
    data, parts = dataset.load(folder), split(60)
    truth, variance = data.targets[parts.test], data.targets[parts.train].var(axis=0)

    trials = pandas.read_csv(report / f"tables/{grid}-trials.csv")
    best = pandas.read_csv(report / f"tables/{grid}-top.csv")
    assert len(trials) == len(best) == 4 + 2
    results = {job.run_id: job.result for study in (plain, grid) for job in shell.trials(study)}
    experiment = client.get_experiment_by_name(grid).experiment_id
    runs = {
        int(run.data.params["config"]): run for run in client.search_runs([experiment], "tags.`hpo.kind` = 'trial'")
    }
    (trivial,) = client.search_runs([experiment], "tags.`hpo.kind` = 'predictor' and params.predictor = 'mean'")
    mean = trivial.data.metrics["best_val_nmse"]
    for row in best[best["config"].notna()].to_dict("records"):
        run = runs[int(row["config"])]
        curves = {
            name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
            for name in ("val/nmse", "val/mse")
        }
        curve = curves["val/nmse"]
        epoch = min(curve, key=lambda step: (curve[step], step))
        assert row["validation NMSE"] == curve[epoch]
        assert row["validation MSE GPa²"] == curves["val/mse"][epoch]
        assert (row["best epoch"], row["last epoch NMSE"]) == (epoch, curve[EPOCHS])
        assert row["last epoch MSE GPa²"] == curves["val/mse"][EPOCHS]
        assert (row["R²"], row["NRMSE"]) == (run.data.metrics["best_val_r2"], run.data.metrics["best_val_nrmse"])
        assert row["MAPE"] == results[run.info.run_id].validation.mape
        assert row["training s"] == results[run.info.run_id].seconds
        if curve[epoch] > 0.98 * mean:
            assert np.isnan(row["epochs to 5 %"]), "it has not learned more than the mean"
        else:
            assert row["epochs to 5 %"] == min(step for step in curve if curve[step] <= 1.05 * curve[epoch])
        assert (int(row["filters"]), row["learning_rate"]) == (
            int(run.data.params["filters"]),
            float(run.data.params["learning_rate"]),
        )
        assert row["parameters"] == int(run.data.params["parameters"])
        (listed,) = trials[trials["config"] == row["config"]].to_dict("records")
        assert listed["validation NMSE"] == row["validation NMSE"]

    physics = pandas.read_csv(report / "tables/physics.csv").set_index("model")
    labels = physics.loc["the labels themselves"]  # which the cached data set of the first study knows no phases of
    assert (labels["above Voigt"], labels["below Reuss"]) == (0, 0) and labels["Hill residual GPa"] < 1e-9

    models = pandas.read_csv(report / "tables/models-test.csv").set_index("model")
    sizes = pandas.read_csv(report / "tables/models.csv").set_index("model")
    components = {
        score: pandas.read_csv(report / f"tables/targets-{score}.csv").set_index("model")
        for score in ("r2", "nrmse", "rmse", "mape")
    }
    said = {"mean of the training labels": np.tile(data.targets[parts.train].mean(axis=0), (len(truth), 1))}
    fraction = data.images.mean(axis=(1, 2, 3), dtype=np.float64)
    basis = np.vander(fraction, 4)
    fitted = np.linalg.lstsq(basis[parts.train], data.targets[parts.train], rcond=None)[0]
    said["volume fraction, cubic"] = basis[parts.test] @ fitted
    for study in (plain, grid):
        (title,) = [name for name in models.index if name.startswith(study)]
        row = models.loc[title]
        winner = min(
            client.search_runs([client.get_experiment_by_name(study).experiment_id], "tags.`hpo.kind` = 'trial'"),
            key=lambda run: run.data.metrics["best_val_nmse"],
        )
        assert row["NMSE"] == winner.data.metrics["test_nmse"] and row["R²"] == winner.data.metrics["test_r2"]
        assert row["validation NMSE"] == winner.data.metrics["best_val_nmse"]
        name = shell.queue.study(study).facts.model_name
        (version,) = client.search_model_versions(f"name = '{name}' and run_id = '{winner.info.run_id}'")
        size, curve = sizes.loc[title], client.get_metric_history(winner.info.run_id, "val/nmse")
        assert size["validation NMSE"] == min(point.value for point in curve)
        assert size["last epoch NMSE"] == next(point.value for point in curve if point.step == EPOCHS)
        assert size["best epoch"] == min(curve, key=lambda point: (point.value, point.step)).step
        assert size["parameters"] == size["trainable"] == int(winner.data.params["parameters"])
        assert (size["version"], size["training s"]) == (
            int(version.version),
            results[winner.info.run_id].seconds,
        )
        uri = f"models:/{name}/{version.version}"
        said[title] = predicted_by_plain_mlflow(shell, uri, data.images[parts.test], tmp_path)
    for title, predicted in said.items():
        error = predicted - truth
        mse = (error**2).mean(axis=0)
        expected = {
            "NMSE": (mse / variance).mean(),
            "MSE GPa²": mse.mean(),
            "R²": (1 - mse / truth.var(axis=0)).mean(),
            "NRMSE": np.sqrt(mse / variance).mean(),
            "MAPE": np.abs(error / truth).mean(),
        }
        for score, value in expected.items():
            assert models.loc[title, score] == pytest.approx(value, rel=1e-4), (title, score)
            assert models.loc[title, f"{score} 95 % low"] <= value <= models.loc[title, f"{score} 95 % high"]
        per_target = {
            "r2": 1 - mse / truth.var(axis=0),
            "nrmse": np.sqrt(mse / variance),
            "rmse": np.sqrt(mse),
            "mape": np.abs(error / truth).mean(axis=0),
        }
        for score, values in per_target.items():
            row = components[score].loc[title]
            assert row.to_numpy()[:-1] == pytest.approx(values, rel=1e-3, abs=1e-5), (title, score)
            assert row.iloc[-1] == pytest.approx(values.mean(), rel=1e-3, abs=1e-5)

    stiff, soft = isotropic(70.0, 0.22), isotropic(3.5, 0.35)
    for title, predicted in said.items():
        indefinite, above, below = [], [], []
        for row, share in zip(predicted, fraction[parts.test], strict=True):
            matrix = orthotropic(row)
            voigt = share * stiff + (1 - share) * soft
            reuss = np.linalg.inv(share * np.linalg.inv(stiff) + (1 - share) * np.linalg.inv(soft))
            least = [np.linalg.eigvalsh(each)[0] for each in (matrix, voigt - matrix, matrix - reuss)]
            indefinite, above, below = (
                [*found, value < -1e-6] for found, value in zip((indefinite, above, below), least, strict=True)
            )
        found = physics.loc[title, ["not positive definite", "above Voigt", "below Reuss"]]
        assert list(found) == pytest.approx([np.mean(each) for each in (indefinite, above, below)]), title

    score = {
        (int(run.data.params["filters"]), float(run.data.params["learning_rate"])): run.data.metrics["best_val_nmse"]
        for run in runs.values()
    }
    effects = pandas.read_csv(report / f"tables/{grid}-effects.csv").set_index(["parameter", "value"])
    pairs = pandas.read_csv(report / f"tables/{grid}-contrasts.csv").set_index("parameter")
    for filters in (2, 4):
        mean = (score[filters, 1e-3] + score[filters, 1e-4]) / 2
        assert effects.loc[("filters", filters), "mean validation NMSE"] == pytest.approx(mean)
    ratio = (score[4, 1e-3] / score[2, 1e-3] * score[4, 1e-4] / score[2, 1e-4]) ** 0.5
    assert pairs.loc["filters", "NMSE ratio"] == pytest.approx(ratio)

    ratio = (score[4, 1e-4] / score[4, 1e-3] * score[2, 1e-4] / score[2, 1e-3]) ** 0.5
    assert pairs.loc["learning_rate", "NMSE ratio"] in (pytest.approx(ratio), pytest.approx(1 / ratio))
    assert list(pairs["pairs"]) == [2, 2]

    worst = pandas.read_csv(report / "tables/worst.csv")
    trivial = ["mean of the training labels", "volume fraction, cubic", "descriptors, ridge"]
    best_title = models.drop(index=trivial)["validation NMSE"].idxmin()
    error = np.sqrt(((said[best_title] - truth) ** 2 / variance).mean(axis=1))
    order = np.argsort(-error)[: len(worst) // 2]
    assert list(worst["image"][::2]) == [data.names[parts.test[index]] for index in order]
    assert worst["NRMSE"][::2].to_numpy() == pytest.approx(error[order], rel=1e-3)
    assert worst[list(data.target_names)][::2].to_numpy() == pytest.approx(truth[order], rel=1e-9)
    assert worst[list(data.target_names)][1::2].to_numpy() == pytest.approx(said[best_title][order], rel=1e-4)
    assert worst["volume fraction"][::2].to_numpy() == pytest.approx(fraction[parts.test][order])

    kinds = pandas.read_csv(report / "tables/kinds.csv").set_index("kind")
    names = np.array([data.names[index] for index in parts.test])
    for kind in ("cell", "layered"):
        inside = np.array([kind in name for name in names])
        assert kinds.loc[kind, "test cells"] == inside.sum() > 1
        for title, column in ((best_title, ""), ("volume fraction, cubic", ", volume fraction")):
            mse = ((said[title] - truth)[inside] ** 2).mean(axis=0)
            assert kinds.loc[kind, f"NMSE{column}"] == pytest.approx((mse / variance).mean(), rel=1e-4)
            r2 = (1 - mse / truth[inside].var(axis=0)).mean()
            assert kinds.loc[kind, f"R²{column}"] == pytest.approx(r2, rel=1e-3, abs=1e-4)

    for table in (report / "tables").glob("*.csv"):
        records, frame = json.loads(table.with_suffix(".json").read_text()), pandas.read_csv(table)
        for record, row in zip(records, frame.to_dict("records"), strict=True):
            for name, value in record.items():
                if isinstance(value, float):
                    assert float(row[name]) == pytest.approx(value, rel=1e-12), table.name


@pytest.mark.slow
def test_the_page_stands_alone_is_attached_and_answers_the_questions(reported, tmp_path):
    shell, _, plain, grid, report = reported
    page = (report / "report.html").read_text()
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)", page)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    assert "<script" not in page and "a &amp; &lt;script&gt;b" in page, "a description is text"
    markdown = (report / "report.md").read_text()
    for picture in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (report / picture).read_text().startswith("<svg")
    client = MlflowClient(shell.tracking_uri)
    for study in (plain, grid):
        run = shell.queue.study(study).facts.study_run_id
        attached = client.download_artifacts(run, "report/report.html", tmp_path)
        assert Path(attached).read_text() == page
    asked = {row["question"]: row for row in json.loads((report / "tables/answers.json").read_text())}
    assert asked["Did tuning improve on the baseline?"]["answer"] in ("yes", "no, it did harm", "not distinguishable")
    assert asked["Which backbone was best?"]["answer"] == "not measured"
    assert asked["Dropout 0.2 is better than none"]["answer"] == "not measured"
    assert asked["More filters are better"]["answer"] in ("confirmed", "refuted", "not distinguishable")
    before = {path: path.read_bytes() for path in report.rglob("*.*")}
    shell.hpo("report", "-o", report)
    assert {path: path.read_bytes() for path in report.rglob("*.*")} == before, "the same evidence, the same bytes"


def test_a_sequence_compares_what_is_on_one_data_set_and_split():
    def closed(name: str, digest: str, split: str):
        facts = records.facts(data=dataclasses.replace(records.DATA, digest=digest, split=split))
        return records.study_row(name, name, facts=facts), {}

    a, b, c, d, e = [closed(*words) for words in ("a1s", "b2s", "c1s", "d1t", "e2s")]
    assert comparable([a, b, c, d, e]) == [[a, c], [b, e]]


@pytest.mark.slow
def test_what_cannot_be_reported_is_said(shell, data, tmp_path):
    assert "No study is closed yet" in shell.hpo("report", "-o", tmp_path / "report", code=1)
    assert "No study 'gird' has been planned here" in shell.hpo("report", "--study", "gird", "-o", tmp_path, code=1)
    unlike = cells.make(tmp_path / "unlike", count=30, seed=5)
    shell.hpo("run", "--study", cells.study(tmp_path, "told", data=unlike, epochs=1, rates="[1e-3]"))
    process = shell.start("run", "--study", cells.study(tmp_path, "untold", data=data, epochs=30_000), "--trainers", 1)
    shell.training("untold")
    process.kill()
    left = shell.hpo("report", "--study", "untold", "-o", tmp_path / "report", code=1)
    assert "The study untold is not closed: 4 trials are still to be trained" in left
    both = shell.hpo("report", "--study", "told", "--study", "untold", "-o", tmp_path / "report", code=1)
    assert "told and untold are on different ones" in both
    assert not (tmp_path / "report").exists()


@pytest.mark.long
def test_labels_of_a_tiny_unit_raise_the_alarm_on_terminal_run_and_report(shell, tmp_path):
    data = cells.make(tmp_path / "tiny")
    table = data / "1-60_Cij_pbc.csv"
    rows = np.loadtxt(table, delimiter=",")
    rows[:, 1:] *= 1e-8
    table.write_text("".join(f"{int(row[0])}," + ",".join(repr(float(x)) for x in row[1:]) + "\n" for row in rows))
    study = cells.study(tmp_path, "collapsed", data=data, epochs=5, rates="[1e-3]")
    study.write_text(study.read_text() + 'target_scaling = "none"\n')
    output = shell.hpo("run", "--study", study)
    assert "ALARM: R² of the best model is" in output
    run = shell.queue.study("collapsed").facts.study_run_id
    assert "explains next to nothing" in MlflowClient(shell.tracking_uri).get_run(run).data.tags["hpo.alarms"]
    assert "ALARM: collapsed: R² of the best model" in shell.hpo("report", "-o", tmp_path / "report")
    assert "explains next to nothing" in (tmp_path / "report/report.html").read_text()


def test_without_a_finished_trial_reasons_are_counted_and_the_way_out_is_said():
    states = [("dead", "out of memory")] * 12 + [("dead", "DatasetError: x")] + [("cancelled", "cancelled by me")]
    jobs = [SimpleNamespace(kind="trial", state=state, reason=reason) for state, reason in states]
    lines = fruitless("grid", [*jobs, SimpleNamespace(kind="closing", state="done", reason=None)])
    assert lines[:2] == ["12 of 14 dead: out of memory.", "1 of 14 dead: DatasetError: x."]
    assert ["--retry" in line for line in lines] == [False, False, False, True, False] and "--undo" in lines[-1]


@pytest.mark.long
def test_a_study_in_which_every_trial_diverged_is_reported_with_that(shell, tmp_path):
    data = cells.make(tmp_path / "cells", count=30, seed=8)
    study = cells.study(tmp_path, "wild", data=data, epochs=20, rates="[1e15]")
    study.write_text(study.read_text().replace("[2, 4]", "[4]"))
    for _ in range(2):  # shown again it is no better
        output = shell.hpo("run", "--study", study, code=1)
        assert "Nothing promoted: no trial was finished." in output and "1 of 1 diverged: diverged at epoch" in output
        assert "lower learning rate" in output and "hpo download" not in output
    assert "1 of 1 diverged: diverged at epoch" in shell.hpo("worker", "--study", "wild", code=1)
    assert "has registered no model: no trial was finished." in shell.hpo(
        "download", "--study", "wild", tmp_path / "model", code=1
    )
    output = shell.hpo("report", "-o", tmp_path / "report")
    assert "No trial was finished, so no model was selected." in output
    assert "1 of 1 trial has no score" in (tmp_path / "report/report.md").read_text()
    assert "volume fraction, cubic" in (tmp_path / "report/tables/models-test.csv").read_text()
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in shell.hpo("report", "-o", tmp_path / "file", code=1)
