"""Data that grow: what more images would bring, and models that go on from earlier ones."""

import itertools
import json
import shutil

import cells
import psutil
import pytest
from mlflow import MlflowClient
from shell import check_recorded_once, trainers

from hpo import study
from hpo.closing import promotion
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.settings import read as read_settings
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_the_data_decide_which_models_compete_not_the_folders_name_or_version(shell, tmp_path):
    first = cells.make(tmp_path / "first", seed=8)
    second = cells.make(tmp_path / "second", count=80, seed=8, extends="../first")
    copy = shutil.copytree(first, tmp_path / "copy")
    (copy / "dataset.toml").write_text('name = "other"\nunit = "GPa"\n')
    shell.hpo("run", "--study", cells.study(tmp_path, "before-it-grew", data=first, epochs=20, rates="[1e-2]"))
    output = shell.hpo("run", "--study", cells.study(tmp_path, "grown", data=second, epochs=100, rates="[1e-2]"))
    shutil.rmtree(first)
    rows = {name: shell.queue.study(name) for name in ("before-it-grew", "grown")}
    best = {name: min(shell.trials(name), key=lambda job: job.result.best_val_nmse) for name in rows}
    key = rows["before-it-grew"].facts.data.key
    old, new = best["before-it-grew"].result.best_val_nmse, best["grown"].result.common[key]
    assert new < old and new != best["grown"].result.best_val_nmse
    client, name = MlflowClient(shell.tracking_uri), rows["grown"].facts.model_name
    for alias, winner in (("champion", "grown"), ("grown", "grown"), ("before-it-grew", "before-it-grew")):
        assert client.get_model_version_by_alias(name, alias).run_id == best[winner].run_id
    digests = [row.facts.data.digest for row in rows.values()]
    model = client.get_registered_model(name)
    assert model.tags["hpo.data"] == digests[0] and model.tags["hpo.lineage"] == ", ".join(
        f"tiny {digest[:8]}" for digest in digests
    )
    tags = client.get_model_version_by_alias(name, "champion").tags
    assert tags["hpo.data"] == f"tiny ({digests[1][:8]})" and float(tags[f"hpo.val_nmse_of.{key[:8]}"]) == new
    older, newer = next(job for job in shell.queue.jobs("grown") if job.kind == "closing").closing.tested
    assert older.run_id == best["before-it-grew"].run_id and newer.run_id == best["grown"].run_id
    assert older.tests.keys() == newer.tests.keys() == {"old test images", "new test images"}
    assert "Test images, old and new" in output
    compared = shell.json("compare", "before-it-grew", "grown")["things"]
    for thing, tested in zip(compared, (older, newer), strict=True):
        assert thing["test_nmse/new test images"] == tested.tests["new test images"].nmse
    said = f"On the validation images of tiny ({digests[0][:8]}), which both data sets have, @champion has the NMSE"
    assert said in output

    said = shell.hpo("run", "--study", cells.study(tmp_path, "hasty", data=copy, epochs=20, rates="[1e-2]"))
    assert f"@champion stays version 2, of the study grown: it was trained on tiny ({digests[1][:8]})" in said
    assert "download --study hasty model/" in said and "--alias champion" not in said, "that is another study's"
    assert name == shell.queue.study("hasty").facts.model_name == rows["before-it-grew"].facts.model_name
    client.delete_registered_model(name)  # on MLflow's page, say
    assert "No version stands for election" in shell.hpo("promote", "--study", "grown")
    assert "Healthy" in shell.hpo("doctor")
    shell.hpo("delete", "--study", "hasty", "--yes")
    assert [row.name for row in shell.queue.studies()] == [*rows]


def champions(client, name) -> str | None:
    """The run of a registered model's champion."""
    aliases = client.get_registered_model(name).aliases
    return client.get_model_version(name, aliases["champion"]).run_id if "champion" in aliases else None


@pytest.mark.long
def test_a_registry_with_two_models_of_a_growing_data_set_goes_on(shell, tmp_path, monkeypatch):
    first = cells.make(tmp_path / "first", count=40, seed=9)
    second = cells.make(tmp_path / "second", count=60, seed=9, extends="../first")
    shell.hpo("run", "--study", cells.study(tmp_path, "two-old", data=first, epochs=60, rates="[1e-2]"))
    file = cells.study(tmp_path, "two-new", data=second, epochs=10, rates="[1e-2]")
    # As an earlier hpo planned and trained it: without a word of the data set that its own one extends.
    facts = prepare(study.load(str(file)))
    with monkeypatch.context() as patch:
        patch.setattr("hpo.planning.preparation._versions", lambda data: ())
        settings = read_settings({"HPO_HOME": str(tmp_path / "home")})
        plans.plan(facts, shell.queue, Tracker(shell.tracking_uri), settings, shell.database_url)
    shell.hpo("worker", "--study", "two-new", "--trainers", 1)
    for name in ("two-old", "two-new"):  # whatever so few images say
        shell.hpo("promote", "--study", name, "--force")
    with shell.queue.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE hpo.job SET result = result::jsonb - 'common' WHERE study = 'two-new'")
    models = {name: shell.queue.study(name).facts.model_name for name in ("two-old", "two-new")}
    client = MlflowClient(shell.tracking_uri)
    best = {name: min(shell.trials(name), key=lambda job: job.result.best_val_nmse) for name in models}
    assert len(set(models.values())) == 2 and "Healthy" in shell.hpo("doctor")
    assert {name: champions(client, model) for name, model in models.items()} == {
        name: job.run_id for name, job in best.items()
    }, "each has a champion, as before"

    # The next study on the new data joins both; the old champion's files are damaged by then.
    winner = best["two-old"].result
    changed = promotion.fetch(Tracker(shell.tracking_uri), best["two-old"], tmp_path / "model") / "weights.safetensors"
    *all_but_one, last = changed.read_bytes()
    changed.write_bytes(bytes([*all_but_one, last ^ 1]))
    client.log_model_artifact(winner.model_id, str(changed))
    output = shell.hpo("run", "--study", cells.study(tmp_path, "two-joined", data=second, epochs=2, rates="[1e-4]"))
    assert "could not be scored on the test images of this data set: weights.safetensors is not the file" in output
    assert shell.queue.study("two-joined").facts.model_name == models["two-old"]
    assert [champions(client, model) for model in models.values()] == [best["two-old"].run_id, None]
    assert len(client.search_model_versions(f"name = '{models['two-new']}'")) == 1, "its version stays where it is"
    (finding,) = shell.hpo("doctor", code=1).splitlines()[:1]
    assert "weights.safetensors is not the file" in finding
