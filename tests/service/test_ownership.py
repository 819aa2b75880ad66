"""What lies under HPO_HOME is ours or refused; nothing of others is written, run, ended or removed. As two users."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from data_pipeline import dataset
from hpo import api, ownership
from hpo.errors import ServiceError
from hpo.services import daemon, mlflow_server, postgres, serving
from hpo.services import home as homes
from hpo.services.home import Home
from hpo.settings import Settings, read
from hpo.tracking import data_sets
from hpo.worker import processes

OTHER = "nobody"


def settings_of(path: Path) -> Settings:
    return read({"HPO_HOME": str(path)})


def silent(line: str) -> None:
    pass


def as_other(script: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", script], cwd=folder, check=True, **daemon.as_user(OTHER))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like /tmp, which the other user can reach."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home with a Postgres that runs, without MLflow."""
    path = (tmp_path / "home").resolve()
    ownership.folder(path, "services")
    try:
        yield postgres.start(homes.settle(path, silent, postgres.stop), silent)[0]
    finally:
        serving.erase(settings_of(path))


# --- Folders and files of others


@pytest.mark.root
@pytest.mark.parametrize("other", [False, True], ids=["code", "state"])
def test_a_folder_that_another_user_made_first_is_refused_and_nothing_in_it_is_run(shared, tmp_path, other):
    path, mine = shared / "mlruns", tmp_path / "mine"
    for name in ("binaries", "postgres.new"):
        (mine / name).mkdir(parents=True)
    code = f"open('{shared}/owned', 'w')"
    as_other(f'mkdir -p mlruns/services/tmp && echo "{code}" > mlruns/services/tmp/mlflow.py', shared)
    if other:
        state = f'{{"path": "{path}", "identity": "1", "uid": 0, "data": "{mine}/postgres", "password": "p"}}'
        as_other(f"echo '{state}' > mlruns/services/state.json", shared)
    for command in (serving.up, serving.running, serving.down, serving.erase):
        if command is serving.up or other:
            with pytest.raises(ServiceError, match=f"mlruns belongs to the user {OTHER}: run hpo as that user, or set"):
                command(settings_of(path))
    assert sorted(each.name for each in shared.iterdir()) == ["mlruns"]
    assert sorted(each.name for each in mine.iterdir()) == ["binaries", "postgres.new"]


def test_the_state_of_an_earlier_hpo_is_read_and_its_user_number_means_nothing(tmp_path):
    home = Home(path=tmp_path, identity="1", data=ownership.folder(tmp_path, "services") / "postgres", password="p")
    homes.write(home)
    state = tmp_path / "services" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"uid": os.geteuid() + 1}))
    assert homes.read(tmp_path) == home


