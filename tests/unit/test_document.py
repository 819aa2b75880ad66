"""The files of a report: its own are replaced and removed, nobody else's."""

import hashlib
from pathlib import Path

import pytest
from shell import at_once

from hpo.errors import ReportError
from hpo.report.document import SUMS, Document, Section, write
from hpo.report.tables import of_records


def report(*tables: str) -> Document:
    made = [of_records([{"a": 1}], name=name, title=name) for name in tables]
    section = Section(title="s", tables=made)
    return Document(title="t", summary=["s"], alarms=[], answers=[], sections=[section])


def files(folder: Path) -> dict[str, str]:
    return {str(each.relative_to(folder)): each.read_text() for each in folder.rglob("*") if each.is_file()}


def test_a_report_removes_what_an_earlier_one_left_and_no_file_of_others(tmp_path):
    folder = tmp_path / "report"
    theirs = ("tables/my_measurements.csv", "tables/notes.json", "figures/photo.svg", "data.csv")
    for name in theirs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    write(report("one", "two", "edited"), folder)
    (folder / "tables" / "edited.csv").write_text("edited since")
    write(report("one"), folder)
    found = files(folder)
    assert {name: found[name] for name in theirs} == dict.fromkeys(theirs, "mine")
    assert found["tables/edited.csv"] == "edited since"
    assert "tables/one.csv" in found and not [name for name in found if "two" in name or name == "tables/edited.json"]
    listed = {line.partition("  ")[2] for line in found["report.sha256"].splitlines()}
    assert listed == found.keys() - {*theirs, "report.sha256", "tables/edited.csv"}


@pytest.mark.parametrize("name", ["report.html", "tables/one.csv", "report.sha256"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_file_of_others_with_a_name_of_ours_is_refused_before_anything_is_written(tmp_path, name, kind):
    (tmp_path / "elsewhere").write_text("mine")
    file = tmp_path / "report" / name
    file.parent.mkdir(parents=True)
    if kind == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_text("mine")
    said = (
        f"such as {name}.*made by an earlier hpo, or is no report" if name != SUMS else f"{name} is not as an earlier"
    )
    with pytest.raises(ReportError, match=f"{said}.*othing was changed"):
        write(report("one"), tmp_path / "report")
    assert [each for each in (tmp_path / "report").rglob("*") if each not in (file, file.parent)] == []
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_an_interrupted_report_is_replaced_by_the_next_one(tmp_path, monkeypatch):
    write(report("one", "two"), tmp_path)
    written = []

    def killed(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("hpo.report.document.write_atomically", killed)
        write(report("three"), tmp_path)
    assert {"tables/two.csv", "report.html"} <= files(tmp_path).keys()
    write(report("four"), tmp_path)
    assert {name for name in files(tmp_path) if name.startswith("tables/")} == {
        f"tables/{name}.{ending}" for name in ("answers", "four") for ending in ("csv", "json")
    }


def test_a_list_that_leads_out_of_the_folder_removes_nothing(tmp_path):
    folder, victim = tmp_path / "report", tmp_path / "victim.csv"
    write(report("one"), folder)
    victim.write_text("mine")
    with (folder / "report.sha256").open("a") as file:
        for path in ("../victim.csv", str(victim)):
            file.write(f"{hashlib.sha256(b'mine').hexdigest()}  {path}\n")
    write(report("two"), folder)
    assert victim.read_text() == "mine"


def test_a_report_of_an_earlier_hpo_is_refused_once_for_all_of_its_files(tmp_path):
    write(report("one", "two"), tmp_path)
    (tmp_path / SUMS).unlink()
    with pytest.raises(ReportError, match=r"\(8, such as report.html\), but no report.sha256"):
        write(report("one", "two"), tmp_path)


def test_reports_written_at_once_into_one_folder_follow_each_other(tmp_path):
    at_once(*(lambda name=name: write(report(name), tmp_path) for name in "abcd"))
    listed = {line.partition("  ")[2] for line in files(tmp_path)[SUMS].splitlines()}
    assert listed == files(tmp_path).keys() - {SUMS}, "none of the others is left"
