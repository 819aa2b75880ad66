"""Data that grow: what more images would bring, and models that go on from earlier ones."""

import itertools
import json

import cells
import psutil
import pytest
from mlflow import MlflowClient
from shell import check_recorded_once, trainers

pytestmark = pytest.mark.acceptance


def test_a_learning_curve_says_what_twice_the_images_would_bring(shell, tmp_path):
    data = cells.make(tmp_path / "cells", seed=5)
    cells.study(tmp_path, "before-the-curve", data=data, epochs=2)
    overrides = (
        f"best_of={tmp_path / 'before-the-curve.toml'}",
        "space.share=[0.25, 0.5, 1.0]",
        "learning-curve:repeats=2",
    )
    words = tuple(itertools.chain.from_iterable(("--set", each) for each in overrides))
    output = shell.hpo("run", "--study", "learning-curve", *words, "--with-prerequisites", "--trainers", 1)
    (curve,) = [row.name for row in shell.queue.studies() if row.name.startswith("learning-curve+")]
    trials = shell.trials(curve)
    parts = {(job.spec.point["share"], job.spec.seed): job.result.images or 42 for job in trials}
    assert parts == {(share, seed): round(42 * share) for share in (0.25, 0.5, 1.0) for seed in (1, 2)}
    assert len({json.dumps(job.spec.point | {"share": 0}) for job in trials}) == 1, "one recipe"
    assert len({job.epochs for job in trials}) == 1

    said = shell.hpo("show", curve)
    for text in (output, said):
        assert "errors by the number of training images" in text and "84 images, forecast" in text
    shown = shell.json("show", curve)["learning_curve"]
    assert [errors["name"] for errors in shown["errors"]][:2] == ["all", "C11"] and len(shown["errors"]) == 10
    client = MlflowClient(shell.tracking_uri)
    run_id = shell.queue.study(curve).facts.study_run_id
    files = {file.path for file in client.list_artifacts(run_id, "tables")}
    assert {f"tables/learning-curve.{kind}" for kind in ("csv", "json", "svg", "txt")} <= files
    run = client.get_run(run_id).data
    assert run.metrics["learning_curve_slope"] == pytest.approx(shown["errors"][0]["law"]["exponent"])
    shell.hpo("report", "--study", curve, "-o", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Errors and the number of training images" in page and "84 images, forecast" in page
    assert (tmp_path / "report" / "figures" / f"{curve}-learning-curve.svg").exists()


WARM = """
[data]
path = "{data}"
[model]
family = "cnn"
filters = {filters}
kernel_size = 3
dropout = 0.2
[training]
epochs = 400
batch_size = 16
start_from = "{model}"
"""


@pytest.mark.slow
def test_a_training_from_the_champion_is_killed_and_goes_on_to_the_same_bits(shell, tmp_path):
    data = cells.make(tmp_path / "cells", seed=6)
    shell.hpo("run", "--study", cells.study(tmp_path, "to-start-from", data=data, epochs=150, rates="[1e-2]"))
    best = min(shell.trials("to-start-from"), key=lambda job: job.result.best_val_nmse)
    files, filters = best.result.files, best.spec.point["filters"]
    for name, model, other in (
        ("warm-calm", "@champion", 0),
        ("warm-killed", "to-start-from", 0),
        ("warm-wide", "@champion", 1),
    ):
        text = WARM.format(data=data, filters=filters + other, model=model)
        (tmp_path / f"{name}.toml").write_text(text)
    said = shell.hpo("run", "--study", tmp_path / "warm-wide.toml", code=1)
    assert "of its tensors do not fit the network of warm-wide" in said and f"filters = {filters}" in said

    words = ("run", "--study", tmp_path / "warm-calm.toml", "--trainers", 1)
    shell.hpo(*words)
    (calm,) = shell.trials("warm-calm")
    assert calm.spec.start.sha256 == files["weights.safetensors"], "that of the champion as it was"
    shell.hpo(*words)
    assert len(shell.queue.studies()) == 2, "the same study, though the champion may have moved"
    client = MlflowClient(shell.tracking_uri)
    run = client.get_run(calm.run_id).data
    assert run.params["start.sha256"] == files["weights.safetensors"] and run.params["start.name"] == "@champion"
    assert "to-start-from" in run.tags["hpo.start_from"]

    process = shell.start("run", "--study", tmp_path / "warm-killed.toml", "--trainers", 1)
    shell.until(
        lambda: any(job.alive and job.checkpoint and job.epochs >= 100 for job in shell.trials("warm-killed")),
        "a checkpoint",
    )
    left = trainers(process)
    process.kill()
    psutil.wait_procs(left, timeout=30)
    output = shell.hpo("run", "--study", "warm-killed", "--trainers", 1)
    assert " of warm-killed goes on after epoch " in output
    check_recorded_once(shell, "warm-killed", points=1, epochs=400)
    (killed,) = shell.trials("warm-killed")
    for name in ("weights.safetensors", "validation.csv"):
        assert killed.result.files.get(name) == calm.result.files.get(name), name
    curves = [shell.queue.curve(job.id) for job in (calm, killed)]
    assert [values["val/nmse"] for _, values in curves[0]] == [values["val/nmse"] for _, values in curves[1]]
