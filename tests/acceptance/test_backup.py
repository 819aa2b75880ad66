"""`hpo backup` while workers train, `hpo restore` elsewhere: the study goes on there to the same numbers."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import cells
import psycopg
import pytest
import records
from mlflow import MlflowClient
from shell import PATIENCE, Shell, fresh_database, tmpfs, trainers

from hpo import settings
from hpo.errors import BackupError
from hpo.operations import backup, restore
from hpo.operations.backup import MARK, Place
from hpo.queue import Job, NewJob, Queue
from hpo.services import foreign, serving
from hpo.services.serving import Services

RESTORE = """
import json, sys
from pathlib import Path
from hpo.operations import backup, restore
place, file = backup.Place(**json.loads(sys.argv[1])), Path(sys.argv[2])
restore.load(place, file, restore.check(file), print)
"""


# A whole study, from a server on loopback to one with access control


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> Iterator[Shell]:
    """An empty HPO_HOME whose services want passwords."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # `services.running` sets them: not beyond this test
    home = tmp_path / "elsewhere"
    made = Shell(home, "postgresql://none", "http://none")
    for name in ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        del made.environment[name]
    try:
        yield made
    finally:
        made.close()
        serving.erase(settings.read({"HPO_HOME": str(home)}))


@pytest.mark.long
@pytest.mark.acceptance
def test_a_study_saved_while_a_worker_trains_continues_elsewhere_with_equal_numbers(
    shell, elsewhere, services, tmp_path
):
    up = elsewhere.start("up", "--listen", "127.0.0.2")
    shell.environment |= {"MLFLOW_BACKEND_STORE_URI": mlflow_of(services)}
    study = cells.study(tmp_path, "moved", data=cells.make(tmp_path / "own", seed=77), epochs=300)
    study.write_text(study.read_text().replace("[1e-3, 1e-4]", "[1e-2]"))
    run = shell.start("run", "--study", study, "--trainers", 1)
    shell.until(
        lambda: (
            any(job.state == "done" for job in shell.trials("moved"))
            and any(job.alive and job.checkpoint and job.epochs > 20 for job in shell.trials("moved"))
        ),
        "one trial is done, the other one has a checkpoint",
    )
    saved = tmp_path / "saved.tar"
    (trainer,) = trainers(run)
    trainer.suspend()  # else its trial may be done before the backup begins
    said = shell.hpo("backup", saved)
    trainer.resume()
    assert "moved (1 of 2 trials done)" in said and "Note:" not in said
    assert saved.stat().st_mode & 0o777 == 0o600 and run.poll() is None, "the worker trains on"
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    undisturbed = shell.trials("moved")

    output, _ = up.communicate(timeout=PATIENCE)
    assert up.returncode == 0, output
    assert "Restored moved (1 of 2 trials done)" in elsewhere.hpo("restore", saved)
    found = serving.running(settings.read({"HPO_HOME": str(elsewhere.home)}))
    queue = Queue(found.database_url)
    states = {job.state: job for job in queue.jobs("moved") if job.kind == "trial"}
    assert states.keys() == {"done", "waiting"} and states["waiting"].epochs > 20
    assert states["waiting"].attempt == 0, "nobody's fault"
    output = elsewhere.hpo("run", "--study", study, "--trainers", 1)
    assert " of moved goes on after epoch " in output, "from its checkpoint"
    again = [job for job in queue.jobs("moved") if job.kind == "trial"]
    assert [job.result.best_val_nmse for job in again] == [job.result.best_val_nmse for job in undisturbed]
    assert [job.run_id for job in again] == [job.run_id for job in undisturbed], "in the same runs"
    assert "each as recorded in the database" in elsewhere.hpo("download", tmp_path / "champion")
    assert "Healthy" in elsewhere.hpo("doctor")
    for job in undisturbed:
        theirs = MlflowClient(found.tracking_uri).get_metric_history(job.run_id, "val/nmse")
        assert [(each.step, each.value) for each in theirs] == [
            (number, values["val/nmse"]) for number, values in queue.curve(job.id)
        ]
    queue.close()


# What is saved, and where it may be put


