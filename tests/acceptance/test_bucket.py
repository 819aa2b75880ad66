"""Artifacts in a bucket, behind the MLflow server and without it: a trial waits for the store, and says why."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cells
import pytest
from bucket import NAME, SECRET, Bucket, bucket
from mlflow import MlflowClient
from shell import PATIENCE, Shell, check_recorded_once, create_database

from hpo import settings
from hpo.services import daemon, mlflow_server, serving
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.acceptance


@dataclass(frozen=True)
class Stored:
    """Services whose artifacts lie in a bucket."""

    bucket: Bucket
    folder: str  # in the bucket
    home: Path
    database_url: str
    tracking_uri: str
    variables: dict[str, str]  # of those who speak to the bucket themselves

    @contextmanager
    def shell(self) -> Iterator[Shell]:
        shell = Shell(self.home, self.database_url, self.tracking_uri)
        shell.environment |= self.variables
        try:
            yield shell
        finally:
            self.bucket.between.set(None)
            self.bucket.between.pace = 0.0
            shell.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with bucket(tmp_path_factory.mktemp("bucket")) as made:
        yield made


@pytest.fixture(scope="module")
def proxied(store: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """The embedded services, whose MLflow server alone knows the bucket."""
    home = tmp_path_factory.mktemp("proxied") / "home"
    chosen = settings.read({"HPO_HOME": str(home), "HPO_ARTIFACTS": f"s3://{NAME}/behind"})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        services, _ = serving.up(chosen, report=lambda line: None)
    try:
        yield Stored(store, "behind", home, services.database_url, services.tracking_uri, {})
    finally:
        serving.erase(chosen)


@pytest.fixture(scope="module")
def direct(store: Bucket, services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """An MLflow server that sends its clients to the bucket."""
    folder = tmp_path_factory.mktemp("direct")
    port = daemon.choose_port(None)
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    words += ["--default-artifact-root", f"s3://{NAME}/direct", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    environment = os.environ | mlflow_server.ENVIRONMENT
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-P", "-m", "hpo.services.run_mlflow", *words]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    uri = f"http://127.0.0.1:{port}"
    try:
        _until_up(server, uri, folder / "log")
        database = create_database(services.database_url, f"direct_{port}")
        yield Stored(store, "direct", folder / "home", database, uri, store.environment)
    finally:
        server.terminate()
        server.wait()


def _until_up(server: subprocess.Popen, uri: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            Tracker(uri).version()
            return
        except Exception:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(params=["proxied", "direct"])
def stored(request: pytest.FixtureRequest) -> Stored:
    return request.getfixturevalue(request.param)


def wait_for_the_store(stored: Stored, study: Path, *, mode: str, seconds: float, epochs: int) -> str:
    """Let the bucket refuse when a trial of two is in mid-training; check all that is promised, and return what the
    worker has printed."""
    with stored.shell() as shell:
        process = shell.start("run", "--study", study, "--trainers", 1)
        job = shell.training(study.stem, epochs=20)
        only = "Credential=FIRST" if mode == "ExpiredToken" else ""
        stored.bucket.between.set(mode, only=only)
        refused = stored.bucket.between.answered[mode]
        shell.until(lambda: shell.queue.job(job.id).epochs == epochs, "training goes on to the last epoch")
        shell.until(lambda: stored.bucket.between.answered[mode] > refused, "the store has refused")
        time.sleep(seconds)
        assert sum(trial.attempt for trial in shell.trials(study.stem)) == 1, "no other trial is claimed"
        assert not any(trial.state == "done" for trial in shell.trials(study.stem))
        if mode == "ExpiredToken":
            stored.bucket.write_keys("SECOND")
        else:
            stored.bucket.between.set(None)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "Traceback" not in output, output
        check_recorded_once(shell, study.stem, points=2, epochs=epochs)
        assert {trial.attempt for trial in shell.trials(study.stem)} == {1}
    return output


@pytest.mark.slow
def test_a_study_waits_for_its_bucket_leaves_no_key_and_its_deletion_no_file(proxied, data, tmp_path):
    study = cells.study(tmp_path, "in-a-bucket", data=data, epochs=250, rates="[1e-3]")
    output = wait_for_the_store(proxied, study, mode="SlowDown", seconds=3, epochs=250)
    assert "artifact store: SlowDown (Please reduce your request rate.)" in output
    assert "no trial is claimed until it takes files again" in output and "all services answer again" in output
    with proxied.shell() as shell:
        other = cells.study(tmp_path, "beside-it", data=data, epochs=2, rates="[1e-3]")
        shell.hpo("run", "--study", other)
        client, names = MlflowClient(proxied.tracking_uri), ("in-a-bucket", "beside-it")
        folders = {name: f"behind/{client.get_experiment_by_name(name).experiment_id}/" for name in names}
        kept = proxied.bucket.files(folders["beside-it"])
        assert any(name.endswith("weights.safetensors") for name in proxied.bucket.files(folders["in-a-bucket"]))
        shell.hpo("delete", "--study", "in-a-bucket", "--yes")
        assert proxied.bucket.files(folders["in-a-bucket"]) == []
        assert proxied.bucket.files(folders["beside-it"]) == kept != []
    assert list((proxied.home / "artifacts").iterdir()) == []
    holders = [file for file in proxied.home.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert holders == [] and SECRET not in output


@pytest.mark.long
@pytest.mark.parametrize(("mode", "seconds"), [("SlowDown", 30), ("QuotaExceeded", 3), ("ExpiredToken", 3)])
def test_a_trial_waits_for_a_bucket_that_refuses_and_says_why(stored, data, tmp_path, mode, seconds):
    study = cells.study(tmp_path, f"{stored.folder}-{mode.lower()}", data=data, epochs=1000, rates="[1e-3]")
    stored.bucket.write_keys("FIRST")
    output = wait_for_the_store(stored, study, mode=mode, seconds=seconds, epochs=1000)
    assert f"artifact store: {mode} (" in output, output
    with stored.shell() as shell:
        shell.hpo("delete", "--study", study.stem, "--yes")
    assert SECRET not in output
    assert [name for name in stored.bucket.files(stored.folder) if "weights" in name] == []


@pytest.mark.long
def test_a_model_of_100_mb_goes_in_parts_to_a_slow_bucket_and_comes_back(stored, tmp_path, monkeypatch):
    for name, value in stored.variables.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(os.urandom(100_000_000))
    expected = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    tracker = Tracker(stored.tracking_uri)
    experiment = tracker.client.create_experiment(f"large-{stored.folder}")
    run = tracker.client.create_run(experiment).info.run_id
    parts, begin = stored.bucket.between.parts, time.monotonic()
    stored.bucket.between.pace = 1.0  # of each of ten parts at once: a server answers later than clients else wait for
    try:
        tracker.upload(run, folder / "weights.safetensors", "model")
        assert stored.bucket.between.parts - parts >= 12 and time.monotonic() - begin > 12
        back = tracker.download_artifact(run, "model/weights.safetensors", tmp_path / "back")
    finally:
        stored.bucket.between.pace = 0.0
    assert hashlib.sha256(back.read_bytes()).hexdigest() == expected


@pytest.mark.long
def test_a_worker_without_keys_for_the_bucket_says_so_and_takes_no_trial(direct, data, tmp_path):
    study = cells.study(tmp_path, "keyless", data=data, epochs=2, rates="[1e-3]")
    with direct.shell() as shell:
        shell.environment["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "none")
        output = shell.hpo("run", "--study", study, code=1)
    assert "Unable to locate credentials" in output and "AWS_ACCESS_KEY_ID" in output


def test_a_home_that_has_studies_does_not_change_its_bucket(proxied):
    moved = settings.read({"HPO_HOME": str(proxied.home), "HPO_ARTIFACTS": "s3://other/folder"})
    with pytest.raises(Exception, match=rf"HPO_ARTIFACTS: expected s3://{NAME}/behind, found s3://other/folder"):
        serving.up(moved, report=lambda line: None)
    assert serving.up(settings.read({"HPO_HOME": str(proxied.home)}), report=lambda line: None)[1] is False
