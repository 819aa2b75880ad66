"""Workers that cannot work, beside one that can: they say why and leave, and no trial pays for them."""

import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cells
import psutil
import pytest
from shell import PATIENCE, Shell, check_recorded_once, mirrored, tmpfs, trainers

from hpo.operations import invariants
from hpo.queue import AttemptOutcome

pytestmark = pytest.mark.acceptance
FIRST_OF_ITS_CONTAINER = ("unshare", "--fork", "--pid", "--kill-child")


def outcomes(shell: Shell, study: str) -> list[AttemptOutcome | None]:
    """The outcomes of all attempts of the study's trials."""
    attempts = shell.queue.attempts(study)
    return [attempt.outcome for job in shell.trials(study) for attempt in attempts.get(job.id, [])]


def without_gpu(shell: Shell, folder: Path) -> tuple[dict[str, str], list[str]]:
    """A worker that insists on a GPU where there is none."""
    return {"CUDA_VISIBLE_DEVICES": ""}, ["--device", "cuda"]


def without_torch(shell: Shell, folder: Path) -> tuple[dict[str, str], list[str]]:
    """A worker whose trainers cannot import what they need."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.12: cannot open shared object file')"
    )
    return {"PYTHONPATH": str(folder)}, ["--device", "cpu"]


def with_broken_numbers(shell: Shell, folder: Path) -> tuple[dict[str, str], list[str]]:
    """A worker on whose node a library of the networks is broken: its trainers start, and cannot train."""
    (folder / "sitecustomize.py").parent.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(BROKEN)
    return {"PYTHONPATH": str(folder)}, ["--device", "cpu"]


def with_a_bad_disk(shell: Shell, folder: Path) -> tuple[dict[str, str], list[str]]:
    """A worker whose copy of the data set is wrong, however often it is fetched."""
    (folder / "sitecustomize.py").parent.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(BAD_DISK)
    return {"PYTHONPATH": str(folder)}, ["--device", "cpu"]


BROKEN = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "models.training" and "hpo.worker.trainer" in " ".join(sys.orig_argv):
            raise ImportError("libmkl_core.so: cannot open shared object file")

sys.meta_path.insert(0, Broken())
"""
CHANGED = """
import sys
from importlib.machinery import PathFinder, SourceFileLoader

class Loader(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        change(module)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == NAME:
            spec = PathFinder.find_spec(name, path)
            spec.loader = Loader(spec.loader.name, spec.loader.path)
            return spec

sys.meta_path.insert(0, Finder())
"""
BAD_DISK = f"""{CHANGED}
NAME = "hpo.tracking.data_sets"

def change(module):
    fetch = module.fetch

    def damaged(*arguments):
        path = fetch(*arguments)
        path.write_bytes(path.read_bytes() + b"?")
        return path

    module.fetch = damaged
"""
CURSE = f"""{CHANGED}
NAME = "hpo.worker.train_trial"

def change(module):
    def train(*_):
        raise OSError("cursed")

    module.train = train
"""
KINDS: dict[Callable[..., tuple[dict[str, str], list[str]]], str] = {
    without_gpu: "This worker cannot train here: expected to train a small batch on the device 'cuda', found: ",
    without_torch: "Trainers cannot be started: ",
    with_broken_numbers: "Trainers cannot be started: ",
    with_a_bad_disk: "the file was damaged. It was fetched 3 times: is HPO_HOME's disk sound?",
}


def start(shell: Shell, folder: Path, study: str, kind: Callable[..., tuple[dict[str, str], list[str]]]):
    """Start a worker of this kind."""
    before = shell.environment
    changes, words = kind(shell, folder)
    shell.environment = before | {"HPO_HOME": str(folder / "home")} | changes
    try:
        return shell.start("worker", "--study", study, "--trainers", 1, *words)
    finally:
        shell.environment = before


