"""What a chaos run does to processes and to the way between them: functions of the run, which choose by its generator.

One that finds nothing to harm returns False.
"""

import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
from proxy import HANG
from shell import resume, suspend

if TYPE_CHECKING:
    from chaos import Chaos

CLIENT_PATIENCE = 10.0  # seconds that MLflow's client waits for an answer


def _worker(chaos: "Chaos") -> psutil.Process:
    workers = chaos.workers()
    if not workers:
        raise psutil.NoSuchProcess(0)
    return psutil.Process(chaos.random.choice(workers).pid)


def kill_trainer(chaos: "Chaos") -> None:
    for trainer in [child for child in _worker(chaos).children() if "hpo.worker.trainer" in " ".join(child.cmdline())]:
        trainer.kill()


def kill_worker(chaos: "Chaos") -> None:
    _worker(chaos).kill()


def kill_worker_before_it_records_what_it_has_trained(chaos: "Chaos") -> bool:
    """Uploads hang until a worker holds a finished training; then it dies."""
    with chaos.proxy.answering(HANG, only="PUT"):
        end = time.monotonic() + 4 * chaos.lease
        while time.monotonic() < end:
            jobs = [job for study in chaos.studies if not study.deleted for job in study.trials()]
            for job in jobs:
                if job.state == "running" and job.trained is not None and job.worker is not None:
                    psutil.Process(int(job.worker.rpartition(":")[2].partition("-")[0])).kill()
                    return True
            time.sleep(0.1)
    return False


def freeze_worker_beyond_its_lease(chaos: "Chaos") -> None:
    worker = _worker(chaos)
    frozen = [worker, *worker.children()]
    suspend(frozen)
    time.sleep(chaos.lease + chaos.random.uniform(0.5, 3))
    resume(frozen)


def stop_worker(chaos: "Chaos") -> None:
    _worker(chaos).send_signal(chaos.random.choice([signal.SIGTERM, signal.SIGINT]))


def stop_worker_twice(chaos: "Chaos") -> None:
    worker = _worker(chaos)
    worker.send_signal(signal.SIGINT)
    time.sleep(chaos.random.uniform(0, 1))
    worker.send_signal(signal.SIGINT)


def stop_postgres_immediately(chaos: "Chaos") -> None:
    _signal_postmaster(chaos, signal.SIGQUIT)


def stop_postgres_fast(chaos: "Chaos") -> None:
    _signal_postmaster(chaos, signal.SIGINT)


def kill_postgres(chaos: "Chaos") -> None:
    _signal_postmaster(chaos, signal.SIGKILL)


def _signal_postmaster(chaos: "Chaos", number: signal.Signals) -> None:
    for postmaster in chaos.postgres()[:1]:
        postmaster.send_signal(number)
        psutil.wait_procs([postmaster], timeout=20)
        time.sleep(chaos.random.uniform(0, 2 * chaos.lease))


def freeze_postgres(chaos: "Chaos") -> None:
    _freeze(chaos, chaos.postgres())


def kill_mlflow(chaos: "Chaos") -> None:
    for process in chaos.mlflow():
        with suppress(psutil.Error):
            process.kill()
    time.sleep(chaos.random.uniform(0, 2 * chaos.lease))


def freeze_mlflow(chaos: "Chaos") -> None:
    _freeze(chaos, chaos.mlflow())


def _freeze(chaos: "Chaos", processes: list[psutil.Process]) -> None:
    suspend(processes)
    time.sleep(chaos.random.uniform(0, chaos.random.choice([chaos.lease, CLIENT_PATIENCE + 4])))
    resume(processes)


def refuse_the_login_at_mlflow(chaos: "Chaos") -> None:
    _answer(chaos, "401", "403")


def send_to_a_login_page(chaos: "Chaos") -> None:
    _answer(chaos, "login", "html")


def answer_as_a_gateway_without_mlflow(chaos: "Chaos") -> None:
    _answer(chaos, "503", "drop")


def _answer(chaos: "Chaos", *modes: str) -> None:
    with chaos.proxy.answering(chaos.random.choice(modes)):
        time.sleep(chaos.random.uniform(0.5, 2 * chaos.lease))


FAULTS = (
    *(kill_trainer, kill_worker, kill_worker_before_it_records_what_it_has_trained),
    *(freeze_worker_beyond_its_lease, stop_worker, stop_worker_twice),
    *(stop_postgres_immediately, stop_postgres_fast, kill_postgres, freeze_postgres, kill_mlflow, freeze_mlflow),
    *(refuse_the_login_at_mlflow, send_to_a_login_page, answer_as_a_gateway_without_mlflow),
)
