"""What the display makes of the queue, and how tables are printed."""

import io
from contextlib import closing

import pytest
import records
from rich.console import Console

from hpo.machine import now_ms
from hpo.queue import AttemptOutcome, NewJob, Queue
from hpo.report import progress, tables
from hpo.report.display import View
from hpo.report.progress import Progress

SPEC, CANONICAL = (of(training={"epochs": 10}) for of in (records.spec, records.canonical))


def test_the_time_left_counts_trials_not_chosen_yet_and_those_that_end_early(database_url):
    with closing(Queue(database_url)) as queue:
        queue.install()
        queue.put_study(records.study_row("s", canonical=CANONICAL))
        slots = [NewJob(kind="trial", number=number, spec=None if number > 1 else SPEC) for number in range(6)]
        queue.put_jobs("s", slots)
        shown = Progress(queue, queue.study("s"))
        shown.refresh()
        assert shown.seconds_left is None, "nothing is known"

        begin = now_ms() - 30_000

        def epochs(job, count: int, seconds: float) -> None:
            times = [(n, begin + int(1000 * seconds * n)) for n in range(1, count + 1)]
            queue.add_epochs(job, [(n, at, {"val/nmse": 1.0, "seconds": seconds}) for n, at in times])

        first, second = (queue.claim("s", worker="w", lease=60) for _ in range(2))
        epochs(first, 4, 2.0)
        epochs(second, 5, 4.0)
        shown.refresh()
        # two trainers: 6 * 2 s and 5 * 4 s, then four trials of 10 * 3 s; the first record of each takes 10 s, others 2
        assert shown.seconds_left == pytest.approx(94 + shown.forecast.closing_seconds)
        assert shown.rate == pytest.approx(1 / 2 + 1 / 4)

        queue.end(first, "pruned", result={"epoch": 4}, reason="worse than others")
        shown.refresh()
        assert 100 < shown.seconds_left < 140, "others are taken to end early, too: else it were at least 154 s"


def test_a_display_that_looks_again_shows_what_one_that_looks_first_shows(database_url, monkeypatch):
    monkeypatch.setattr(progress, "OVERLAP", 0.5)  # seconds
    with closing(Queue(database_url)) as queue:
        queue.install()
        queue.put_study(records.study_row("looks", canonical=CANONICAL))
        trials = [NewJob(kind="trial", number=number, cost=9.0 - number, spec=SPEC) for number in range(6)]
        queue.put_jobs("looks", [*trials, NewJob(kind="closing", number=-1)])
        with queue.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE hpo.job SET changed_at = '2000-01-01'")
        kept = Progress(queue, queue.study("looks"))

        def look() -> None:
            kept.refresh()
            first = Progress(queue, queue.study("looks"))
            first.refresh()
            assert kept.jobs == first.jobs and kept.closing == first.closing
            assert kept.paces == first.paces and kept.counts() == first.counts()

        def epochs(job, *values: float) -> None:
            rows = enumerate(values, start=1)
            queue.add_epochs(job, [(n, n * 1000, {"val/nmse": value, "seconds": 1.0}) for n, value in rows])

        look()
        assert len(queue.jobs("looks", after=kept.now)) == 1, "the closing alone is read again"
        done, dead, back = (queue.claim("looks", worker="w", lease=60) for _ in range(3))
        look()
        for job in (done, dead, back):
            epochs(job, 0.9, 0.8)
        look()
        queue.cut(back, 0)
        look()
        queue.end(done, "done", result=records.result(0.8))
        queue.give_back(dead, AttemptOutcome.NOT_RECORDED, reason="why")
        queue.cancel("looks", 5, None, by="anna")
        look()
        with queue.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE hpo.job SET lease_until = '2000-01-01' WHERE id = {back.id}")
        look()
        queue.revive("looks", trials=True)
        queue.undo_cancel("looks", 5, None)
        queue.expire("looks", lease=0)
        look()


def test_a_trial_on_a_card_is_shown_with_its_host_card_and_speed(database_url):
    with closing(Queue(database_url)) as queue:  # no card is needed: the device of an attempt is what its worker said
        queue.install()
        queue.put_study(records.study_row("placed", canonical=CANONICAL))
        queue.put_jobs("placed", [NewJob(kind="trial", number=number, spec=SPEC) for number in range(3)])
        for worker, device in (("n1:1-ab", "cuda:1"), ("n1:1-ab", "cuda:0"), ("n2:7-cd", "cpu")):
            job = queue.claim("placed", worker=worker, device=device, lease=60)
            queue.add_epochs(job, [(1, 1000, {"val/nmse": 1.0, "seconds": 0.5})])
        for worker, device, trainers in (("n1:1-ab", "cuda", 2), ("n2:7-cd", "cpu", 1)):
            queue.attend(worker, "placed", trainers=trainers, device=device, stops=0, lease=60)
        progress = Progress(queue, queue.study("placed"))
        progress.refresh()
        console = Console(file=io.StringIO(), width=120)
        console.print(View(progress=progress))
        lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
        trials = [line for line in lines if "epoch 1/10" in line]
        assert [line.partition("epochs/s")[2].strip() for line in trials] == ["cuda:1", "cuda:0", ""]
        assert all("2.0 epochs/s" in line for line in trials)
        assert [line.split(":")[0] for line in lines if "trainer" in line] == ["n1", "n2"]
        devices = [[trial["device"] for trial in worker["trials"]] for worker in progress.as_dict()["workers"]]
        assert devices == [["cuda:1", "cuda:0"], ["cpu"]]


def test_a_table_breaks_no_row_in_a_file_and_no_number_on_a_terminal():
    numbers = [f"{(column + 1) * 1.2345678e-3:.9f}" for column in range(15)]
    heads = ["name", *[f"parameter_{column:010d}" for column in range(14)], "seconds an epoch"]
    lines = [dict(zip(heads, [f"row {index}", *numbers], strict=True)) for index in range(3)]
    table = tables.of_records(lines, title="")
    for console in (Console(file=io.StringIO(), width=120), Console(file=io.StringIO(), width=80, force_terminal=True)):
        tables.print_table(console, table)
        text = console.file.getvalue()
        assert all(text.count(number) == 3 for number in numbers)
        rows = 3 if console.is_terminal else 1  # where the columns do not fit beside each other, each row is a list
        assert text.count("parameter_00000000") == 14 * rows, "nor a word of the head"
        assert console.is_terminal or len(text.splitlines()) == 3 + 4, "borders, the head, and a line a row"
