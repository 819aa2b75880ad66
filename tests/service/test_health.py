"""The health check of a worker's container."""

import socket
import subprocess
import sys

import pytest
import records

from hpo.operations import health
from hpo.queue import Queue

pytestmark = pytest.mark.service


def test_a_worker_is_well_if_its_own_process_was_seen_within_its_lease(database_url, monkeypatch):
    monkeypatch.setenv("HPO_DATABASE_URL", database_url)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert health.worker() == "No worker is here."
    queue = Queue(database_url)
    queue.install()
    queue.put_study(records.study_row("s"))

    def seen(process: subprocess.Popen, *, lease: float, host: str = socket.gethostname()) -> None:
        queue.attend(f"{host}:{process.pid}-{lease:g}", "s", trainers=1, device="cpu", stops=0, lease=lease)

    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen([*sleep, "run"]) as run, subprocess.Popen([*sleep, "worker"]) as worker:
        try:
            seen(run, lease=60)
            seen(worker, lease=60, host="elsewhere")
            assert health.worker() == "No worker is here."
            seen(worker, lease=-1)
            assert health.worker() == "The worker was not seen within its lease."
            seen(worker, lease=60)
            assert health.worker() is None
        finally:
            run.kill()
            worker.kill()
    assert health.worker() == "No worker is here."
    queue.close()
