"""The folders that workers of one HPO_HOME have for themselves: each keeps its own, and those of dead ones go."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import records
from shell import at_once

from hpo.files import sha256_of
from hpo.recording.trained import FINISHED, Trained
from hpo.worker.work_folder import KEPT, SILENT_HOST, WorkFolder, own_folder, sweep

HOST = socket.gethostname()


def test_workers_that_start_at_once_do_not_remove_each_others_folders(tmp_path):
    ended = threading.Event()

    def start(worker: int) -> None:
        for number in range(200):
            folder = tmp_path / f"{HOST}-{worker}-{number:06x}"
            with own_folder(folder):
                (folder / "model").mkdir()
                assert not sweep(folder), "its worker lives"
                assert (folder / "lock").exists() and (folder / "model").exists()
        ended.set()

    def clear() -> None:
        while not ended.is_set():
            for folder in tmp_path.iterdir():
                sweep(folder)

    at_once(*[partial(start, worker) for worker in range(3)], clear, clear)


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    folder, opened = tmp_path / f"{HOST}-1-abcdef", Path.open

    def open_slowly(path, mode):
        file = opened(path, mode)
        monkeypatch.setattr(Path, "open", opened)
        assert sweep(folder) and not folder.exists()
        return file

    monkeypatch.setattr(Path, "open", open_slowly)
    with own_folder(folder):
        assert (folder / "lock").exists()
        assert not sweep(folder)
    assert sweep(folder)


def test_a_folder_whose_worker_died_before_it_locked_it_is_removed(tmp_path):
    folder = tmp_path / f"{HOST}-1-abcdef"
    folder.mkdir()
    assert sweep(folder, remove=False) and folder.exists()
    assert sweep(folder) and not folder.exists()


@pytest.mark.parametrize("name", ["elsewhere-1-abcdef", "1-abcdef"])  # of another host; of an earlier version
def test_a_folder_of_another_host_stays_until_nothing_was_heard_of_it_for_a_week(tmp_path, name):
    folder = tmp_path / name
    own_folder(folder).close()  # a lock that this host does not see
    assert not sweep(folder) and folder.exists()
    long_ago = time.time() - SILENT_HOST - 1
    os.utime(folder / "lock", (long_ago, long_ago))
    with own_folder(folder):
        assert not sweep(folder), "its lock is seen"
    assert sweep(folder)


@pytest.fixture
def left(tmp_path):
    """The folder of a dead worker with a finished training and an unfinished one."""
    folder = tmp_path / "work" / f"{HOST}-1-abcdef"
    folder.parent.mkdir()
    own_folder(folder).close()
    for name in ("job-7-1", "job-8-1"):
        (folder / name / "model").mkdir(parents=True)
        for file in ("model/weights", "model/MLmodel", "validation.csv"):
            (folder / name / file).write_text(f"{name} {file}")
    (folder / "job-7-1" / FINISHED).touch()
    return folder


def trained(folder: Path) -> Trained:
    job = folder / "job-7-1"
    files = {path: sha256_of(job / path) for path in ("model/weights", "validation.csv")}
    scores = records.result(0.5).validation
    numbers = dict.fromkeys(("best_val_nmse", "best_val_mse", "last_val_nmse", "last_val_mse"), 0.5)
    return Trained(
        folder=job / "model", predictions=job / "validation.csv", epochs=2, best_epoch=2, validation=scores,
        last_validation=scores, files=files, device=None, **numbers,
    )  # fmt: skip


JOB = SimpleNamespace(id=7, fence=2)


def test_a_finished_training_of_a_dead_worker_is_taken_over_and_only_once(tmp_path, left):
    said = trained(left)
    with WorkFolder(tmp_path, "2-fedcba").lock():
        assert os.listdir(left / "job-7-1") and not (left / "job-8-1").exists(), "what is finished stays"
    own = WorkFolder(tmp_path, "3-fedcba")
    with own.lock():
        adopted = own.adopt(JOB, said)
        assert adopted.folder == own.of(JOB) / "model" and adopted.predictions.read_text() == "job-7-1 validation.csv"
        assert own.adopt(JOB, said) is None
        assert sweep(left), "nothing is left to be taken over"


@pytest.mark.parametrize("fault", ["lives", "changed", "lost"])
def test_nothing_is_taken_over_of_a_worker_that_lives_or_of_damaged_files(tmp_path, left, fault):
    said, own = trained(left), WorkFolder(tmp_path, "3-fedcba")
    if fault == "changed":
        (left / "job-7-1" / "model" / "weights").write_text("other")
    elif fault == "lost":
        (left / "job-7-1" / "validation.csv").unlink()
    with own.lock(), own_folder(left) if fault == "lives" else nullcontext():
        assert own.adopt(JOB, said) is None
    assert (left / "job-7-1").exists()


def test_a_finished_training_that_nobody_records_goes_after_a_day(left):
    assert not sweep(left, remove=False) and not sweep(left)
    long_ago = time.time() - KEPT - 1
    os.utime(left / "job-7-1" / FINISHED, (long_ago, long_ago))
    assert sweep(left) and not left.exists()


def test_a_folder_that_is_no_workers_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes.txt").touch()
    assert not sweep(tmp_path / "mine") and not sweep(tmp_path / "notes.txt")
    assert os.listdir(tmp_path / "mine") == []


def test_room_is_looked_for_though_the_workers_folder_is_gone(tmp_path):
    (tmp_path / "work").mkdir()
    folder = WorkFolder(tmp_path, "1-abcdef")
    assert not folder.lacks_room()
    (tmp_path / "work").rmdir()
    assert folder.lacks_room()


@pytest.mark.parametrize("language", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}])
def test_a_name_that_pytorch_cannot_open_is_refused_before_anything_is_claimed(tmp_path, language):
    code = "import sys, pathlib; from hpo.worker.work_folder import WorkFolder; "
    code += "WorkFolder(pathlib.Path(sys.argv[1]), 'x').lock().__enter__()"
    words = [sys.executable, "-c", code, str(tmp_path / "cells-é")]
    ended = subprocess.run(words, env=os.environ | {"PYTHONUTF8": "0"} | language, capture_output=True, text=True)
    is_utf8 = language["LC_ALL"] == "C.UTF-8"
    assert (ended.returncode == 0) == is_utf8
    assert is_utf8 or re.search("expected one, found .* Set LC_ALL=C.UTF-8", ended.stderr)