@pytest.fixture(scope="module")
def source(services) -> Iterator[Place]:
    """A planned study whose one trial runs from a checkpoint, with its run in MLflow."""
    with fresh_database(services) as url:
        client, queue = MlflowClient(services.tracking_uri), Queue(url)
        queue.install()
        queue.put_study(records.study_row("saved", "0" * 64))
        queue.put_jobs("saved", [NewJob(kind="trial", number=0, cost=1.0, spec=records.spec())])
        run_id = client.create_run(client.create_experiment(f"saved {url}")).info.run_id
        client.log_metric(run_id, "loss", float("nan"))
        client.log_text(run_id, "umlaut: ü", "deep/down/text.txt")
        client.log_text(run_id, "weights", "checkpoints/newest")
        queue.attend("host:1", "saved", trainers=1, device="cpu", stops=0, lease=60)
        job = queue.claim("saved", worker="host:1", lease=60)
        queue.set_run(job.id, run_id)
        sha256 = hashlib.sha256(b"weights").hexdigest()
        queue.checkpoint(job, records.checkpoint(1, path="checkpoints/newest", sha256=sha256, run_id=run_id))
        queue.close()
        yield Place({"hpo": url, "mlflow": mlflow_of(services)}, services.tracking_uri)


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("backups") / "saved.tar"
    assert backup.write(source, file, print)["faults"] == []
    return file


@pytest.fixture(scope="module")
def tables(services, tmp_path_factory) -> str:
    """What a server makes on an empty database, as SQL."""
    file = tmp_path_factory.mktemp("schema") / "mlflow.sql"
    backup.run("pg_dump", mlflow_of(services), "--schema-only", "--no-comments", f"--file={file}")
    with psycopg.connect(mlflow_of(services)) as connection:
        version = foreign.schema(connection)
    row = f"INSERT INTO public.alembic_version VALUES ('{version}');\n"
    return file.read_text() + row + "INSERT INTO public.experiments VALUES (0, 'Default');\n"


@pytest.fixture
def empty(services, tables) -> Iterator[Place]:
    """Databases given by URL, on one of which a server has just started."""

    def script(to: IO[bytes]) -> None:
        to.write(tables.encode())

    with fresh_database(services) as hpo, fresh_database(services) as mlflow:
        backup.run("psql", mlflow, "--no-psqlrc", script=script)
        yield Place({"hpo": hpo, "mlflow": mlflow}, services.tracking_uri)


