"""A study that is planned is known by its name, wherever its file and its data are by now."""

import shutil

import cells
import pytest

from hpo import api, settings
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.tracking.client import Tracker


@pytest.mark.long
@pytest.mark.acceptance
def test_a_planned_study_needs_neither_its_file_nor_its_data_folder(shell, tmp_path):
    data = cells.make(tmp_path / "own", count=30, seed=91)
    file = cells.study(tmp_path, "portable", data=data, epochs=300, rates="[1e-3]")
    file.write_text(file.read_text().replace("[2, 4]", "[4]"))
    (loaded,) = api.load(str(file), epochs=2)
    shell.queue.install()
    chosen = settings.read(shell.environment)
    name = plans.plan(prepare(loaded), shell.queue, Tracker(shell.tracking_uri), chosen, shell.database_url).name
    assert name.startswith("portable+")
    shown = shell.hpo("show", name)
    assert f"hpo run --study {file} --set training.epochs=2" in " ".join(shown.split())
    assert "  training.epochs: 300 in the file, 2 here" in shown and "not closed yet" in shown

    file.unlink()
    shutil.rmtree(data)
    shutil.rmtree(shell.home / "cache")  # what is left is in the database and in MLflow
    assert f"Plan of {name}: 1 trial" in shell.hpo("run", "--study", name, "--dry-run")
    for _ in range(2):  # the second time it is shown
        output = shell.hpo("run", "--study", name)
        assert "Registered, but not promoted: config 0" in output, "after two epochs"
        assert f"download --study {name} model/" in output
        assert " predict " not in output, "no image is left for it"
    assert [job.state for job in shell.trials(name)] == ["done"]
    assert f"Study {name} is closed. `hpo show {name}` prints" in shell.hpo("worker", "--study", name)
    shown = shell.hpo("show", name)
    assert f"Its file {file} is gone" in shown and "Registered, but not promoted: config 0" in shown
    assert f"{shell.tracking_uri}/#/experiments/" in shown
    assert "learning_rate" in shell.hpo("show", f"{name}/0") and shell.json("show", f"{name}/0")["state"] == "done"
    stored = shell.json("show", name)
    assert stored["settings"]["training"]["epochs"] == 2 and stored["changed"] is None
    assert stored["result"]["winner"]["version"] == 1
    assert "each as recorded in the database" in shell.hpo("download", "--study", name, tmp_path / "model")
    assert api.predict(tmp_path / "model", []).attrs["unit"] == "GPa"

    assert "stays as it is: expected no override" in shell.hpo("run", "--study", name, "--seed", 5, code=1)
    assert f"planned here: {name}; or give the path" in shell.hpo("run", "--study", "portable", code=1)
    assert "--study and --alias" in shell.hpo("download", "--study", name, "--alias", "x", tmp_path / "two", code=1)
