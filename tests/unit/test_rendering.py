"""What people read on terminals of 80 and 120 columns: no line is wider, no word is cut in two."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import Recorded
from rich.cells import cell_len

from hpo.cli.watch import announcement
from hpo.errors import SettingsError
from hpo.queue import State
from hpo.report import results, tables
from hpo.report.display import View
from hpo.report.tables import Column, Row, Table
from hpo.text import in_brackets, squared

WIDTHS = (80, 120)
RUNS = ["grid", "tpe", "first-phase", "second-phase", "single"]


def printed(what, width: int) -> str:
    """What a terminal of so many columns shows of a table or of a view."""
    console = tables.Plain(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    if isinstance(what, Table):
        tables.print_table(console, what)
    else:
        console.print(what)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def check_whole(text: str, words: set[str], width: int) -> None:
    assert max(map(len, text.splitlines())) <= width
    there = set(re.split(r"[\s│┃]+", text))
    assert not {word for word in words if word not in there}


def words_of(table: Table) -> set[str]:
    """The words of all columns that a narrow terminal neither cuts nor leaves out, and those of the title."""
    kept = [index for index, column in enumerate(table.columns) if not column.cuts and not column.spare]
    return {word for row in table.cells() for index in kept for word in row[index].split()} | set(table.title.split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RUNS)
def test_tables_of_recorded_studies_fit_with_whole_words(name, width):
    run = Recorded(name)
    run.now = run.ended
    jobs = run.jobs("")
    for table in (results.trials_table(run.row, jobs), results.top_table(run.row, jobs)):
        text = printed(table, width)
        check_whole(text, words_of(table), width)
        assert "R²" in text and ("NMSE ┃" in text or "NMSE" in text.split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RUNS)
def test_the_display_of_a_recorded_run_fits_at_every_moment(name, width):
    run = Recorded(name)
    for second in range(0, int(run.ended), 2):
        progress = run.at(second)
        lines = printed(View(progress=progress, trouble="database lost, retrying"), width).splitlines()
        assert max(map(len, lines)) <= width
        assert lines[0].strip() == run.row.name, "the name alone, whole"
        assert "  " + ", ".join(progress.counts()) in [line.rstrip() for line in lines], "counts on one line"
        assert all(f"epoch {job.epochs}/" in "\n".join(lines) for job in progress.running)
        assert "()" not in "\n".join([progress.line(), *lines])


def test_a_narrow_display_leaves_out_what_matters_least():
    run = Recorded("tpe")
    progress = run.at(24)
    wide, middle, narrow = (printed(View(progress=progress), width) for width in (120, 80, 50))
    assert wide.count("epochs/s") == 3 and middle.count("epochs/s") == 1, "that of all trials stays"
    assert middle.count("val NMSE") == narrow.count("val NMSE") == 3 and "…" in narrow
    assert max(map(len, narrow.splitlines())) <= 50


@pytest.mark.parametrize(("name", "before"), [("grid", 10.0), ("second-phase", 15.0)])
def test_before_the_first_epoch_no_speed_is_made_up(name, before):
    line = Recorded(name).at(before).line()
    assert "epochs/s" not in line and line.endswith("time left: measuring")


TEXT = st.text("abc_é漢-", min_size=1, max_size=12)
NAMES = st.lists(TEXT, min_size=1, max_size=14)
SENTENCES = st.lists(TEXT, max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.data(), NAMES, st.sampled_from(WIDTHS))
def test_no_line_of_any_table_is_wider_than_the_terminal(data, names, width):
    kinds = [data.draw(st.sampled_from(["number", "text", "cut", "spare"])) for _ in names]
    columns = [
        Column(name=str(index), label=name, left=kind != "number", cuts=kind == "cut", spare=kind == "spare")
        for index, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    values = [st.floats(-1e4, 1e4) if kind == "number" else SENTENCES for kind in kinds]
    rows = data.draw(st.lists(st.tuples(*values), min_size=1, max_size=4))
    table = Table(
        title="t",
        columns=columns,
        rows=[Row(values={str(index): value for index, value in enumerate(row)}) for row in rows],
    )
    text = printed(table, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert words_of(table) <= set(re.split(r"[\s│┃]+", text))


def test_in_a_pipe_each_row_is_one_line_and_nothing_is_cut():
    run = Recorded("tpe")
    run.now = run.ended
    lines = tables.text(results.trials_table(run.row, run.jobs(""))).splitlines()
    assert len([line for line in lines if "pruned by SuccessiveHalvingPruner at epoch" in line]) == 15


def test_long_reasons_are_cut_unless_all_is_asked_for():
    run = Recorded("tpe")
    run.now = run.ended
    table = results.trials_table(run.row, run.jobs(""))
    assert "pruned by…" in printed(table, 80) and "at epoch 60" not in printed(table, 80)
    assert printed(tables.uncut(table), 80).count("SuccessiveHalvingPruner") == 15


def test_trials_are_listed_best_first_or_as_asked():
    run = Recorded("grid")
    run.now = run.ended
    jobs = run.jobs("")

    def column(name: str, **options) -> list:
        return [row.values[name] for row in results.trials_table(run.row, jobs, **options).rows]

    assert column("NMSE") == sorted(column("NMSE")) and len(column("NMSE")) == 12
    assert column("NMSE", top=3) == column("NMSE")[:3]
    assert column("number", sort="number") == list(range(12))
    assert column("point.filters", sort="filters") == [4] * 4 + [8] * 4 + [16] * 4
    search = Recorded("tpe")
    search.now = 30.0
    states = [row.values["state"] for row in results.trials_table(search.row, search.jobs("")).rows]
    assert states == sorted(states, key=["done", "waiting", "running", "diverged", "pruned"].index)
    with pytest.raises(
        SettingsError, match=r"--sort: expected one of score, number.*found 'filter'. Did you mean 'filters'"
    ):
        results.trials_table(run.row, jobs, sort="filter")


def test_numbers_of_a_column_have_the_same_decimals():
    assert tables.numbers_text([0.05123456, 0.8, 1.2e-4]) == ["0.05123", "0.80000", "0.00012"]
    assert tables.numbers_text([0.95, -0.0006812], "R²") == ["0.9500", "-0.0007"]
    assert tables.numbers_text([1234567, 3.0, None, "same"]) == ["1,234,567", "3", "–", "same"]
    assert tables.numbers_text([float("nan"), 12345.678, 54321.0]) == ["–", "12,346", "54,321"]


def test_a_run_says_how_long_everything_takes_and_how_to_get_a_first_result():
    progress = Recorded("grid").at(20.0)
    (line,) = announcement(progress, [], ["run", "--study", "grid.toml"], program="hpo")
    assert re.fullmatch(r"Everything \(12 trials\) takes about \d+ s more with 2 trainers, until \d\d:\d\d\.", line)
    slow = Recorded("grid")
    for job in slow.facts["jobs"]:
        job["planned"] = job["planned"] and 60_000
    words = ["run", "--study", "grid.toml", "--epochs", "60000", "--set", "training.epochs=60000", "--data", "a b"]
    first, second = announcement(slow.at(20.0), [], words, program="hpo")
    assert re.search(r"takes about \d+ h \d\d min more", first)
    assert re.fullmatch(r"A first result in about 10 min: hpo run --study grid.toml --data 'a b' --epochs \d+", second)
    assert int(second.split()[-1]) < 6000
    assert announcement(Recorded("grid").at(5.0), [], [], program="hpo")[0].startswith(
        "How long everything takes is not"
    )


def test_nothing_is_said_of_the_time_once_all_is_trained():
    progress = SimpleNamespace(seconds_left=0.0, forecast=None, jobs=[])
    assert announcement(progress, [], [], program="hpo") == []


def test_a_table_that_is_wider_than_a_sheet_is_several_and_none_is_wider():
    heads = ["model", *(f"a_parameter_{index}" for index in range(30))]
    records = [{head: 0.001234 * index for index, head in enumerate(heads)} | {"model": "a name of some words"}]
    page = tables.html(tables.of_records(records, title="t"))
    parts = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert 3 <= len(parts) <= 6 and all(part.count(">model</th>") == 1 for part in parts)
    assert page.count("a_<wbr>parameter_<wbr>") == 30, "each column once"
    assert len(re.findall("<table>", tables.html(tables.of_records(records, title="t", keys=heads[:5])))) == 1


def test_a_table_without_a_column_is_a_page_all_the_same():
    empty = Table(title="", columns=[], rows=[])
    assert "<table>" in tables.html(empty) and tables.markdown(empty).startswith("|")


def test_a_study_of_one_configuration_has_no_empty_brackets():
    assert in_brackets("", "") == "" and in_brackets("f8 k5", "") == " (f8 k5)"
    assert in_brackets("", "not pretrained") == " (not pretrained)"


def test_a_study_that_nobody_trains_measures_nothing():
    progress = Recorded("grid").at(10.0)
    progress.workers, progress.paces = [], {}
    progress.jobs = [replace(job, state=State.WAITING) for job in progress.jobs]
    assert progress.line().endswith("no worker is here")


@pytest.mark.parametrize(
    ("unit", "square"),
    [
        ("GPa", "GPa²"),
        ("label unit", "label unit²"),
        ("W/(m K)", "(W/(m K))²"),
        ("m²", "(m²)²"),
        ("log10 S/m", "(log10 S/m)²"),
    ],
)
def test_the_square_of_a_compound_unit_has_parentheses(unit, square):
    assert squared(unit) == square
