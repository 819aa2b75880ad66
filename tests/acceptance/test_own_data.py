"""A folder as people have it goes from `hpo data check` to `hpo predict`, with targets of its own names and units."""

import subprocess
import sys

import folders
import numpy as np
import pandas
import pytest
from mlflow import MlflowClient
from PIL import Image
from places import ROOT

from data_pipeline.split import split
from hpo.scores import ranking

pytestmark = pytest.mark.acceptance


def test_phases_in_colours_with_two_targets_of_two_units_go_from_check_to_predict(shell, tmp_path):
    data = tmp_path / "steel"
    data.mkdir()
    folders.phases(data)
    table = (data / "results.csv").read_text().splitlines()
    more = [f"{line};{10 ** (row % 5)}" for row, line in enumerate(table[1:])]
    (data / "results.csv").write_text("\n".join([f"{table[0]};k (md) [m²]", *more]))
    (data / "dataset.toml").write_text('transform = {"k md" = "log10"}\n')
    study = tmp_path / "steel-first.toml"
    study.write_text(folders.CONV.format(epochs=2))
    assert "5 channels, phases" in shell.hpo("data", "check", data)
    output = shell.hpo("run", "--study", study, "--data", data)
    assert "16 x 16 pixels, 5 channels; 16 / 4 / 4 images for training / validation / test" in " ".join(output.split())
    assert "The same with the transform undone, in the unit of the labels" in output and "│ k md [m²] │" in output
    (name,) = (row.name for row in shell.queue.studies() if row.name.startswith("steel-first"))
    assert shell.json("show", name)["settings"]["model"]["padding"] == "reflect", "these images do not wrap around"
    assert "model.padding" not in shell.hpo("show", name), "it does not differ from the file"
    shell.hpo("report", "-o", tmp_path / "report")
    assert "With the transform undone, in the unit of the labels" in (tmp_path / "report" / "report.md").read_text()
    shell.hpo("promote", "--study", name, "--force")  # after two epochs
    shell.hpo("download", tmp_path / "champion")
    readme = (tmp_path / "champion" / "README.md").read_text()
    assert "`hpo predict` undoes the transform. Then, on the validation split: k md [m²]\\: R² " in readme
    frame = pandas.read_csv(_csv(shell, tmp_path / "champion", data / "micrographs" / "m1.png"))
    assert list(frame.columns) == ["image", "YS [MPa]", "k md [m²]"] and (frame["k md [m²]"] > 0).all()


