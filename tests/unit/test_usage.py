"""Wrong usage of a command is one message with the word that was meant perhaps, and exit code 2."""

import os
import subprocess
import sys

import pytest
import records

from hpo import api
from hpo.cli import main
from hpo.operations import work

CASES = {
    "stat": "hpo: COMMAND: expected one of run, worker, ",
    "stat --json": "found 'stat'. Did you mean 'status'? `hpo --help` shows what there is.",
    "data mak x": "one of make, check, found 'mak'. Did you mean 'make'? `hpo data --help` shows what there is.",
    "run --study grid --device cdua": "--device: expected one of cpu, auto, cuda, found 'cdua'. Did you mean 'cuda'?",
    "run --study grid --epohcs 3": "unexpected: --epohcs 3. Did you mean '--epochs'? `hpo run --help`",
    "run --study=grid --retyr=1": "unexpected: --retyr=1. Did you mean '--retry'?",
    "--vresion": "unexpected: --vresion. Did you mean '--version'? `hpo --help`",
    "studies grid": "hpo: unexpected: grid. `hpo studies --help` shows what there is.",
    "run": "hpo: the following arguments are required: --study. `hpo run --help` shows what there is.",
}


@pytest.mark.parametrize(("words", "expected"), CASES.items(), ids=list(CASES))
def test_wrong_usage_is_one_message_and_exit_code_2(capsys, words, expected):
    with pytest.raises(SystemExit) as error:
        main.main(words.split())
    output = capsys.readouterr()
    assert error.value.code == 2 and output.out == "" and output.err.count("\n") == 1
    assert expected in output.err


@pytest.mark.parametrize("failed", [{}, {"1": "no driver.", "3": "no answer"}], ids=["sound", "two GPUs failed"])
def test_gpus_that_failed_beside_others_are_named_and_the_exit_code_is_1(capsys, monkeypatch, failed):
    outcome = work.Outcome(row=records.study_row("s"), closed=False, failed_gpus=failed)
    monkeypatch.setattr(api, "worker", lambda *_, **__: outcome)
    assert main.main(["worker", "--study", "s"]) == bool(failed)
    error = capsys.readouterr().err
    assert error.count("\n") == bool(failed) and ("GPU 1 failed: no driver; GPU 3 failed: no answer." in error) == bool(
        failed
    )


def test_warnings_of_other_packages_are_no_errors_of_hpo(tmp_path):
    """MLflow warns when it is imported without docstrings; `hpo doctor` imports it, and finds no services."""
    strict = {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "HPO_HOME": str(tmp_path / "home")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "MLFLOW_"))}
    command = [sys.executable, "-m", "hpo", "doctor"]
    ended = subprocess.run(command, env=kept | strict, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("hpo: The services of")
