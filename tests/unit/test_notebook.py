"""`import hpo` in a notebook: data from arrays and frames, and what does not fit together."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from places import ROOT

import hpo
from data_pipeline.dataset import load
from data_pipeline.errors import DatasetError
from data_pipeline.phase import Phase
from hpo import notebook, text
from hpo.errors import ModelError
from hpo.notebook import Model
from hpo.operations import arrays, overview
from hpo.operations.budgets import Budget
from hpo.queue import State
from hpo.report import tables
from models import bundle
from models.specs import TrainingSpec, from_dict
from models.training import Training

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
        ({"targets": pd.DataFrame(np.ones((N, 2)), columns=["E", "E"])}, "targets: E is there twice"),
        ({"targets": pd.DataFrame({"E": range(N)}, index=range(N)[::-1])}, "numbers the rows in another order"),
        ({"targets": {"E": [np.nan, *range(1, N)]}, "missing": "drops"}, 'missing: expected "mask" or "drop"'),
        (
            {"images": [np.ones((4, 4), np.uint8), np.ones((4, 4))]},
            "Image 1 has numbers of float64, the first one of uint8",
        ),
        ({"images": None}, "images: expected an array, or several images, found NoneType"),
        ({"phases": {"matrix": 1}}, "phases: expected a Phase each for matrix and inclusion"),
        ({"unit": {"E": "GPa"}}, "unit: expected one text"),
    ],
)
def test_what_does_not_fit_together_is_said_and_leaves_nothing(images, tmp_path, change, message):
    given = {"images": images, "targets": labels(images)} | change
    with pytest.raises(DatasetError, match=message):
        hpo.dataset(tmp_path / "cells", **given)
    assert not (tmp_path / "cells").exists()


def test_a_path_through_a_file_is_refused(images, tmp_path):
    (tmp_path / "cells").write_text("mine")
    for folder in (tmp_path / "cells", tmp_path / "cells" / "inner"):
        with pytest.raises(hpo.UserError, match="found a file on the way"):
            hpo.dataset(folder, images, labels(images))
    assert (tmp_path / "cells").read_text() == "mine"


def test_one_column_of_any_name_unit_and_type_is_stored_with_its_gaps(images, tmp_path):
    numbers = pd.DataFrame({"Youngs modulus [GPa]": [np.nan, *range(1, N)]})
    data = load(hpo.dataset(tmp_path / "gaps", images, numbers, missing="drop"))
    assert data.target_names == ("Youngs modulus",) and data.unit == "GPa" and list(data.targets[:2, 0]) == [1, 2]
    truth = load(hpo.dataset(tmp_path / "truth", images, {"is_stiff": images.mean((1, 2)) > 127}))
    assert np.array_equal(truth.targets[:, 0], images.mean((1, 2)) > 127)


def test_pictures_are_stored_as_their_files_are_read(images, tmp_path):
    whole = [Image.fromarray(image) for image in images]
    clear = [Image.fromarray(np.dstack([image] * 3 + [image * 0 + 9])) for image in images]
    palette = [image.quantize(256) for image in whole]
    for name, pictures in (("L", whole), ("RGBA", clear), ("P", palette), ("generator", iter(whole))):
        data = load(hpo.dataset(tmp_path / name, pictures, labels(images), range=[0, 255]))
        expected = [np.asarray(picture.convert("L")) for picture in palette] if name == "P" else images
        assert np.array_equal(np.rint(data.images[:, 0] * 255), expected), name


def trained(folder, layout=None):
    """A network with one input, if it has a layout, of images of 24 x 24 pixels."""
    rng = np.random.default_rng(1)
    parts = [(rng.random((n, 1, N, N), np.float32), rng.random((n, 2)), rng.random((n, 1))) for n in (16, 8)]
    spec = {"family": "conv", "width": 2, "depth": 1, "padding": "zeros"}
    given = {} if layout is None else {"input_names": ("T",)}
    (train, validation) = parts if given else [part[:2] for part in parts]
    settings = TrainingSpec(epochs=1, batch_size=8)
    run = Training(from_dict(spec), settings, train=train, validation=validation, seed=0, **given)
    list(run.epochs())
    extra = {} if layout is None else {"data": {"layout": {"levels": "grey", "range": [0.0, 255.0], **layout}}}
    names = {"target_names": ("a", "b"), "unit": "GPa", "image_shape": (1, N, N)}
    bundle.save(folder, run.best_regressor(), model=spec, extra=extra, **names)
    return Model(folder, name="model")


@pytest.mark.usefixtures("one_thread")
def test_the_same_images_have_the_same_predictions_in_every_form(tmp_path):
    cells = np.random.default_rng(2).integers(0, 256, (N, N, N), dtype=np.uint8)
    model = trained(tmp_path / "grey")
    expected = model.predict(cells)
    pictures = [Image.fromarray(cell) for cell in cells]
    for form in (cells.astype(int), pictures, iter(cells), [picture.convert("RGBA") for picture in pictures]):
        pd.testing.assert_frame_equal(model.predict(form), expected)
    for one in (cells[0], pictures[0], [pictures[0]]):
        assert np.allclose(model.predict(one).to_numpy(), expected.iloc[:1].to_numpy())
    black_and_white = model.predict((cells > 128) * np.uint8(255))
    for form in (cells > 128, [Image.fromarray(cell > 128) for cell in cells]):
        pd.testing.assert_frame_equal(model.predict(form), black_and_white)
    with pytest.raises(hpo.UserError, match=r"^0.png: Expected an image whose grey values differ"):
        model.predict((cells > 128).astype(np.uint8))


@pytest.mark.usefixtures("one_thread")
def test_images_and_inputs_belong_together_however_the_images_of_the_training_lay(tmp_path):
    cells = np.random.default_rng(2).integers(0, 256, (N, N, N), dtype=np.uint8)
    inputs = pd.DataFrame({"id": list(range(N))[::-1], "T": np.linspace(0.2, 0.8, N)})
    model, turned = (trained(tmp_path / axes, {"axes": axes, "inputs": "T"}) for axes in ("nhw", "hwn"))
    expected = model.predict(cells, inputs)
    pd.testing.assert_frame_equal(turned.predict(cells, inputs), expected)
    for number in (0, 5):
        alone = model.predict(cells[number], {"T": [inputs["T"][number]]})
        assert np.allclose(alone[["a", "b"]].to_numpy(), expected[["a", "b"]].to_numpy()[number])
    pd.testing.assert_frame_equal(
        model.predict((cells > 9), inputs), model.predict((cells > 9) * np.uint8(255), inputs)
    )
    for wrong, message in (
        (inputs[:3], "inputs: expected a row for each of the 24 images, found 3 rows"),
        (inputs.rename(columns={"T": "t"}), "expected the columns T, found no T"),
        (inputs[::-1], "numbers the rows in another order"),
        (inputs.assign(T=np.nan), "T: expected a number, found 'NaN'"),
    ):
        with pytest.raises(hpo.UserError, match=message):
            model.predict(cells, wrong)


def test_settings_of_a_run_are_written_as_a_study_file_has_them(monkeypatch):
    given = {"space.learning_rate": {"low": np.float64(1e-4), "high": 1e-2}, "seed": np.int64(3), "report_by": ("é",)}
    texts = [f"{key}={text.toml_text(value)}" for key, value in given.items()]
    assert texts == ['space.learning_rate={"low" = 0.0001, "high" = 0.01}', "seed=3", 'report_by=["é"]']
    with pytest.raises(hpo.UserError, match=r"settings: data.path is given by an argument as well"):
        hpo.run("grid", data="cells", settings={"data.path": "others"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "epochs: expected nothing beside study='auto'"),
        ({"settings": {"training.batch_size": 16}}, "settings: expected nothing beside study='auto'"),
        ({"budget": Budget(until="nmse=0.1")}, "budget: expected max_hours alone beside study='auto'"),
        ({"budget": Budget(max_hours=1), "retry": True}, "retry: expected nothing beside study='auto'"),
    ],
)
def test_a_search_within_a_budget_takes_data_seed_and_hours_alone(monkeypatch, options, message):
    monkeypatch.setattr(notebook.api, "auto", lambda **_: pytest.fail("it begins"), raising=False)
    with pytest.raises(hpo.UserError, match=message):
        hpo.run("auto", **options)
    with pytest.raises(hpo.UserError, match="auto plans its studies itself"):
        notebook.api.load("auto")


def test_a_search_within_a_budget_in_a_program_gives_the_champions_study(monkeypatch, capsys):
    asked = {}

    def auto(**options):
        asked.update(options)
        return SimpleNamespace(is_finished=False, study="conv-search+1a2b3c4d")

    monkeypatch.setattr(notebook.api, "auto", auto, raising=False)
    monkeypatch.setattr(
        notebook, "Study", type("Study", (), {"__init__": lambda self, name: setattr(self, "name", name)})
    )
    study = hpo.run("auto", data="cells", budget=Budget(max_hours=0.5), device="cpu")
    assert study.name == "conv-search+1a2b3c4d"
    assert (asked["data"], asked["seed"], asked["max_hours"]) == ("cells", 0, 0.5)


def test_a_study_that_was_deleted_says_so(monkeypatch):
    study = object.__new__(hpo.Study)
    study.name = "gone"
    monkeypatch.setattr(notebook.api, "studies", list, raising=False)
    with pytest.raises(hpo.UserError, match="The study gone is not there any more"):
        study.state  # noqa: B018


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


def test_a_parameter_called_like_a_fact_of_a_trial_hides_nothing():
    job = SimpleNamespace(
        **{
            "number": 3,
            "repeat": 0,
            "state": State.WAITING,
            "result": None,
            "epochs": 2,
            "reason": None,
            "run_id": "r",
        },
        spec=SimpleNamespace(point={"epochs": 40, "filters": 8}),
    )
    row = overview._trial(job, ["epochs", "filters"])
    assert (row["epochs"], row["point.epochs"], row["filters"], row["number"]) == (2, 40, 8, 3)
