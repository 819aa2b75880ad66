"""The synthetic data set: the same for the same seed, resumable, and the shipped one can be made again."""

import csv
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_pipeline.components import COMPONENTS, COUPLINGS, vector
from data_pipeline.dataset import DEFAULT, DatasetError, check, load
from data_pipeline.homogenize import Phase, homogenize
from data_pipeline.morphology import MIXTURE, draw
from data_pipeline.synthesize import INCLUSION, MATRIX, make
from hpo.cli import main

SMALL = {"count": 4, "size": 48, "seed": 7}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "dataset.toml"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of four cells, made in this process alone."""
    folder = tmp_path_factory.mktemp("made") / "small"
    assert list(make(folder, **SMALL, processes=1)) == [0, 1, 2, 3, 4]
    return folder


def side_file(folder: Path) -> list[dict[str, str]]:
    with (folder / "cells.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- the shipped set ---


@pytest.mark.parametrize("index", [0, 5, 207, 519])  # one of each morphology
def test_a_cell_of_the_shipped_set_comes_out_again(index):
    recipe = tomllib.loads((DEFAULT / "dataset.toml").read_text())
    shipped, row = load(DEFAULT), side_file(DEFAULT)[index]
    print(f"cell {index} of seed {recipe['made']['seed']}")
    cell = draw(recipe["made"]["seed"], index, size=recipe["made"]["size"])
    assert np.array_equal(cell.image, shipped.images[index, 0] == 1)
    assert row["image"] == shipped.names[index] == f"{index}_{cell.morphology}.png"
    tensor = homogenize(
        cell.image,
        matrix=Phase(**recipe["phases"]["matrix"]),
        inclusion=Phase(**recipe["phases"]["inclusion"]),
        subdivisions=2,
    )
    assert np.allclose(vector(tensor), shipped.targets[index], rtol=1e-9, atol=0)
    couplings = [float(row[name]) for name in COUPLINGS]
    assert np.allclose(vector(tensor, COUPLINGS), couplings, rtol=0, atol=1e-9 * tensor.max())


def test_the_shipped_set_is_the_frozen_mixture_of_the_default_phases():
    recipe = tomllib.loads((DEFAULT / "dataset.toml").read_text())
    assert recipe["made"] == {"recipe": 1, "seed": 0, "count": 520, "size": 64}
    assert recipe["phases"]["matrix"] == {"young_modulus": 3.5, "poisson_ratio": 0.35}
    assert recipe["phases"]["inclusion"] == {"young_modulus": 70.0, "poisson_ratio": 0.22}
    rows = side_file(DEFAULT)
    assert Counter(row["morphology"] for row in rows) == {
        "isotropic": 208,
        "anisotropic": 156,
        "particles": 104,
        "bands": 52,
    }
    fractions = np.array([float(row["volume_fraction"]) for row in rows])
    assert np.allclose(fractions, load(DEFAULT).images.mean(axis=(1, 2, 3)), atol=1e-6)
    assert fractions.min() >= 0.09 and fractions.max() <= 0.91
    counts = np.histogram(fractions, bins=8, range=(0.09, 0.91))[0]
    assert np.sum((counts - 65) ** 2 / 65) < 24.3  # chi-squared, 7 degrees of freedom, 1 in 1,000


def test_the_side_file_repeats_the_labels_and_bounds_their_uncertainty():
    rows, shipped = side_file(DEFAULT), load(DEFAULT)
    assert len(rows) == 520
    assert np.array_equal([[float(row[name]) for name in COMPONENTS] for row in rows], shipped.targets)
    uncertainty = np.array([float(row["label_uncertainty"]) for row in rows])
    assert 0 < np.median(uncertainty) < 0.01 and uncertainty.max() < 0.02


def test_the_shipped_set_is_a_few_hundred_kilobytes():
    assert 100_000 < sum(path.stat().st_size for path in DEFAULT.iterdir()) < 600_000


def test_no_shipped_cell_has_corner_contacts_noise_or_islands():
    for row, image in enumerate(load(DEFAULT).images[:, 0] == 1):
        right, below = np.roll(image, -1, 1), np.roll(image, -1, 0)
        corner = (image == np.roll(right, -1, 0)) & (right == below) & (image != right)
        assert not corner.any(), f"cell {row} has features that touch at a corner only"
        for phase in (image, ~image):
            # Nothing thinner than three pixels: an opening by a plus of five pixels leaves nearly all of the phase.
            padded = np.pad(phase, 4, mode="wrap")
            opened = ndimage.binary_opening(padded, ndimage.generate_binary_structure(2, 1))[4:-4, 4:-4]
            assert (phase & ~opened).sum() <= 0.02 * phase.sum() + 8, f"cell {row} has features below three pixels"


# --- drawing ---


@pytest.mark.parametrize("index", range(10))
def test_a_drawn_cell_keeps_its_morphology_and_volume_fraction_range(index):
    print("seed 3")
    cell = draw(3, index, size=48)
    assert cell.morphology == MIXTURE[index]
    assert cell.image.shape == (48, 48) and cell.image.dtype == np.bool_
    assert 0.09 <= cell.image.mean() <= 0.91
    assert np.array_equal(cell.image, draw(3, index, size=48).image)
    assert not np.array_equal(cell.image, draw(4, index, size=48).image)


# --- making ---


def test_what_is_made_can_be_loaded_and_holds_what_was_computed(made):
    assert check(made) == []
    dataset = load(made)
    assert dataset.unit == "GPa"
    assert dataset.name == "small"
    assert dataset.description.recipe == {"recipe": 1, "seed": 7, "count": 4, "size": 48}
    image = dataset.images[3, 0] == 1
    assert np.array_equal(dataset.targets[3], vector(homogenize(image, matrix=MATRIX, inclusion=INCLUSION)))
    coarse = vector(homogenize(image, matrix=MATRIX, inclusion=INCLUSION, subdivisions=1))
    uncertainty = float(side_file(made)[3]["label_uncertainty"])
    assert uncertainty == pytest.approx(np.max(np.abs(coarse / dataset.targets[3] - 1)), rel=1e-3)
    first = (made / "1-4_Cij_pbc.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in first] == ["1", "2", "3", "4"]
    with Image.open(made / "0_isotropic.png") as file:
        assert file.mode == "L"


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(made, tmp_path):
    assert list(make(tmp_path / "two", **SMALL, processes=2))[-1] == 4
    ours, theirs = load(tmp_path / "two"), load(made)
    assert np.array_equal(ours.images, theirs.images)
    assert np.allclose(ours.targets, theirs.targets, rtol=1e-9, atol=0)


def test_a_cell_does_not_depend_on_how_many_there_are(made, tmp_path):
    list(make(tmp_path / "two", **SMALL | {"count": 2}, processes=1))
    assert np.array_equal(load(tmp_path / "two").images, load(made).images[:2])
    assert np.array_equal(load(tmp_path / "two").targets, load(made).targets[:2])


def test_making_a_finished_set_again_computes_nothing(made):
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert list(make(made, **SMALL, processes=1)) == [4]
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_an_interrupted_set_keeps_its_cells_and_goes_on(made, tmp_path):
    folder = tmp_path / "small"
    work = make(folder, **SMALL, processes=1)
    assert list(islice(work, 3)) == [0, 1, 2]
    work.close()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert "was not finished here: run it again" in check(folder)[0]
    with (folder / "cells.partial.csv").open("a") as partial:
        partial.write("2,2_isotropic.png,isotr")  # the process was killed while it wrote this line
    (folder / ".2_isotropic.png.4711.tmp").write_bytes(b"half an image")
    (folder / ".thesis.4711.tmp").write_text("mine")
    assert list(make(folder, **SMALL, processes=1)) == [2, 3, 4]
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    (folder / ".thesis.4711.tmp").unlink()
    assert content(folder) == content(made)


def spoilt(path):
    path.write_bytes(path.read_bytes()[:-20])


def black(path):
    Image.new("L", (SMALL["size"],) * 2).save(path)


@pytest.mark.parametrize("lose", [Path.unlink, spoilt, black])
def test_a_lost_or_replaced_image_is_made_again(made, tmp_path, lose):
    folder = shutil.copytree(made, tmp_path / "small")
    lose(folder / "1_isotropic.png")
    assert list(make(folder, **SMALL, processes=1)) == [3, 4]
    assert content(folder) == content(made)


@pytest.mark.parametrize("other", [{"seed": 8}, {"count": 5}, {"size": 64}, {"inclusion": Phase(60.0, 0.2)}])
def test_the_folder_of_another_recipe_is_refused_and_left_as_it_is(made, other):
    before = content(made)
    with pytest.raises(DatasetError, match="Choose another folder"):
        list(make(made, **SMALL | other, processes=1))
    assert content(made) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    names = {"thesis.txt", ".thesis.tmp", ".cells.csv.4711.tmp"}
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(DatasetError, match="expected an empty folder, found other files"):
        list(make(tmp_path, **SMALL))
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_folder_whose_maker_was_killed_at_its_first_file_is_empty(tmp_path):
    (tmp_path / ".dataset.toml.4711.tmp").write_text("name =")
    work = make(tmp_path, **SMALL, processes=1)
    next(work)
    work.close()
    assert (tmp_path / "dataset.toml").exists() and not list(tmp_path.glob(".*"))


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        list(make(tmp_path / "file", **SMALL))


def test_two_processes_do_not_make_one_folder_at_once(tmp_path):
    work = make(tmp_path / "small", **SMALL, processes=1)
    next(work)
    with pytest.raises(DatasetError, match="another process is making this data set"):
        next(make(tmp_path / "small", **SMALL, processes=1))
    work.close()
    assert next(make(tmp_path / "small", **SMALL, processes=1)) == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"count": 0}, "count: expected 1 to"),
        ({"size": 16}, "size: expected 48 to"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"count": 100_000, "size": 1024}, "more than can be loaded"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, argument, message):
    with pytest.raises(DatasetError, match=message):
        make(tmp_path / "none", **argument)
    assert not (tmp_path / "none").exists()


def test_a_contrast_above_50_gives_a_notice(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        make(tmp_path, matrix=Phase(1.0, 0.3), inclusion=Phase(50.0, 0.3))
        assert not caplog.records
        make(tmp_path, matrix=Phase(1.0, 0.3), inclusion=Phase(51.0, 0.3))
    assert "differ by a factor of 51; above 50 labels on a pixel grid are not reliable" in caplog.text


def test_phases_without_poissons_ratio_are_labelled_and_said_to_be_of_no_use(tmp_path, caplog):
    phases = {"matrix": Phase(3.5, 0.0), "inclusion": Phase(70.0, 0.0)}
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        list(make(tmp_path / "zero", count=1, size=SMALL["size"], processes=1, **phases))
    assert "C13 and C23 are 0 in every cell: no study can be trained on it" in caplog.text
    (row,) = side_file(tmp_path / "zero")
    assert float(row["C13"]) == float(row["C23"]) == 0 and 0 < float(row["label_uncertainty"]) < 1


def test_the_command_takes_the_phases_constants_and_refuses_impossible_ones(tmp_path, capsys):
    small = ["data", "make", str(tmp_path / "stiff"), "--count", "1", "--size", "48"]
    assert main.main([*small, "--inclusion", "350", "0.22"]) == 0
    assert load(tmp_path / "stiff").phases == {"matrix": MATRIX, "inclusion": Phase(350.0, 0.22)}
    small[2] = str(tmp_path / "none")
    assert main.main([*small, "--matrix", "3.5", "0.6"]) == 1
    assert "--matrix: poisson_ratio: expected more than -1 and less than 0.5, found 0.6." in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- interruptions of real processes ---

SCRIPT = """
import sys
from pathlib import Path
from data_pipeline.synthesize import make
if __name__ == "__main__":
    for done in make(Path(sys.argv[1]), count=30, size=48, seed=7, processes=2):
        print(done, flush=True)
"""


def started(script: Path, folder: Path, cells: int) -> subprocess.Popen[str]:
    """A process group that makes a set with two processes, and has finished so many cells."""
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    for done in range(cells + 1):
        assert process.stdout.readline() == f"{done}\n"
    return process


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "how", ["Ctrl-C", pytest.param("Ctrl-C at the start", marks=pytest.mark.slow), "kill -9 of the parent"]
)
def test_after_an_interruption_no_process_is_left_and_the_cells_are_kept(tmp_path, how):
    folder = tmp_path / "set"
    process = started(tmp_path / "script.py", folder, cells=0 if how == "Ctrl-C at the start" else 1)
    if how == "Ctrl-C at the start":
        time.sleep(0.2)  # the processes are being started
    if how.startswith("Ctrl-C"):
        os.killpg(process.pid, signal.SIGINT)  # the terminal's way: to all of the group
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == how.count("Ctrl-C"), errors  # of the parent only
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)
    (folder / ".7_circles.png.0a1b2c3d.tmp").touch()  # what a write leaves that was cut short
    assert "was not finished here" in check(folder)[0]
    kept = next(make(folder, count=30, size=48, seed=7, processes=1))
    assert kept >= (0 if how == "Ctrl-C at the start" else 1)