@pytest.mark.long
def test_targets_with_gaps_go_from_check_to_predict(shell, tmp_path):
    data = tmp_path / "gaps"
    data.mkdir()
    folders.missing(data)
    (data / "dataset.toml").write_text('missing = "mask"\ntransform = {t31 = "log10"}\n')
    study = tmp_path / "gaps-first.toml"
    study.write_text(folders.STUDY.format(epochs=2))
    assert "missing t7 8, log10 t31 8 of 24 labels" in " ".join(shell.hpo("data", "check", data).split())
    output = shell.hpo("run", "--study", study, "--data", data, "--epochs", "60")
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    labels = 4 - sum(index % 3 == 0 for index in split(24).test)
    assert [row[-2] for row in rows if row[1:2] == ["t7"]] == [str(labels)] and "nan" not in output
    shell.hpo("report", "-o", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "Labels by target, test split" in report and "nan" not in report
    shell.hpo("promote", "--study", shell.queue.studies()[0].name, "--force")  # four images validate
    shell.hpo("download", tmp_path / "champion")
    frame = pandas.read_csv(_csv(shell, tmp_path / "champion", data / "a1.png"))
    assert frame.shape == (1, 41) and frame.iloc[0, 1:].notna().all()


def _csv(shell, model, image):
    path = model.parent / "predictions.csv"
    path.write_text(shell.hpo("predict", model, image))
    return path


@pytest.mark.long
def test_a_number_beside_the_image_goes_from_check_to_predict_and_to_plain_mlflow(shell, tmp_path):
    data = tmp_path / "fatigue"
    (data / "micrographs").mkdir(parents=True)
    draw = np.random.default_rng(7)
    rows = [f"s{index};{draw.uniform(-1, 0.5):.4f}".replace(".", ",") for index in range(40)]
    for index in range(40):
        image = Image.fromarray(draw.integers(0, 2, (16, 16)).astype(np.uint8) * 255)
        image.save(data / "micrographs" / f"s{index}.png")
    strengths = [f"{200 - 80 * float(row.split(';')[1].replace(',', '.')):.2f}".replace(".", ",") for row in rows]
    lines = [f"{row};{strength}" for row, strength in zip(rows, strengths, strict=True)]
    (data / "tests.csv").write_text("\n".join(["sample image;R;strength [MPa]", *lines]) + "\n")
    (data / "dataset.toml").write_text('inputs = ["R"]\n')
    study = tmp_path / "fatigue-first.toml"
    study.write_text(folders.STUDY.format(epochs="40\nlearning_rate = 3e-3"))
    assert "inputs   numbers that the networks see beside the image" in shell.hpo("data", "check", data)
    output = shell.hpo("run", "--study", study, "--data", data)
    assert "targets strength in MPa; inputs beside the image: R" in " ".join(output.split())
    shell.hpo("report", "-o", tmp_path / "report")
    model = tmp_path / "champion"
    shell.hpo("download", "--study", shell.queue.studies()[0].name, model)

    images = [data / "micrographs" / f"s{index}.png" for index in (3, 11)]
    assert "--inputs FILE" in shell.hpo("predict", model, *images, code=1)
    (tmp_path / "predictions.csv").write_text(shell.hpo("predict", model, *images, "--inputs", data / "tests.csv"))
    predicted = pandas.read_csv(tmp_path / "predictions.csv")["strength [MPa]"].to_numpy()
    expected = [float(strengths[index].replace(",", ".")) for index in (3, 11)]
    assert predicted == pytest.approx(expected, abs=15)  # the spread is 35 MPa, and the noise shows nothing of it

    program = (
        "import sys, numpy, PIL.Image, mlflow.pyfunc\n"
        "images = numpy.stack([numpy.float32(PIL.Image.open(path))[None] / 255 for path in sys.argv[2:4]])\n"
        "radius = numpy.float32(sys.argv[4:])\n"
        "print(*mlflow.pyfunc.load_model(sys.argv[1]).predict({'images': images, 'R': radius})[:, 0])"
    )
    ratios = [rows[index].split(";")[1].replace(",", ".") for index in (3, 11)]
    command = [sys.executable, "-B", "-c", program, model, *images, *ratios]
    served = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert [float(word) for word in served.split()] == pytest.approx(predicted, rel=1e-5)


FOUR = """
[data]
path = "{data}"
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = [4, 8]
learning_rate = [1e-2, 1e-3]
[training]
epochs = 25
batch_size = 16
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["stiffness", "electrode"])
def test_no_check_takes_the_champion_from_the_best_network_of_an_example(name, shell, tmp_path):
    (file := tmp_path / f"four-on-{name}.toml").write_text(FOUR.format(data=ROOT / "examples" / name))
    said = shell.hpo("run", "--study", file)
    assert "Doubt" not in said and "Note" not in said.partition("Promoted: ")[0] and "ALARM" not in said
    best = min(shell.trials(file.stem), key=lambda job: job.result.best_val_nmse)
    assert best.id == ranking.best_network(shell.queue.jobs(file.stem)).id
    model = shell.queue.study(file.stem).facts.model_name
    assert MlflowClient(shell.tracking_uri).get_model_version_by_alias(model, "champion").run_id == best.run_id
    assert "Promoted: config" in said and "@champion is this version" in said
