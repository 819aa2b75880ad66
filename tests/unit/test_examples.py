"""The examples are what their script makes, small, and go from the folder to a prediction."""

import importlib.util
import re

import numpy as np
import pytest
import trained
from places import ROOT

from data_pipeline.dataset import load
from hpo.cli.main import main
from hpo.operations.predict import predict

EXAMPLES = ROOT / "examples"
IMAGES = {
    "stiffness": "images/cell_003.png",
    "electrode": "sections/e00_s3.png",
    "fibres": "cells.npz:images[3]",
}


@pytest.fixture(scope="module")
def make():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("examples_make", EXAMPLES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", IMAGES)
def test_an_example_is_small_and_made_by_its_script(make, name, tmp_path):
    files = [path for path in (EXAMPLES / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    getattr(make, name)(tmp_path / name)
    (tmp_path / name / "dataset.toml").write_bytes((EXAMPLES / name / "dataset.toml").read_bytes())
    shipped, again = load(EXAMPLES / name), load(tmp_path / name)
    assert again.names == shipped.names
    # Another processor rounds otherwise: single pixels may lie on the other side of a threshold.
    assert np.abs(again.images - shipped.images).mean() < 1e-3
    assert np.allclose(again.targets, shipped.targets, rtol=0.02, atol=0.02)


def test_the_conductivity_of_layers_is_that_of_the_closed_form(make):
    cell = np.ones((8, 8))
    cell[:, ::2] = 10
    assert np.allclose(make.conductivity(cell), [[2 / (1 + 1 / 10), 0], [0, 5.5]])
    assert np.allclose(make.conductivity(cell.T), [[5.5, 0], [0, 2 / (1 + 1 / 10)]])


def test_the_stated_symmetries_of_the_fibres_are_those_of_the_solver(make):
    data = load(EXAMPLES / "fibres")
    assert data.symmetries == {"flip_horizontal": (0, ~1, 2), "flip_vertical": (0, ~1, 2), "transpose": (2, 1, 0)}
    cell = np.where(data.images[5, 0] > 0.5, 20.0, 1.0)
    k11, k12, k22 = data.targets[5]
    for moved, expected in (
        (cell[:, ::-1], (k11, -k12, k22)),
        (cell[::-1], (k11, -k12, k22)),
        (cell.T, (k22, k12, k11)),
    ):
        tensor = make.conductivity(moved)
        assert np.allclose((tensor[0, 0], tensor[0, 1], tensor[1, 1]), expected, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", IMAGES)
def test_an_example_goes_from_check_to_predict(name, tmp_path, capsys):
    assert main(["data", "check", str(EXAMPLES / name)]) == 0
    data = load(EXAMPLES / name)
    ended = trained.network(data, tmp_path, epochs=20)
    assert ended.best_val_nmse < 0.7  # of the variance: it has learned
    frame = predict(tmp_path / "trial" / "model", [EXAMPLES / name / IMAGES[name]])
    assert np.isfinite(frame.iloc[0, 1:].to_numpy(np.float64)).all() and frame["image"][0].endswith(IMAGES[name])
    assert list(frame.columns[1:]) == list(data.description.layout.targets)


def test_the_tutorial_shows_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "tutorial" / "own-images.md").read_text(encoding="utf-8")
    command, output = re.search(r"```console\n\$ hpo (.*?)\n(.*?)```", page, re.DOTALL).groups()
    assert main(command.split()) == 0
    assert capsys.readouterr().out == output