def kill_trainers(process: subprocess.Popen) -> None:
    """Kill every trainer of a worker at its start, until the worker ends."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            for trainer in trainers(process):
                trainer.kill()
        except psutil.NoSuchProcess:
            return
        time.sleep(0.02)


@pytest.fixture
def beside() -> str:
    """The name of a study of this test alone: the tests share an MLflow server."""
    return f"beside-{secrets.token_hex(4)}"


def begun(shell: Shell, data: Path, folder: Path, study: str, epochs: int) -> subprocess.Popen:
    """A worker that can work, in the middle of a trial of the study."""
    process = shell.start("run", "--study", cells.study(folder, study, data=data, epochs=epochs, rates="[1e-3]"))
    shell.training(study, epochs=5)
    return process


@pytest.fixture
def healthy(shell, data, tmp_path, beside) -> Iterator[subprocess.Popen]:
    process = begun(shell, data, tmp_path, beside, epochs=600)
    yield process
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    check_recorded_once(shell, beside, points=2, epochs=600)
    assert outcomes(shell, beside) == [AttemptOutcome.RECORDED] * 2, "nothing was trained twice"


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS])
def test_a_worker_that_cannot_train_says_why_and_no_attempt_counts(shell, healthy, tmp_path, beside, kind):
    poison = start(shell, tmp_path / "poison", beside, kind)
    output, _ = poison.communicate(timeout=PATIENCE)
    assert poison.returncode == 1 and "Traceback (most recent call last)" not in output.partition(KINDS[kind])[0], (
        output
    )
    assert output.count(KINDS[kind]) == 1


@pytest.mark.long
def test_a_worker_whose_trainers_are_killed_at_each_start_claims_nothing(shell, healthy, tmp_path, beside):
    poison = start(shell, tmp_path / "poison", beside, lambda *_: ({}, ["--device", "cpu"]))
    kill_trainers(poison)
    output, _ = poison.communicate(timeout=PATIENCE)
    assert poison.returncode == 1 and "Trainers cannot be started: trainer killed by SIGKILL" in output, output


@pytest.mark.long
def test_a_worker_on_a_full_disk_claims_nothing(shell, healthy, tmp_path, beside):
    with tmpfs(tmp_path / "small", "20m") as folder:
        poison = start(shell, folder, beside, lambda *_: ({}, ["--device", "cpu"]))
        output, _ = poison.communicate(timeout=PATIENCE)
    assert poison.returncode == 1 and "found: no room on the disk: less than 64 MB in" in output, output


@pytest.mark.long
def test_a_worker_that_is_started_again_after_a_failure_waits_longer_each_time(shell, data, tmp_path, beside):
    healthy = begun(shell, data, tmp_path, beside, epochs=6000)
    healthy.terminate()  # the study stays open
    healthy.communicate(timeout=PATIENCE)
    said = []
    for count in range(3):
        poison = start(shell, tmp_path / f"poison-{count}", beside, without_gpu)
        output, _ = poison.communicate(timeout=PATIENCE)
        assert poison.returncode == 1, output
        said.append(output)
    assert "Workers failed here" not in said[0]
    assert "Workers failed here 1 time in a row, at last: This worker cannot train here" in said[1]
    assert "Workers failed here 2 times in a row" in said[2] and "Ctrl-C ends it" in said[2]
    for before in (
        [],
        FIRST_OF_ITS_CONTAINER,
    ):  # which gets only the signals that it asks for
        shell.queue.note_failure(beside, host=socket.gethostname(), device="cpu", reason="odd.")
        failures = shell.queue.failures(beside, host=socket.gethostname(), device="cpu")
        waiting = shell.start("worker", "--study", beside, "--device", "cpu", before=before)
        assert "Workers failed here" in waiting.stdout.readline()
        time.sleep(0.2)  # it has said so, and falls asleep
        (worker,) = psutil.Process(waiting.pid).children() if before else [waiting]
        worker.terminate()
        output, _ = waiting.communicate(timeout=PATIENCE)
        assert (waiting.returncode, output) == (130, "Interrupted.\n")
        after = shell.queue.failures(beside, host=socket.gethostname(), device="cpu")
        assert after.count == failures.count and shell.queue.workers(beside)[1:] == [], "it was never a worker"


@pytest.mark.long
def test_poison_workers_of_every_kind_cost_a_study_nothing(shell, data, tmp_path):
    file = cells.study(tmp_path, "poisoned", data=data, epochs=400, rates="[1e-3, 3e-4, 1e-4]")
    healthy, count = shell.start("run", "--study", file), 0
    shell.training("poisoned", epochs=1)
    while healthy.poll() is None and count < 12:
        kind = list(KINDS)[count % len(KINDS)]
        poison = start(shell, tmp_path / f"poison-{count}", "poisoned", kind)
        count += 1
        while poison.poll() is None and healthy.poll() is None:
            time.sleep(0.1)
        if poison.poll() is not None:
            assert poison.returncode in (0, 1), poison.stdout.read()
    output, _ = healthy.communicate(timeout=PATIENCE)
    assert healthy.returncode == 0 and count >= 2, output
    assert outcomes(shell, "poisoned") == [AttemptOutcome.RECORDED] * 6
    with mirrored(shell, "poisoned") as shown:
        assert invariants.check(shown) == []


@pytest.mark.long
def test_a_study_whose_trials_all_fail_pauses_and_goes_on_after_hpo_run(shell, data, tmp_path):
    file = cells.study(tmp_path, "cursed", data=data, epochs=3, rates="[1e-3, 3e-4, 1e-4]")
    curse = tmp_path / "curse"
    curse.mkdir()
    (curse / "sitecustomize.py").write_text(CURSE)
    shell.environment |= {"PYTHONPATH": str(curse)}
    output = shell.hpo("run", "--study", file, "--device", "cpu", code=1)
    assert "The study cursed is paused: " in output and "at last the cheapest: OSError: cursed" in output
    row = shell.queue.study("cursed")
    assert row.paused and {job.state for job in shell.trials("cursed")} == {"waiting"}, "no trial died"
    assert shell.json("studies")[0]["state"] == "paused" and row.paused in shell.hpo("status")
    assert f"paused: cursed is paused: {row.paused}" in shell.hpo("doctor", "--study", "cursed", code=1)
    assert "The study cursed is paused: " in shell.hpo("worker", "--study", "cursed", "--device", "cpu", code=1)
    first = next(job for job in shell.trials("cursed") if job.attempt)
    assert "no epoch, failed: OSError: cursed (counts)" in shell.hpo("show", f"cursed/{first.number}")
    with mirrored(shell, "cursed") as shown:
        assert shown.tracker.tags(row.facts.study_run_id)["hpo.paused"] == row.paused
        assert invariants.check(shown) == []
    del shell.environment["PYTHONPATH"]
    output = shell.hpo("run", "--study", file, "--device", "cpu")
    assert "cursed was paused" in output
    check_recorded_once(shell, "cursed", points=6, epochs=3)
    with mirrored(shell, "cursed") as shown:
        assert shown.tracker.tags(row.facts.study_run_id)["hpo.paused"] == ""
