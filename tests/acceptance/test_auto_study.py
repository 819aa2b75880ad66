"""`hpo run --study auto` as users run it: it goes on after kill -9 and Ctrl-C, keeps its champion and its budget."""

import re
import shlex
import signal
import time
from pathlib import Path

import cells
import pytest
from mlflow import MlflowClient
from shell import PATIENCE, check_recorded_once, clock, mirrored, until_ended

from hpo.operations import invariants

pytestmark = pytest.mark.acceptance

HOUR = 3600.0


def champion(shell) -> str | None:
    """The run of the version that is champion; None if there is none."""
    client, planned = MlflowClient(shell.tracking_uri), steps(shell)
    for model in client.search_registered_models() if planned else ():
        if model.name.startswith(planned[0].facts.model_name) and "champion" in model.aliases:
            return client.get_model_version_by_alias(model.name, "champion").run_id
    return None


def steps(shell) -> list:
    rows = [row for row in shell.queue.studies() if row.facts.auto is not None]
    return sorted(rows, key=lambda row: row.facts.auto.number)


def spent(shell) -> float:
    """Seconds, by all calls."""
    return sum(row.facts.auto_seconds or 0.0 for row in steps(shell))


@pytest.mark.slow
def test_a_search_within_a_budget_survives_kill_and_interrupt_and_goes_on(shell, tmp_path):
    data = cells.make(tmp_path / "tiny", seed=7)
    words = ("run", "--study", "auto", "--data", data, "--trainers", 1, "--max-hours")
    first = shell.start(*words, 0.4)
    networks = lambda: next((row for row in steps(shell) if row.facts.auto.round), None)  # noqa: E731
    row = shell.until(networks, "the search of networks")
    before = champion(shell)
    assert before, "descriptors are champion before the first network is trained"
    shell.until(lambda: any(job.alive and job.epochs > 5 for job in shell.trials(row.name)), "a network in training")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert champion(shell) == before and spent(shell) > 0

    second = shell.start(*words, 0.4)
    shell.until(lambda: any(f":{second.pid}-" in each.name for each in shell.queue.workers(row.name)), "the study")
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 130 and "what is done is kept. The same command goes on." in output, output
    assert champion(shell) == before and networks().name == row.name, "no step was planned twice"

    left = 45.0  # seconds
    hours = (spent(shell) + left) / HOUR
    third, begin = shell.start(*words, hours), time.monotonic()
    until_ended(third)
    took = clock(third) - begin
    output, _ = third.communicate()
    assert third.returncode == 0, output
    assert took <= left + 240.0, f"the hours of all calls count, on a busy machine too: {output}"
    planned = steps(shell)
    assert [one.facts.auto.number for one in planned] == list(range(1, len(planned) + 1))
    assert "@champion is tiny-" in output and "Steps, scores on the validation split" in output
    page = Path(re.search(r"Page: (\S+)", output).group(1))
    assert "How it was found" in page.read_text(encoding="utf-8")
    for one in planned:
        with mirrored(shell, one.name) as shown:
            assert invariants.check(shown) == []

    results = {one.name: [job.result for job in shell.trials(one.name)] for one in planned}
    assert "Finished: " in shell.hpo(*words, hours)
    assert {name: [job.result for job in shell.trials(name)] for name in results} == results, "nothing is trained"
    more = shell.start(*words, 0.4)
    here = lambda row: any(f":{more.pid}-" in each.name for each in shell.queue.workers(row.name))  # noqa: E731
    shell.until(lambda: here(steps(shell)[-1]), "more hours, more training")
    more.send_signal(signal.SIGINT)
    assert more.wait(PATIENCE) == 130


@pytest.mark.long
def test_each_step_is_a_study_that_its_command_repeats_without_auto(shell, tmp_path):
    data = cells.make(tmp_path / "tiny", seed=8)
    search = shell.start("run", "--study", "auto", "--data", data, "--trainers", 1)
    name = shell.until(lambda: next((row.name for row in steps(shell)), None), "the first step")
    shell.until(lambda: len(steps(shell)) > 1, "the next step")
    assert champion(shell)
    search.send_signal(signal.SIGINT)
    assert search.wait(PATIENCE) == 130
    assert name.startswith("descriptors+")
    check_recorded_once(shell, name, points=3, epochs=1)
    words = shlex.split(shell.json("show", name)["command"].partition("&& hpo ")[2])
    assert name in shell.hpo(*words)
    assert {job.attempt for job in shell.trials(name)} == {1}, "it is the same study, which is closed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "3"), "--study auto and --epochs: expected one of them, found both"),
        (("--set", "training.epochs=3"), "--study auto and --set: expected one of them"),
        (("--dry-run",), "--study auto and --dry-run: expected one of them"),
        (("--on", "slurm"), "--study auto and --on: expected one of them"),
        (("--until", "nmse=1"), "--study auto and --until: expected one of them"),
        (("--max-hours", "-1"), "--max-hours: expected at least 0, found -1"),
        (("--data", "/nowhere"), "/nowhere"),
    ],
)
def test_what_a_search_within_a_budget_does_not_take_gets_one_message(shell, words, message):
    output = shell.hpo("run", "--study", "auto", *words, code=1)
    assert message in output and output.startswith("hpo: ")
    assert not shell.queue.installed(), "nothing was started or written"
