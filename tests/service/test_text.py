"""Text that people chose is text in Markdown, CSV, HTML and on the terminal."""

import html
import io
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas
import pytest
import records
import torch
from markdown_it import MarkdownIt
from PIL import Image

from hpo.machine import who
from hpo.queue import AttemptOutcome, NewJob, Queue
from hpo.report.answers import Answer
from hpo.report.document import Document, Section, write
from hpo.report.tables import of_records
from hpo.text import for_csv, for_markdown, utf8, visible
from models import bundle
from models.networks import build
from models.regressor import Regressor
from models.specs import CnnSpec, to_dict

ESCAPE = "\x1b]0;OWNED\x07"
HOSTILE = [
    "0_a|b.png",
    "<script>alert(1)</script>",
    "![x](http://tracker/x.svg)",
    "[a](b) [a][b] [a]: http://x",
    "`code` **bold** _words_ snake_case ~~gone~~ $x$",
    "back\\slash \\| \\`",
    "&lt;b&gt; AT&T",
    "- a list",
    "# heading",
    "12. numbered",
    "=== line",
    "--- line",
    "> quote",
    "two\nlines",
    ESCAPE,
    "caf\udce9.png",
    "-0.25 [0.1, 0.2]",
    "@jane and @joe, jane@example.org, a @ b",
]
TAGS = {"h1", "h2", "h3", "p", "blockquote", "strong", "table", "thead", "tbody", "tr", "th", "td"}
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_a_text_as_it_is_in_a_paragraph_and_in_a_cell(text):
    said = visible(text).replace("\n", " ")
    assert html.unescape(MARKDOWN.render(for_markdown(text))) == f"<p>{said}</p>\n"
    table = MARKDOWN.render(f"| a | b |\n|---|---|\n| {for_markdown(text)} | x |\n")
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert [html.unescape(cell) for cell in cells] == [said, "x"]
    assert set(re.findall(r"<(\w+)", table)) == {"table", "thead", "tbody", "tr", "th", "td"}


def test_a_name_with_an_at_sign_is_marked_as_plain_text_for_mlflows_page():
    assert for_markdown("@jane wrote to @joe and a@b.org") == r"\@jane wrote to \@joe and a@b.org"


@pytest.mark.parametrize(
    "text",
    ['=HYPERLINK("http:x","y")', "+1+2", "-1+2", "@SUM(1)", "\tx", "'=1", "''=1", "＝1", "-", "'quoted'", "a=b", "x"],
)
def test_a_csv_cell_is_no_formula_and_is_read_back(text):
    frame = pandas.DataFrame({"name": [text, "-0.5", None, "1e-3"], text: [-1.0, np.nan, 2.5, 0.0]})
    read = pandas.read_csv(io.StringIO(for_csv(frame).to_csv(index=False)))
    written = [str(read["name"][0]), read.columns[1]]
    for cell in written:
        assert not re.match(r"[=+\-@\t＝]", cell)
        assert re.sub(r"^'(?='*[=+\-@\t＝])", "", cell) == text
    assert read["name"].tolist()[1::2] == ["-0.5", "1e-3"] and read.iloc[0, 1] == -1.0


def test_a_report_with_hostile_texts_has_all_its_rows_and_no_markup_of_theirs(tmp_path):
    names = list(map(utf8, HOSTILE))
    table = of_records([{"image": name, "a|b": row} for row, name in enumerate(names)], name="t", title="[x](y)")
    made = Document(
        title="<b>x</b>",
        summary=HOSTILE,
        alarms=HOSTILE,
        answers=[Answer(question="q", answer="a", because=text) for text in names],
        sections=[Section(title="**s**", text=HOSTILE, tables=[table])],
    )
    write(made, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page and "\\udce9" in page
    text = MARKDOWN.render((tmp_path / "report.md").read_text())
    assert set(re.findall(r"<(\w+)", text)) <= TAGS
    assert text.count("<tr>") == 2 * (1 + len(HOSTILE)) and text.count("<strong>") == len(HOSTILE)
    assert len(pandas.read_csv(tmp_path / "tables/t.csv")) == len(HOSTILE)
    assert len(json.loads((tmp_path / "tables/t.json").read_text())) == len(HOSTILE)


def hpo(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hpo", *map(os.fspath, words)], capture_output=True)


@pytest.mark.slow
def test_images_of_any_name_are_predicted_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = CnnSpec(filters=1, kernel_size=3, dropout=0.0)
    network = Regressor(build(spec, (1, 8, 8), 1), torch.zeros(1), torch.ones(1))
    bundle.save(
        tmp_path / "model", network, model=to_dict(spec), image_shape=(1, 8, 8), target_names=["=C11"], unit="GPa"
    )
    names = ['=HYPERLINK("http:x","y").png', "caf\udce9.png", "[/x].png", "plain.png"]
    for name in names:
        Image.new("L", (8, 8)).save("plain.png")
        if name != "plain.png":
            Path(name.replace("/", "∕")).write_bytes(Path("plain.png").read_bytes())
    images = [name.replace("/", "∕") for name in names]
    done = hpo("predict", "model", *images)
    assert done.returncode == 0, done.stderr
    table = pandas.read_csv(io.BytesIO(done.stdout))
    assert table["image"].tolist() == ["'" + names[0], "caf\\udce9.png", *images[2:]]
    assert table.columns[1] == "'=C11 [GPa]"
    done = hpo("predict", "model", "--json", *images)
    assert [each["image"] for each in json.loads(done.stdout)["predictions"]] == [
        names[0],
        "caf\\udce9.png",
        *images[2:],
    ]

    done = hpo("predict", "model", f"bad{ESCAPE}.png")
    assert done.returncode == 1 and b"bad\\x1b]0;OWNED\\x07.png" in done.stderr and b"\x1b" not in done.stderr
    Path("data").mkdir()
    Path("data/dataset.toml").write_text('"\\u001b[2J" = 1\n')
    done = hpo("data", "check", "data")
    assert done.returncode == 1 and b"no key is called '\\x1b[2J'" in done.stderr and b"\x1b" not in done.stderr


def test_a_reason_and_a_user_with_any_bytes_are_recorded(database_url, monkeypatch):
    monkeypatch.setenv("LOGNAME", "caf\udce9")
    with closing(Queue(database_url)) as queue:
        queue.install()
        queue.put_study(records.study_row("s"))
        jobs = [NewJob(kind="trial", number=number, spec=records.spec()) for number in range(2)]
        queue.put_jobs("s", jobs)
        queue.give_back(queue.claim("s", worker="w", lease=60), AttemptOutcome.FAILED, reason="no file caf\udce9\0")
        queue.stop("s", by=who())
        queue.cancel("s", 1, None, by=who())
        assert queue.jobs("s")[0].reason == "no file caf\\udce9\\x00"
        assert queue.jobs("s")[1].reason.startswith("cancelled by caf\\udce9@")
