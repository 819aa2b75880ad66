"""A network that is better than the mean of the labels by chance alone is no champion, and everywhere it is said so."""

from pathlib import Path

import cells
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from shell import Shell

from data_pipeline.split import split

pytestmark = pytest.mark.acceptance
MEAN = "not distinguishable from the mean"


def champions(shell: Shell, study: str) -> dict[str, str]:
    """The aliases of the study's registered model, each with its version; none if nothing is registered."""
    name = shell.queue.study(study).facts.model_name
    models = MlflowClient(shell.tracking_uri).search_registered_models(f"name = '{name}'")
    return dict(models[0].aliases) if models else {}


def change_labels(data: Path, change) -> None:
    """Replace the labels (n, 9) of the data set by what `change` makes of them."""
    table = next(data.glob("*.csv"))
    rows = np.loadtxt(table, delimiter=",")
    rows[:, 1:] = change(rows[:, 1:])
    table.write_text("\n".join(",".join([str(int(row[0])), *map(repr, row[1:].tolist())]) for row in rows) + "\n")


def accept(data: Path, *findings: str) -> None:
    description = data / "dataset.toml"
    description.write_text(f"accept = {list(findings)}\n{description.read_text()}")


@pytest.mark.long
def test_images_without_structure_make_no_champion_unless_it_is_forced(shell, tmp_path):
    data = cells.make(tmp_path / "black", seed=45)
    for image in data.glob("*.png"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(image)
    accept(data, "images-all-equal", "equal-images-other-labels", "outside-bounds", "hill")
    study = cells.study(tmp_path, "all-black", data=data, epochs=6)
    said = " ".join(shell.hpo("run", "--study", study).split())
    assert "ALARM:" in said and "Registered, but not promoted: config" in said
    assert f"it is {MEAN} of the training labels" in said and "No version is @champion." in said
    assert "download --study all-black model/" in said and "--alias champion" not in said
    assert champions(shell, "all-black") == {"all-black": "1"}, "the alias of the study names its best version"
    client, row = MlflowClient(shell.tracking_uri), shell.queue.study("all-black")
    version = client.get_model_version(row.facts.model_name, "1")
    assert version.tags["hpo.verdict"] == MEAN and f"it is {MEAN}" in version.description
    assert "Gain over the mean of the training labels: validation NMSE" in version.description
    assert client.get_run(row.facts.study_run_id).data.tags["hpo.verdict"] == MEAN
    assert "Healthy" in shell.hpo("doctor")
    report = tmp_path / "report"
    shell.hpo("report", "--study", "all-black", "-o", report)
    assert f"({MEAN})" in (report / "report.md").read_text() and (report / "tables" / "gains.csv").exists()
    assert "predicts as well" in shell.hpo("download", "--study", "all-black", tmp_path / "model")

    client.set_registered_model_alias(row.facts.model_name, "champion", "1")  # by hand, on MLflow's page
    assert f"@champion is {row.facts.model_name} version 1, which is {MEAN}" in shell.hpo("doctor", code=1)
    assert "Healthy" in shell.hpo("doctor", "--fix") and "champion" not in champions(shell, "all-black")

    assert "@champion is this version" in shell.hpo("promote", "--study", "all-black", "--force")
    assert champions(shell, "all-black") == {"all-black": "1", "champion": "1"}
    assert client.get_model_version(row.facts.model_name, "1").tags["hpo.forced"] == "true"
    assert "Healthy" in shell.hpo("doctor")
    assert "Promoted: config" in shell.hpo("promote", "--study", "all-black")


@pytest.mark.long
def test_labels_of_other_rows_and_an_outlier_in_validation_make_no_champion(shell, tmp_path):
    shifted = cells.make(tmp_path / "shifted", seed=42)
    change_labels(shifted, lambda labels: np.roll(labels, 1, axis=0))
    accept(shifted, "outside-bounds", "hill")
    said = shell.hpo("run", "--study", cells.study(tmp_path, "shifted", data=shifted, epochs=20))
    assert "Registered, but not promoted" in said or "Nothing promoted" in said
    assert "champion" not in champions(shell, "shifted")

    far = cells.make(tmp_path / "far", seed=43)
    place = int(split(60).validation[2])

    def outlier(labels):
        labels[place, 0] = 1e6
        return labels

    change_labels(far, outlier)
    accept(far, "outside-bounds", "hill", "component-order")
    said = shell.hpo("run", "--study", cells.study(tmp_path, "far-off", data=far, epochs=20))
    assert "Registered, but not promoted" in said or "Nothing promoted" in said
    assert "champion" not in champions(shell, "far-off")
