"""The folders that workers of one HPO_HOME have for themselves: each keeps its own, and those of dead ones go."""

import os
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from shell import at_once

from hpo.worker.folders import SILENT_HOST, WorkFolder, own_folder, sweep

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
