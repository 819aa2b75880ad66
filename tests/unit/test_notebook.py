"""`import hpo` in a notebook: data from arrays and frames, and what does not fit together."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from places import ROOT

import hpo
from data_pipeline.dataset import load
from data_pipeline.errors import DatasetError
from data_pipeline.phase import Phase
from hpo.errors import ModelError
from hpo.operations import arrays
from hpo.report import tables

N = 24


@pytest.fixture
def images():
    return np.random.default_rng(3).integers(0, 256, (N, 12, 12), dtype=np.uint8)


def labels(images):
    return pd.DataFrame({"E": images.mean((1, 2)) * 1.5, "nu": 0.3 - images.std((1, 2)) / 1e4})


def test_import_brings_nothing_but_names_and_there_are_twelve_at_most():
    code = "import sys, hpo; print(len(hpo.__all__), *{'torch', 'mlflow', 'numpy', 'pandas'} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert int(printed[0]) <= 12 and not printed[1:]
    from hpo import notebook

    assert hpo.__all__ == notebook.__all__ and all(getattr(hpo, name).__doc__ for name in hpo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'ruin'"):
        hpo.ruin  # noqa: B018


def test_arrays_and_frames_become_a_data_set_of_the_same_numbers(images, tmp_path):
    inputs = pd.DataFrame({"temperature": np.linspace(20, 400, N)}, index=range(5, 5 + N))
    folder = hpo.dataset(tmp_path / "cells", images, labels(images), inputs=inputs, unit="GPa", range=[0, 255])
    data = load(folder)
    assert data.unit == "GPa" and data.target_names == ("E", "nu") and data.input_names == ("temperature",)
    assert np.array_equal(data.images[:, 0] * np.float32(255), images.astype(np.float32))
    assert np.array_equal(data.targets, labels(images).to_numpy())
    assert np.array_equal(data.inputs[:, 0], inputs["temperature"].to_numpy())


def test_pictures_truth_values_and_numbers_by_name_are_taken(images, tmp_path):
    stiff, soft = Phase(210.0, 0.3), Phase(70.0, 0.3)
    pictures = [Image.fromarray(image) for image in images]
    grey = load(hpo.dataset(tmp_path / "grey", pictures, {"E": list(range(N))}, range=[0, 255]))
    assert np.array_equal(grey.images[:, 0] * np.float32(255), images.astype(np.float32))
    bits = hpo.dataset(tmp_path / "bits", images > 128, pd.Series(range(N), name="E"), levels="phases", colours=[0, 1])
    assert set(np.unique(load(bits).images)) == {0, 1}
    sides = {"side": ["training"] * 16 + ["validation"] * 4 + ["test"] * 4}
    split = load(hpo.dataset(tmp_path / "split", images, labels(images), columns=sides, split="side")).split
    assert list(split.test) == [20, 21, 22, 23]
    assert load(hpo.dataset(tmp_path / "two", images, {"E": range(N)}, phases={"matrix": soft, "inclusion": stiff}))


def test_a_cell_of_a_notebook_may_run_twice_but_other_data_replace_nothing(images, tmp_path):
    folder = hpo.dataset(tmp_path / "cells", images, labels(images))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    hpo.dataset(folder, images, labels(images))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(DatasetError, match="holds something else already"):
        hpo.dataset(folder, images, labels(images) * 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="holds something else already"):
        hpo.dataset(tmp_path / "mine", images, labels(images))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_a_killed_call_left_is_written_again(images, tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / arrays.IMAGES).write_bytes(b"half")
    assert len(load(hpo.dataset(tmp_path / "cells", images, labels(images))).images) == N


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": {"E": [1.0, 2.0]}}, "targets: expected a row for each of the 24 images, found 2 rows"),
        ({"inputs": {"T": [1.0]}}, "inputs: expected a row for each of the 24 images, found 1 rows"),
        ({"targets": np.ones((N, 2))}, "targets: expected columns with names"),
        ({"targets": {"E": [1.0], "nu": [1.0, 2.0]}}, "targets: expected a frame, or numbers by name"),
        ({"inputs": {"E": range(N)}}, "E is there twice"),
        ({"images": np.ones((N, 12))}, "images: expected numbers of the shape"),
        ({"images": [np.ones((4, 4)), np.ones((5, 4))]}, "Image 1 is of the shape"),
        ({"levls": "grey"}, "No key of data is called levls.*Did you mean 'levels'"),
        ({"table": "x.csv"}, "No key of data is called table"),
        ({"levels": "gray"}, "dataset: levels: expected"),
        ({"targets": {"E": ["high"] * N}}, "targets: E: expected numbers, found 'high'"),
    ],
)
def test_what_does_not_fit_together_is_said_and_leaves_nothing(images, tmp_path, change, message):
    given = {"images": images, "targets": labels(images)} | change
    with pytest.raises(DatasetError, match=message):
        hpo.dataset(tmp_path / "cells", **given)
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize("wrong", [np.ones((1, 4, 4)), np.full((1, 4, 4), 256), np.full((1, 4, 4), -1)])
def test_a_model_of_pictures_takes_no_other_numbers(tmp_path, wrong):
    with pytest.raises(ModelError, match=r"whole numbers 0\.\.255"):
        arrays.write_pictures(tmp_path, wrong)


def test_a_table_is_plain_text_in_files_also_under_a_kernel_or_with_colours_forced(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = tables.of_records([{"name": "E", "NMSE": 0.25}] * 3, name="x", title="A table", note="")
    text = tables.text(table)
    assert "A table" in text and text.count("0.25") == 3 and "\x1b" not in text