@pytest.mark.service
def test_a_backup_fills_empty_databases_and_its_running_trials_wait_there_at_once(source, empty, saved, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(restore, "GIVE_ALL_BACK", "SELECT 1 / 0;")
        with pytest.raises(BackupError, match="division by zero"):
            fill(empty, saved)
    with psycopg.connect(empty.databases["hpo"]) as connection:
        assert connection.execute("SELECT to_regclass('hpo.job')").fetchone() == (None,), "no trial that runs"
    fill(empty, saved)
    assert any(name.endswith("/artifacts/deep/down/text.txt") for name in restore.check(saved)["files"])
    assert rows(empty.databases["mlflow"]) == rows(source.databases["mlflow"])
    there, here = rows(empty.databases["hpo"]), rows(source.databases["hpo"])
    assert {name for name in here if here[name] != there.get(name)} == {"hpo.attempt", "hpo.job", "hpo.worker"}
    (job,) = jobs(empty)
    assert (job.state, job.attempt, job.reason) == ("waiting", 0, "its worker stayed with the original")
    assert not job.mirrored and job.fence > 1_000_000, "no worker of the original can write here"
    assert there["hpo.worker"][0] == 0
    with pytest.raises(
        BackupError, match=r"found rows in hpo.attempt \(1\), hpo.job \(1\), hpo.study \(1\) of the queue's"
    ):
        fill(empty, saved)
    with pytest.raises(BackupError, match="exists already"):
        backup.write(source, saved, print)


@pytest.mark.service
def test_a_restore_that_was_killed_goes_on_but_not_over_what_came_since(source, empty, saved):
    with restoring(empty, saved, until="mlflow") as process:
        process.kill()  # and not psql, which goes on to the end of what it was given
    with psycopg.connect(empty.databases["mlflow"], autocommit=True) as mlflow:
        mlflow.execute("INSERT INTO public.experiments (experiment_id, name) VALUES (1, 'came since')")
        with pytest.raises(BackupError, match=r"public.experiments \(1\) of MLflow's .* interrupted here"):
            fill(empty, saved)
        assert mlflow.execute("SELECT name FROM public.experiments WHERE experiment_id = 1").fetchone() == (
            "came since",
        )
        mlflow.execute("DELETE FROM public.experiments WHERE experiment_id = 1")
    with restoring(empty, saved, until="hpo") as process:
        os.killpg(process.pid, signal.SIGKILL)  # the power fails
    assert rows(empty.databases["mlflow"]).items() >= rows(source.databases["mlflow"]).items()
    queue = Queue(empty.databases["hpo"])
    queue.install()
    queue.put_study(records.study_row("mine", "1" * 64))
    with psycopg.connect(empty.databases["mlflow"]) as mlflow:
        mlflow.execute("INSERT INTO public.experiments (experiment_id, name) VALUES (1000000, 'came since')")
    with pytest.raises(BackupError, match=r"hpo.study \(1\) of the queue's. A restore of it was interrupted .* used"):
        fill(empty, saved)
    assert names(empty)[0] == ["mine"]
    queue.delete_study("mine")
    queue.close()
    fill(empty, saved)  # MLflow's part is there: it is not loaded again
    assert names(empty)[0] == ["saved"] and "came since" in names(empty)[1]
    assert [job.state for job in jobs(empty)] == ["waiting"]


@pytest.mark.service
def test_two_restores_do_not_meet_and_what_is_planned_meanwhile_stays(empty, saved):
    with restoring(empty, saved, until="hpo") as process:
        with pytest.raises(BackupError, match="Another backup, restore or `hpo delete` is under way"):
            fill(empty, saved)
        with psycopg.connect(empty.databases["hpo"]) as connection:  # Queue.install would wait
            connection.execute("CREATE SCHEMA hpo; CREATE TABLE hpo.study AS SELECT 'mine' AS name")
    assert process.returncode == 1
    assert names(empty)[0] == ["mine"]


@pytest.mark.service
def test_a_backup_of_another_schema_is_refused_before_anything_is_done(empty, saved):
    for program, schema in (("queue", 99), ("optuna", "newer"), ("mlflow", "newer")):
        manifest = restore.check(saved) | {f"{program}_schema": schema}
        with pytest.raises(BackupError, match=rf"schema {schema}\).* Nothing was restored. Restore it with"):
            restore.load(empty, saved, manifest, print)
    with psycopg.connect(empty.databases["hpo"]) as connection:
        assert connection.execute("SELECT to_regclass(%s), to_regclass('hpo.job')", (MARK,)).fetchone() == (None, None)


@pytest.mark.service
def test_a_checkpoint_that_is_not_what_was_recorded_is_said(source, saved, tmp_path, tmp_path_factory):
    (job,) = jobs(source)
    artifacts = f"services0/home/artifacts/*/{job.run_id}/artifacts/checkpoints/newest"
    (file,) = tmp_path_factory.getbasetemp().glob(artifacts)
    path = file.relative_to(file.parents[4])
    file.write_bytes(b"weightz")
    for what in ("damaged", "missing"):
        manifest = backup.write(source, tmp_path / what, print)
        assert manifest["faults"] == [f"the checkpoint {path} is {what}: its trial will start again from its beginning"]
        file.unlink(missing_ok=True)
    file.write_bytes(b"weights")


@pytest.mark.service
def test_a_backup_waits_for_whoever_removes_files_and_replaces_nothing(source, tmp_path):
    target, queue, said = tmp_path / "saved.tar", Queue(source.databases["hpo"]), []
    killed = tmp_path / ".saved.tar.1.partial"
    theirs = [tmp_path / "saved.tar.partial", tmp_path / ".saved.tar.2.partial"]  # without its mark
    for each in (killed, *theirs):
        each.mkdir()
        (each / "whole").write_text("half")
    (killed / backup.ALIVE).touch()

    def save() -> None:
        try:
            backup.write(source, target, said.append)
        except BackupError as error:
            said.append(str(error))

    thread = threading.Thread(target=save)
    with queue.lock("backup"):
        thread.start()
        while thread.is_alive() and not said:
            time.sleep(0.05)
        assert said == [backup.WAITS]
        target.write_text("another backup")
    thread.join()
    queue.close()
    assert "exists already" in said[-1] and target.read_text() == "another backup"
    assert {*tmp_path.iterdir()} == {target, *theirs}
    assert all((each / "whole").exists() for each in theirs)


def test_a_backup_replaces_nothing_that_another_one_wrote_to_the_same_name(tmp_path):
    target = tmp_path / "saved.tar"
    with backup._scratch(target) as one, backup._scratch(target) as other:
        assert one.is_dir() and other.is_dir() and one.stat().st_mode & 0o777 == 0o700
        (one / "whole").write_text("one")
        (other / "whole").write_text("other")
        backup._put(one / "whole", target)
        with pytest.raises(BackupError, match="exists already"):
            backup._put(other / "whole", target)
    assert target.read_text() == "one" and list(tmp_path.iterdir()) == [target]
    target.unlink()
    target.symlink_to("nowhere")
    with pytest.raises(BackupError, match="exists already"):
        backup.write(backup.Place({}, ""), target, print)
    assert target.is_symlink()


@pytest.mark.root
@pytest.mark.slow
def test_a_full_disk_leaves_nothing_of_a_backup(source, tmp_path):
    with tmpfs(tmp_path / "small", "16k") as folder:
        with pytest.raises(BackupError, match="cannot be written: the disk is full"):
            backup.write(source, folder / "saved.tar", print)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut short", "one bit", "another file"])
def test_what_is_not_whole_is_refused(tmp_path, damage):
    saved = tmp_path / "saved.tar"
    with tarfile.open(saved, "w") as tar:
        archive = backup._Archive(tar)
        for number in range(3):
            (tmp_path / "file").write_bytes(bytes([number]) * 5000)
            archive.add(f"artifacts/{number}", tmp_path / "file")
        archive.finish({"format": backup.FORMAT, "studies": {}}, tmp_path)
    assert len(restore.check(saved)["files"]) == 3
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
        restore.check(saved)


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


def fill(into: Place, saved: Path) -> None:
    restore.load(into, saved, restore.check(saved), print)


@contextmanager
def restoring(into: Place, saved: Path, *, until: str) -> Iterator[subprocess.Popen]:
    """A restore that goes no further than to the load of a database, and goes on afterwards unless it was killed."""
    with psycopg.connect(into.databases[until], autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(hashtext('hpo.schema'))")
        arguments = json.dumps({"databases": into.databases, "tracking_uri": into.tracking_uri})
        process = subprocess.Popen(
            [sys.executable, "-c", RESTORE, arguments, str(saved)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = "
            waiting += "(SELECT oid FROM pg_database WHERE datname = current_database())"
            end = time.monotonic() + PATIENCE
            while holder.execute(waiting).fetchone() is None:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < end
                time.sleep(0.05)
            yield process
            holder.execute("SELECT pg_advisory_unlock_all()")
            process.wait(timeout=PATIENCE)
        finally:
            process.kill()
            process.communicate()


def names(into: Place) -> tuple[list[str], list[str]]:
    """Of studies and of experiments."""
    with psycopg.connect(into.databases["hpo"]) as hpo, psycopg.connect(into.databases["mlflow"]) as mlflow:
        studies = hpo.execute("SELECT name FROM hpo.study ORDER BY name").fetchall()
        experiments = mlflow.execute("SELECT name FROM public.experiments ORDER BY name").fetchall()
    return [name for (name,) in studies], [name for (name,) in experiments]


def jobs(of: Place) -> list[Job]:
    queue = Queue(of.databases["hpo"])
    found = queue.jobs("saved")
    queue.close()
    return found


def mlflow_of(services: Services) -> str:
    """URL of the database of the session's server."""
    return services.database_url.rpartition("/")[0] + "/mlflow"
