"""hpo.tracking.registry against a real MLflow server."""

import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.models import Model as MLmodel

from hpo.errors import ModelError, NotFound
from hpo.tracking import experiments, logged_models, registry
from hpo.tracking.client import Tracker
from hpo.tracking.logged_models import Model

KEY = "grid/0"


@pytest.fixture
def tracker(tracking_uri: str) -> Tracker:
    return Tracker(tracking_uri)


@pytest.fixture
def model_name(tracker: Tracker) -> str:
    name = f"default-{uuid.uuid4().hex[:8]}"
    registry.ensure_registered_model(tracker, name, description="first", tags={"targets": 9}, owner="here")
    return name


@pytest.fixture
def model(tracker: Tracker, tmp_path: Path) -> Model:
    folder = tmp_path / "packaged"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "model.pt2").write_bytes(b"weights")
    MLmodel().save(str(folder / "MLmodel"))
    experiment = experiments.ensure(tracker, uuid.uuid4().hex, description="", params=(), owner="here")
    run = tracker.ensure_run(experiment, key=KEY, name="0", kind="trial", params={}, tags={}, start_ms=1)
    return logged_models.log(tracker, run, experiment, folder, name="cnn", key=KEY)


@pytest.fixture
def register(tracker: Tracker, model_name: str, model: Model) -> Callable[..., int]:
    run_id = tracker.client.get_logged_model(model.model_id).source_run_id
    assert run_id

    def call(key: str = KEY, description: str = "text") -> int:
        return registry.register(
            tracker,
            model_name=model_name,
            owner="here",
            key=key,
            model_id=model.model_id,
            run_id=run_id,
            description=description,
            tags={"study": "grid"},
        )

    return call


@pytest.fixture
def download(tracker: Tracker, model_name: str, model: Model, register: Callable[..., int]) -> Callable[..., Path]:
    version = register()

    def call(folder: Path, version: int | str = version, expected: dict[str, str] = model.sha256) -> Path:
        return registry.download(
            tracker, model_name=model_name, version=version, folder=folder, expected_sha256=expected
        )

    return call


def test_a_winner_registered_twice_has_one_version(
    tracker: Tracker, model_name: str, model: Model, register: Callable[..., int]
) -> None:
    assert [register(), register(description="better text"), register("grid/1")] == [1, 1, 2]
    first, second = registry.versions(tracker, model_name)
    assert (first.key, first.model_id, first.description) == (f"here/{KEY}", model.model_id, "better text")
    assert first.tags["study"] == "grid"
    assert second.number == 2


def test_a_version_of_an_earlier_hpo_is_adopted_but_not_another_databases(
    tracker: Tracker, model_name: str, model: Model, register: Callable[..., int]
) -> None:
    client, run = tracker.client, tracker.client.get_logged_model(model.model_id).source_run_id
    for owner in ("there", "here"):  # as they were: without the database in the key
        client.create_model_version(
            model_name,
            source=f"models:/{model.model_id}",
            run_id=run,
            model_id=model.model_id,
            tags={"hpo.key": KEY, "hpo.database": owner},
        )
    assert register() == 2
    assert [version.key for version in registry.versions(tracker, model_name)] == [KEY, f"here/{KEY}"]


def test_a_registered_model_is_brought_up_to_date_but_not_another_databases(tracker: Tracker, model_name: str) -> None:
    tags = {"targets": 10, "unit": "GPa"}
    assert registry.ensure_registered_model(tracker, model_name, description="second", tags=tags, owner="here")
    assert not registry.ensure_registered_model(tracker, model_name, description="third", tags=tags, owner="there")
    found = tracker.client.get_registered_model(model_name)
    assert (found.description, found.tags) == ("second", {"targets": "10", "unit": "GPa", "hpo.database": "here"})


def test_the_table_of_versions_outlives_the_description_above_it(tracker: Tracker, model_name: str) -> None:
    table = "| version | trial |\n|---|---|\n| 1 | grid/6 |"
    registry.describe_versions(tracker, model_name, table)
    registry.ensure_registered_model(tracker, model_name, description="second", tags={}, owner="here")
    assert tracker.client.get_registered_model(model_name).description == f"second\n\n{table}"
    registry.describe_versions(tracker, model_name, "")
    assert tracker.client.get_registered_model(model_name).description == "second"
    assert registry.versions(tracker, model_name) == []


