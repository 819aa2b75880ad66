"""The page on a data set shows images and labels, and each finding with its rows; its size is bounded."""

import json
import re
from dataclasses import replace
from pathlib import Path

import cells
import numpy as np
import pytest
from places import ROOT
from test_findings import CORRUPTIONS, EXAMPLES, SEED, look

from data_pipeline import dataset as data_sets
from data_pipeline.dataset import DEFAULT
from data_pipeline.findings import Finding
from hpo import api
from hpo.cli.main import main
from hpo.errors import ReportError
from hpo.report import data_page

ELSEWHERE = re.compile(
    r'(?:src|href|url)\s*[=(]\s*"?(?!"?(?:data:|#))', re.IGNORECASE
)  # a file or page beyond this one


def small(folder, count=40):
    """A data set of any form whose files have names that a page must escape."""
    cells.make(folder, count=count)
    names = [f'<b>"{index}" & co<script>.png' for index in range(count)]
    for index, name in enumerate(names):
        (folder / f"{index}_cell.png").rename(folder / name)
    table = next(folder.glob("*.csv"))
    rows = [line.split(",") for line in table.read_text().split()]
    head = ["image", "E<i> [GPa]", "k [W/(m K)]"]
    lines = [[json.dumps(name).replace('\\"', '""'), row[1], row[2]] for name, row in zip(names, rows, strict=True)]
    lines[7][1] = "-999"
    table.write_text("\n".join(map(",".join, [head, *lines])))
    (folder / "dataset.toml").write_text('images = "*.png"\n')
    return names


@pytest.mark.parametrize("finding", sorted({name for _, name, _ in CORRUPTIONS}))
def test_each_finding_stands_in_the_page_with_its_rows(finding):
    number, (name, _, corrupt) = next(pair for pair in enumerate(CORRUPTIONS) if pair[1][1] == finding)
    data = corrupt(data_sets.load(EXAMPLES.get(name, DEFAULT)), np.random.default_rng(SEED + number))
    rows = [f"line {index}" for index in range(len(data.names))]
    every = look(data)
    (index, *_) = (index for index, own in enumerate(every) if own.name == finding)
    section, own = data_page.of_findings(data, rows, every)[index], every[index]
    assert section.title.startswith(("Error: ", "Doubt: ")) and finding in section.title and own.text in section.text
    if not own.images:
        return
    (table,), (gallery,) = section.tables, section.galleries
    assert [row.values["row"] for row in table.rows] == [rows[image] for image in own.images[: data_page.MOST_ROWS]]
    assert len(own.images) <= data_page.MOST_ROWS or f"of {len(own.images)}" in table.note
    assert len(gallery.tiles) == min(len(own.images), data_page.OF_FINDING)
    if own.others:  # side by side
        assert [row.values["equals"] for row in table.rows] == [data.names[other] for other in own.others]
        assert all(len(tile.uris) == 2 for tile in gallery.tiles)
    else:
        assert all(rows[image] in tile.lines[1] for image, tile in zip(own.images, gallery.tiles, strict=False))


def test_a_check_writes_one_page_with_escaped_names_and_nothing_from_elsewhere(tmp_path, capsys):
    names = small(tmp_path / "set")
    page = tmp_path / "page.html"
    for _ in range(2):  # a page of hpo is replaced
        assert main(["data", "check", str(tmp_path / "set"), "-o", str(page)]) == 0
    assert f"{page}: open it in a browser." in capsys.readouterr().out
    text = page.read_text()
    assert "<script" not in text and "<b>" not in text and "<i>" not in text
    assert "&lt;b&gt;&#34;7&#34; &amp; co&lt;script&gt;.png" in text and names[7] not in text
    assert not ELSEWHERE.findall(text)
    named = {"http://www.w3.org", "http://purl.org", "http://creativecommons.org"}
    assert set(re.findall(r"https?://[^\"/ ]+", text)) <= named, "names of formats in figures"
    for words in (
        "sentinels",
        "40 images of 16 x 16 pixels",
        "W/(m K)",
        "label of 2 targets",
        "No two images are equal",
    ):
        assert words in text
    assert text.count("<svg") == 5 and text.count("data:image/png") > 40


@pytest.mark.slow
def test_the_page_of_twenty_thousand_images_says_what_it_leaves_out_and_is_small():
    random = np.random.default_rng(0)
    shipped, count = data_sets.load(DEFAULT), 20_000
    images = random.random((count, 1, 16, 16), np.float32)
    images[1::2] = images[::2]
    data = replace(shipped, images=images, targets=random.normal(size=(count, 9)), names=tuple(map(str, range(count))))
    every = [Finding(name="outliers", sentence="C11: many.", images=tuple(range(9000)), target="C11")] * 60
    text = data_page.page(data, [f"row {index}" for index in range(count)], every)
    assert len(text) < 3_000_000 and text.count("<img") < 400
    for words in ("24 of 14000 images", "8 of 9000 images", "The first 100 of 9000", "8 of 10000 pairs"):
        assert words in text
    assert text.count("C11: many.") == 60, "the last ones in words alone"


@pytest.mark.parametrize("form", ["missing", "one number", "three images", "phases named as an input"])
def test_data_of_any_form_have_a_page(form, tmp_path):
    data = data_sets.load(ROOT / "examples" / "electrode")
    if form == "missing":
        data = replace(data, targets=np.where(np.arange(len(data.targets))[:, None] % 3, data.targets, np.nan))
    elif form == "one number":
        data = replace(data, targets=np.ones_like(data.targets))
    elif form == "three images":
        parts = {name: getattr(data, name)[:3] for name in ("images", "targets", "names")}
        data = replace(data, **parts, given_split=None)
    else:
        fractions = data.fractions()
        data = replace(data, inputs=np.column_stack(list(fractions.values())), input_names=tuple(fractions))
    assert "<svg" in data_page.page(data, [f"row {index}" for index in range(len(data.names))], [])


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "-": "expected the name of a page, such as page.html, found another ending",
        "page": "expected the name of a page",
        "absent/page.html": "found no folder",
        "notes.html": "no page of hpo: nothing was changed",
        "folder.html": "found a folder",
    }.items(),
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.html").write_text("notes of mine")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ReportError, match=message):
        api.check_data(tmp_path / "absent", page=Path(name))
    assert (tmp_path / "notes.html").read_text() == "notes of mine"


def test_no_page_is_written_on_data_that_cannot_be_read(tmp_path, capsys):
    small(tmp_path / "set")
    next((tmp_path / "set").glob("*.csv")).write_text("a,b\n1,2\n")
    page = tmp_path / "page.html"
    assert main(["data", "check", str(tmp_path / "set"), "-o", str(page)]) == 1
    assert not page.exists() and capsys.readouterr().err.startswith("hpo: The data set in ")
