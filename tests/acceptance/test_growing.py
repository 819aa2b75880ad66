"""Data that grow: what more images would bring, and models that go on from earlier ones."""

import itertools
import json

import cells
import pytest
from mlflow import MlflowClient

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