def test_a_home_whose_name_is_not_ascii_is_the_same_one_in_every_locale(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from hpo import ownership
        from hpo.services import home as homes

        path = Path(sys.argv[1])
        if sys.argv[2] == "make":
            data = ownership.folder(path, "services") / "postgres"
            homes.write(homes.Home(path=path, identity="1", data=data, password="p"))
        home = homes.read(path)
        print(home.path == path and home.data == path / "services" / "postgres")
    """
    locales = ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"})
    for place, order in enumerate((locales, locales[::-1])):
        for locale, what in zip(order, ("make", "read"), strict=True):
            words = [sys.executable, "-c", code, str(tmp_path / f"cells-é-{place}"), what]
            answer = subprocess.run(
                words, env=os.environ | {"PYTHONUTF8": "0"} | locale, capture_output=True, text=True
            )
            assert answer.stdout == "True\n", answer.stderr


@pytest.mark.root
@pytest.mark.parametrize("part", ["services", "services/state.json", "services/tmp", "logs", "artifacts"])
def test_each_part_of_the_home_that_is_another_users_is_refused_by_name(tmp_path, part):
    path = tmp_path / "home"
    ownership.folder(path, "services")
    homes.write(Home(path=path, identity="1", data=path / "services" / "postgres", password="p"))
    target = path / part
    if part != "services/state.json":
        target.mkdir(exist_ok=True)
    shutil.chown(target, OTHER)
    home = Home(path=path, identity="1", data=tmp_path / "none", password="p", postgres_port=daemon.choose_port(None))
    with pytest.raises(ServiceError, match=f"{part} belongs to the user {OTHER}"):
        if part == "services/tmp":
            ownership.folder(home.path, "services", "tmp")
        else:
            serving.up(settings_of(path))


@pytest.mark.root
@pytest.mark.parametrize("part", ["", "cache", "cache/data", "logs"])
def test_a_workers_files_in_folders_of_others_are_refused_with_any_services(tmp_path, part, data_set):
    path = tmp_path / "home"
    (path / "cache" / "data").mkdir(parents=True)
    (path / "logs").mkdir()
    shutil.chown(path / part, OTHER)
    with pytest.raises(ServiceError, match=f"{(path / part).name} belongs to the user {OTHER}"):
        if part == "logs":
            processes.open_log(path, "worker")
        else:
            data_sets.keep(path, data_set)


@pytest.fixture
def data_set(data) -> dataset.Dataset:
    return dataset.load(data)


@pytest.mark.root
def test_a_link_of_another_user_leads_nowhere_and_one_of_ours_does(shared, tmp_path):
    (tmp_path / "mine").mkdir()
    as_other(f"ln -s {tmp_path}/mine mlruns; ln -s {tmp_path}/new dangling", shared)
    for name in ("mlruns", "dangling"):
        with pytest.raises(ServiceError, match=f"{name} belongs to the user {OTHER}"):
            serving.up(settings_of(shared / name))
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "new").exists()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert homes.resolved(tmp_path / "link") == tmp_path / "mine"


def test_a_folder_that_others_may_write_is_refused_with_the_cure(tmp_path):
    path = tmp_path / "home"
    ownership.folder(path, "services")
    for part, mode in ((path, 0o777), (path / "services", 0o707)):
        part.chmod(mode)
        with pytest.raises(ServiceError, match=f"Others may write {part} .mode {mode:04o}.*chmod go-w {part} "):
            serving.up(settings_of(path))
        part.chmod(0o755)
    assert serving.running(settings_of(path)) is None  # a project's folder, as it was


@pytest.mark.parametrize("shared", ["sticky", "home"])
def test_a_folder_that_is_for_more_than_hpo_is_not_to_be_closed(tmp_path, monkeypatch, shared):
    path = tmp_path / "broad"
    path.mkdir()
    path.chmod(0o1777 if shared == "sticky" else 0o777)
    if shared == "home":
        monkeypatch.setenv("HOME", str(path))
    with pytest.raises(ServiceError, match=f"Set HPO_HOME to a folder of its own in it, such as {path}/hpo") as caught:
        ownership.folder(path)
    assert "chmod" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "[" * 100_000, "\\xff"])
def test_a_state_file_that_hpo_did_not_write_is_no_home(tmp_path, content):
    home = Home(path=tmp_path / "other", identity="1", data=tmp_path / "none", password="p")
    for path in (tmp_path / "mine", home.path):
        ownership.folder(path, "services")
    homes.write(replace(home, path=tmp_path / "mine"))
    state = tmp_path / "mine" / "services" / "state.json"
    state.write_text(state.read_text().replace(f"{tmp_path}/mine", f"{home.path}"))
    (home.path / "services" / "state.json").write_bytes(content.encode())
    (home.path / "services" / "state.json").chmod(0o600)
    assert homes.serving(tmp_path / "mine") is None, "it is a copy or was moved: what is there does not say"
    with pytest.raises(ServiceError, match="expected what hpo writes there"):
        homes.read(home.path)


@pytest.mark.root
def test_what_an_earlier_hpo_left_open_is_closed_except_links_and_others_files(tmp_path):
    path, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (path / "artifacts" / "1", path / "cache", elsewhere):
        folder.mkdir(parents=True)
        (folder / "file").touch(0o644)
        folder.chmod(0o755)
    (path / "artifacts" / "theirs").mkdir()
    (path / "artifacts" / "theirs" / "mine").touch(0o644)
    for theirs in ("1/file", "theirs"):
        shutil.chown(path / "artifacts" / theirs, OTHER)
    (path / "artifacts").chmod(0o755)
    (path / "logs").symlink_to(elsewhere)
    (path / "artifacts" / "link").symlink_to(elsewhere)
    said: list[str] = []
    serving._tighten(path, said.append)
    modes = {str(each.relative_to(tmp_path)): each.stat().st_mode & 0o777 for each in tmp_path.rglob("*")}
    assert [modes[f"home/{each}"] for each in ("artifacts", "artifacts/1", "cache", "cache/file")] == [
        0o700,
        0o700,
        0o700,
        0o600,
    ]
    assert [modes[each] for each in ("home/artifacts/1/file", "home/artifacts/theirs/mine", "elsewhere/file")] == [
        0o644
    ] * 3
    assert modes["elsewhere"] == 0o755
    assert said == [f"Below {path}, 2 of other users were left as they are, such as {path}/artifacts/theirs."]
    assert serving._open(path) == []


@pytest.mark.root
def test_only_a_group_that_is_its_owners_alone_may_write(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    path.chmod(0o775)
    ownership.folder(path)
    shutil.chown(path, group="daemon")
    with pytest.raises(ServiceError, match="Others may write"):
        ownership.folder(path)


def test_a_new_home_and_all_that_is_made_in_it_is_for_its_user_alone(tmp_path):
    before = os.umask(0)
    try:
        assert ownership.folder(tmp_path / "project" / "home", "cache", "data").is_dir()
    finally:
        os.umask(before)
    for made in (tmp_path / "project" / "home").rglob("*"):
        assert made.stat().st_mode & 0o777 == 0o700


# --- Root and the user that its Postgres runs as


@pytest.mark.service
@pytest.mark.root
def test_root_writes_nothing_through_a_link_in_the_data_directory(home, tmp_path):
    victims = {name: tmp_path / f"victim of {name}" for name in ("pg_hba.conf", "postmaster.pid", "PG_VERSION")}
    for victim in victims.values():
        victim.write_text("precious")
        victim.chmod(0o600)
    assert postgres.stop(home)
    for name in ("pg_hba.conf", "postmaster.pid"):
        as_other(f"ln -sf '{victims[name]}' {name}", home.data)
    home, started = postgres.start(home, silent)
    assert started and postgres.answers(home)
    assert postgres.stop(home)
    as_other(f"mv PG_VERSION kept; ln -s '{victims['PG_VERSION']}' PG_VERSION", home.data)
    with pytest.raises(OSError, match="symbolic links"):
        postgres.start(home, silent)
    as_other("mv kept PG_VERSION", home.data)
    assert {victim.read_text() for victim in victims.values()} == {"precious"}


# --- Processes


@pytest.mark.root
def test_processes_are_ended_by_the_homes_identity_and_our_own_user(tmp_path):
    home = Home(path=tmp_path, identity="0123456789abcdef", data=tmp_path, password="secret-of-this-home")
    here = ownership.folder(tmp_path, "services", "tmp")
    database = f"postgresql://hpo:{home.password}@127.0.0.1:1/mlflow"
    path = {mlflow_server.MARK: str(tmp_path)}
    cases = {
        "ours": ({mlflow_server.MARK: home.identity}, None),
        "its copy's": ({mlflow_server.MARK: home.identity}, None),
        "of an earlier hpo": (path | {"MLFLOW_BACKEND_STORE_URI": database}, None),
        "another home's of this path": (path, None),
        "another user's": ({mlflow_server.MARK: home.identity}, OTHER),
        "another home's": ({mlflow_server.MARK: "fedcba9876543210"}, None),
    }
    started = {}
    try:
        for name, (environment, user) in cases.items():
            where = tmp_path if name == "its copy's" else here if user is None else None
            started[name] = subprocess.Popen(["sleep", "600"], env=environment, cwd=where, **daemon.as_user(user))
        found = {process.pid for process in mlflow_server._processes(home)}
        assert {name for name in cases if started[name].pid in found} == {"ours", "of an earlier hpo"}
        assert mlflow_server.stop(home)
        assert [name for name in cases if started[name].poll() is None] == [
            name for name in cases if name not in ("ours", "of an earlier hpo")
        ]
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.service
def test_a_copy_neither_stops_nor_removes_its_original(home, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(home.path, copy, symlinks=True)
    assert serving.down(settings_of(copy)) is False
    assert postgres.answers(home)
    serving.erase(settings_of(copy))
    assert postgres.answers(home) and not (copy / "services").exists()
    assert homes.read(home.path) == home


@pytest.mark.service
def test_a_home_that_was_moved_while_it_ran_is_stopped(home, tmp_path):
    path = home.path.rename(tmp_path / "moved")
    assert serving.down(settings_of(path)) is True
    assert not postgres.lives(homes.serving(path))
    path.rename(home.path)


# --- Removal and logs


def test_who_waited_for_the_lock_while_its_folder_was_removed_begins_in_a_new_one(tmp_path):
    lock = tmp_path / "services" / "lock"
    held, waits, seen = threading.Event(), threading.Event(), []

    def wait() -> None:
        held.wait(30)
        with daemon.locked(lock, waiting=waits.set):
            seen.append(sorted(each.name for each in lock.parent.iterdir()))

    thread = threading.Thread(target=wait)
    thread.start()
    with daemon.locked(lock, waiting=silent):
        (lock.parent / "state.json").touch()
        held.set()
        assert waits.wait(30)
        lock.parent.rename(tmp_path / "removed")
    thread.join(30)
    assert seen == [["lock"]]


@pytest.mark.service
@pytest.mark.parametrize("gone", ["home", "services/state.json"])
def test_services_whose_home_or_state_was_removed_are_still_ended(tmp_path, gone):
    read_home = settings_of(tmp_path / "home")
    serving.up(read_home, report=silent)
    home = homes.read(tmp_path.resolve() / "home")
    assert home is not None
    try:
        if gone == "home":
            shutil.rmtree(home.path)
        else:
            (home.path / gone).unlink()
        assert serving.down(read_home) is True
        assert not mlflow_server.lives(home) and not postgres.lives(home)
        assert serving.down(read_home) is False
        if gone != "home" and os.geteuid():
            with pytest.raises(ServiceError, match=r"postgres holds a database, but .*state\.json.* is missing"):
                serving.up(read_home, report=silent)
    finally:
        serving.erase(read_home)
        if not home.data.is_relative_to(home.path):
            shutil.rmtree(home.data.parent)


def test_a_process_elsewhere_or_of_another_kind_is_not_ended_with_a_removed_home(tmp_path):
    places = [tmp_path / "home", tmp_path / "other"]
    processes_here = []
    try:
        for place, command in [(places[0], "sleep"), (places[0], "tail"), (places[1], "sleep")]:
            place.mkdir(exist_ok=True)
            words = [command, "600"] if command == "sleep" else ["tail", "-f", "/dev/null"]
            processes_here.append(subprocess.Popen(words, cwd=place))
        moved = places[1].rename(tmp_path / "moved")
        shutil.rmtree(places[0])
        assert daemon.end_in(places[1], lambda process: process.name() == "sleep") is False
        assert daemon.end_in(places[0], lambda process: process.name() == "sleep") is True
        assert not psutil.pid_exists(processes_here[0].pid)
        assert [process.poll() for process in processes_here[1:]] == [None, None] and moved.exists()
    finally:
        for process in processes_here:
            process.kill()
            process.wait()


@pytest.mark.service
def test_a_postgres_that_was_stopped_is_told_from_one_that_does_not_run(home, monkeypatch):
    monkeypatch.setenv("HPO_HOME", str(home.path))
    postmaster = psutil.Process(int((home.data / "postmaster.pid").read_text().split()[0]))
    postmaster.suspend()
    try:
        for ask in (api.status, api.studies):
            with pytest.raises(ServiceError, match="lives but does not answer"):
                ask()
    finally:
        postmaster.resume()


def test_a_log_is_bounded_while_its_service_runs_and_outlives_its_removal(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "LOG_LIMIT", 100_000)
    log, life = tmp_path / "logs" / "log", tmp_path / "life"
    script = "yes a line of the log | head -c 1000000; echo middle; while [ ! -e go ]; do sleep 0.05; done; echo end"
    with daemon.taken(life) as held:
        daemon.launch(
            ["sh", "-c", script], life=held, log=log, environment={"PATH": os.defpath}, folder=tmp_path, user=None
        )
    until(lambda: log.exists() and log.read_text().endswith("middle\n"))
    assert {each.name for each in log.parent.iterdir()} == {"log", "log.1"}
    assert all(each.stat().st_size <= 100_000 and each.stat().st_mode & 0o777 == 0o600 for each in log.parent.iterdir())
    log.unlink()
    (tmp_path / "go").touch()
    assert daemon.dies(life, timeout=30)
    until(lambda: log.exists() and log.read_text() == "end\n")
    assert daemon.dies(log, timeout=30)


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
