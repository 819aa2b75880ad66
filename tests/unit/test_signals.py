"""SIGTERM ends every command as Ctrl-C does, in the first process of a container, too."""

import subprocess
import sys
import time

import psutil
import pytest

FIRST_OF_ITS_CONTAINER = ["unshare", "--fork", "--pid", "--kill-child"]


def first_of_its_container() -> list[str]:
    """Words in front of a command; none where that is not allowed."""
    try:
        is_allowed = subprocess.run([*FIRST_OF_ITS_CONTAINER, "true"], capture_output=True).returncode == 0
    except OSError:
        is_allowed = False
    return FIRST_OF_ITS_CONTAINER if is_allowed else []


@pytest.mark.slow
def test_a_command_ends_at_sigterm_with_one_line_and_exit_code_130(tmp_path):
    before, folder = first_of_its_container(), tmp_path / "cells"
    command = [*before, sys.executable, "-m", "hpo", "data", "make", str(folder), "--count", "400", "--size", "48"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not list(folder.glob("**/*.png")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        worker = psutil.Process(process.pid).children()[0] if before else process
        worker.terminate()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and output.endswith("Interrupted.\n") and "Traceback" not in output, output