def test_an_alias_is_set_moved_and_deleted(tracker: Tracker, model_name: str, register: Callable[..., int]) -> None:
    assert registry.get_alias(tracker, "nothing", "champion") is None
    assert registry.get_alias(tracker, model_name, "champion") is None
    for key in (KEY, "grid/1"):
        number = register(key)
        registry.set_alias(tracker, model_name, "champion", number)
        found = registry.get_alias(tracker, model_name, "champion")
        assert found is not None
        assert (found.number, found.aliases) == (number, ("champion",))
    registry.delete_alias(tracker, model_name, "champion")
    registry.delete_alias(tracker, model_name, "champion")
    assert registry.get_alias(tracker, model_name, "champion") is None
    registry.delete_version(tracker, model_name, 1)
    registry.delete_version(tracker, model_name, 1)
    assert [version.number for version in registry.versions(tracker, model_name)] == [2]


def test_a_download_by_alias_has_every_file_and_its_check_sums(
    tracker: Tracker, model_name: str, download: Callable[..., Path], tmp_path: Path
) -> None:
    registry.set_alias(tracker, model_name, "champion", 1)
    folder = download(tmp_path / "deep er" / "champion", version="champion")
    assert (folder / "data" / "model.pt2").read_bytes() == b"weights"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    assert [path.name for path in folder.parent.iterdir()] == ["champion"]


def test_a_model_can_be_downloaded_before_it_is_registered(tracker: Tracker, model: Model, tmp_path: Path) -> None:
    folder = registry.download_model(
        tracker, model_id=model.model_id, folder=tmp_path / "m", expected_sha256=model.sha256
    )
    assert (folder / "data" / "model.pt2").read_bytes() == b"weights"
    with pytest.raises(NotFound, match="no model m-0"):
        registry.download_model(tracker, model_id="m-0", folder=tmp_path / "n", expected_sha256={})


def test_a_version_that_does_not_exist_is_named(download: Callable[..., Path], tmp_path: Path) -> None:
    for version in (99, "nobody"):
        with pytest.raises(NotFound, match=f"no version '{version}'"):
            download(tmp_path / "m", version=version)
    assert not (tmp_path / "m").exists()


def test_a_changed_a_missing_and_an_extra_file_are_refused(
    download: Callable[..., Path], model: Model, tmp_path: Path
) -> None:
    sums = model.sha256
    cases = {
        "expected SHA-256 0000": sums | {"MLmodel": "0" * 64},
        r"lacks files in the artifact store: other\.txt": sums | {"other.txt": "0" * 64},
        r"not logged with it: data/model\.pt2": {"MLmodel": sums["MLmodel"]},
    }
    for message, expected in cases.items():
        with pytest.raises(ModelError, match=message):
            download(tmp_path / "m", expected=expected)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "data/../../x", "data//x", "", "a\\b", "./x", "SHA256SUMS"])
def test_a_path_that_could_leave_the_folder_is_refused(
    download: Callable[..., Path], model: Model, tmp_path: Path, path: str
) -> None:
    with pytest.raises(ModelError, match="odd path"):
        download(tmp_path / "m", expected=model.sha256 | {path: "0" * 64})
    assert not (tmp_path / "m").exists()


def test_an_earlier_download_is_replaced(download: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()  # an empty folder will do
    first = download(tmp_path / "m")
    inode = os.stat(first).st_ino
    assert download(tmp_path / "m") == first
    assert os.stat(first).st_ino != inode


def test_what_is_not_an_untouched_download_is_left_alone(download: Callable[..., Path], tmp_path: Path) -> None:
    file, foreign, changed, extended = (tmp_path / name for name in ("file", "foreign", "changed", "extended"))
    file.write_text("mine")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    download(changed)
    (changed / "MLmodel").write_text("mine")
    download(extended)
    (extended / "notes.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(download(tmp_path / "m"))
    for target in (file, foreign, changed, extended, link):
        with pytest.raises(ModelError, match="exists and is not"):
            download(target)
    assert [p.read_text() for p in (file, foreign / "thesis.tex", changed / "MLmodel", extended / "notes.txt")] == [
        "mine"
    ] * 4
    assert link.is_symlink()
