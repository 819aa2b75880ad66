"""`hpo backup` while workers train, `hpo restore` elsewhere: the study goes on there to the same numbers."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cells
import psycopg
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, Shell, fresh_database

from hpo import backup, services, settings
from hpo.backup import Place
from hpo.errors import BackupError
from hpo.queue import Queue

# What a server does to an empty database when it starts.
SERVER_START = """
import sys, sqlalchemy, mlflow.store.db.utils as utils
utils._initialize_tables(sqlalchemy.create_engine(sys.argv[1].replace('postgresql:', 'postgresql+psycopg:')))
"""


@pytest.fixture
def half_done(shell: Shell, tmp_path: Path, services) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A study of two points, one of them done, and the worker that trains the other."""
    shell.environment |= {"MLFLOW_BACKEND_STORE_URI": services.database_url.rpartition("/")[0] + "/mlflow"}
    study = cells.study(tmp_path, "moved", data=cells.make(tmp_path / "own", seed=77), epochs=900)
    study.write_text(study.read_text().replace("[1e-3, 1e-4]", "[1e-2]"))
    run = shell.start("run", "--study", study, "--trainers", 1)
    shell.until(
        lambda: (
            any(job.state == "done" for job in shell.trials("moved"))
            and any(job.alive and job.checkpoint and job.epochs > 50 for job in shell.trials("moved"))
        ),
        "one trial is done, the other one has a checkpoint",
    )
    yield study, run


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Shell]:
    """An empty HPO_HOME with services of its own."""
    home = tmp_path / "elsewhere"
    read = settings.read({"HPO_HOME": str(home)})
    made = Shell(home, "postgresql://none", "http://none")
    for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        del made.environment[name]
    try:
        yield made
    finally:
        made.close()
        services.erase(read)


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_study_that_is_saved_while_a_worker_trains_goes_on_elsewhere_to_the_same_numbers(
    shell, half_done, elsewhere, tmp_path
):
    study, run = half_done
    saved = tmp_path / "saved.tar"
    said = shell.hpo("backup", saved)
    assert "moved (1 of 2 trials done)" in said and "Note:" not in said
    assert saved.stat().st_mode & 0o777 == 0o600 and run.poll() is None, "the worker trains on"
    assert "exists already" in shell.hpo("backup", saved, code=1)
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    undisturbed = shell.trials("moved")

    assert "Restored moved (1 of 2 trials done)" in elsewhere.hpo("restore", saved)
    assert "Healthy" in elsewhere.hpo("doctor")
    states = {trial["state"]: trial for trial in elsewhere.json("trials", "--study", "moved")}
    assert states.keys() == {"done", "waiting"} and states["waiting"]["epochs"] > 50
    assert states["waiting"]["attempt"] == 0, "nobody's fault"
    assert "found 1 studies, 2 trials of Optuna" in elsewhere.hpo("restore", saved, code=1)

    output = elsewhere.hpo("run", "--study", study, "--trainers", 1)
    assert " of moved goes on after epoch " in output, "from its checkpoint"
    again = elsewhere.json("trials", "--study", "moved")
    assert [trial["value"] for trial in again] == [job.result["best_val_nmse"] for job in undisturbed]
    assert [trial["run_id"] for trial in again] == [job.run_id for job in undisturbed], "in the same runs"
    assert "each as recorded in the database" in elsewhere.hpo("download", tmp_path / "champion")
    image = next((tmp_path / "own").glob("*.png"))
    assert json.loads(elsewhere.hpo("predict", tmp_path / "champion", image, "--json"))["predictions"]
    assert "Healthy" in elsewhere.hpo("doctor")
    uri = elsewhere.json("status")["services"]["tracking_uri"]
    for job in undisturbed:
        theirs = MlflowClient(uri).get_metric_history(job.run_id, "val/nmse")
        assert [(each.step, each.value) for each in theirs] == [
            (number, values["val/nmse"]) for number, values in shell.queue.curve(job.id)
        ]


@pytest.mark.service
def test_a_backup_fills_databases_given_by_url_whose_role_owns_them_and_no_more(services, database_url, tmp_path):
    source = Place(
        {"hpo": database_url, "mlflow": services.database_url.rpartition("/")[0] + "/mlflow"}, services.tracking_uri
    )
    queue = Queue(database_url)
    queue.install()
    queue.close()
    client = MlflowClient(services.tracking_uri)
    run_id = client.create_run(client.create_experiment(f"saved {database_url}")).info.run_id
    client.log_metric(run_id, "loss", float("nan"))
    client.log_text(run_id, "umlaut: ü", "deep/down/text.txt")
    backup.backup(source, tmp_path / "saved.tar", print)
    manifest = backup.check(tmp_path / "saved.tar")
    assert any(name.endswith(f"/{run_id}/artifacts/deep/down/text.txt") for name in manifest["files"])
    assert manifest["faults"] == []
    with fresh_database(services) as hpo, fresh_database(services) as mlflow:
        place = Place({"hpo": owned(hpo), "mlflow": owned(mlflow)}, services.tracking_uri)
        subprocess.run([sys.executable, "-c", SERVER_START, place.databases["mlflow"]], check=True, capture_output=True)
        backup.restore(place, tmp_path / "saved.tar", manifest, print)
        assert rows(place.databases["mlflow"]) == rows(source.databases["mlflow"])
        assert rows(place.databases["hpo"]) == rows(source.databases["hpo"])
        with psycopg.connect(mlflow, autocommit=True) as connection:
            for statement in ("REASSIGN OWNED BY plain TO CURRENT_USER", "DROP OWNED BY plain"):
                connection.execute(statement)
        with psycopg.connect(hpo, autocommit=True) as connection:
            for statement in ("REASSIGN OWNED BY plain TO CURRENT_USER", "DROP OWNED BY plain", "DROP ROLE plain"):
                connection.execute(statement)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "another file"])
def test_what_is_not_whole_is_refused(tmp_path, damage):
    saved = tmp_path / "saved.tar"
    with tarfile.open(saved, "w") as tar:
        archive = backup._Archive(tar)
        for number in range(3):
            (tmp_path / "file").write_bytes(bytes([number]) * 5000)
            archive.add(f"artifacts/{number}", tmp_path / "file")
        archive.finish({"format": backup.FORMAT, "studies": {}}, tmp_path)
    assert len(backup.check(saved)["files"]) == 3
    content = saved.read_bytes()
    if damage == "cut short":
        content = content[: content.index(b"manifest.json") - 100]
    elif damage == "one bit":
        place = content.index(b"\x02" * 5000) + 2500
        content = content[:place] + b"\x03" + content[place + 1 :]
    else:
        content = b"not a tar file" * 1000
    saved.write_bytes(content)
    with pytest.raises(BackupError, match=r"is not a whole backup .* Nothing was restored"):
        backup.check(saved)


def owned(url: str) -> str:
    """The database as its owner sees it, who may do nothing else on this server."""
    with psycopg.connect(url, autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'plain'").fetchone() is None:
            connection.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
        connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} OWNER TO plain")
    return "postgresql://plain:plain@" + url.rpartition("@")[2]


def rows(url: str) -> dict[str, tuple[int, str]]:
    """Of each table, how many rows it has and a hash of them."""
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT nspname || '.' || relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE relkind = 'r' AND nspname IN ('public', 'hpo')"
        ).fetchall()
        return {
            name: connection.execute(
                f"SELECT count(*), md5(coalesce(string_agg(t::text, '' ORDER BY t::text), '')) FROM {name} t"
            ).fetchone()
            for (name,) in tables
        }
