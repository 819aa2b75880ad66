"""`import hpo` in a kernel of Jupyter: the notebook of the documentation, and a kernel that is interrupted."""

import os
import time

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient
from places import ROOT

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]
NOTEBOOK = ROOT / "docs" / "tutorial" / "notebook.ipynb"
PATIENCE = 300  # seconds


def test_the_notebook_runs_and_an_interrupted_kernel_keeps_what_is_done(shell, tmp_path, monkeypatch):
    for name, value in shell.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in book.cells[5:] if cell.cell_type == "code"), "it is shown with its outputs"
    NotebookClient(book, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    output = str([cell.get("outputs") for cell in book.cells])
    assert "baseline" in output and "kx_true" in output and "\x1b" not in output and "\\x1b" not in output
    network = next(name for name in (row.name for row in shell.queue.studies()) if name.startswith("baseline"))
    assert [job.state.label for job in shell.trials(network)] == ["done"]
    text = "".join(str(cell.get("outputs")) for cell in book.cells if cell.source == "network")
    assert "R² descriptors" in text and "volume fraction" in text, "no score stands alone"

    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path), env=dict(os.environ))
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        client.execute("import hpo\nstudy = hpo.run('baseline', data='layers', epochs=100000, trainers=1)")
        names = {network}
        deadline = time.monotonic() + PATIENCE
        while not any(job.epochs for name in names - {network} for job in shell.trials(name)):
            assert time.monotonic() < deadline
            time.sleep(0.5)
            names = {row.name for row in shell.queue.studies() if row.name.startswith("baseline")}
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=PATIENCE)
        assert reply["content"]["status"] == "ok", "an interruption is no error"
        reply = client.execute_interactive(
            "assert study.state == 'interrupted', study.state\nassert len(study.trials()) == 1", timeout=PATIENCE
        )
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
