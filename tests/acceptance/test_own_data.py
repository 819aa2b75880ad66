"""A folder as people have it goes from `hpo data check` to `hpo predict`, with targets of its own names and units."""

import folders
import pandas
import pytest

from data_pipeline.split import split

pytestmark = pytest.mark.acceptance

STUDY = """
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = [2, 4]
[training]
epochs = 2
batch_size = 8
"""


def test_phases_in_colours_with_two_targets_of_two_units_go_from_check_to_predict(shell, tmp_path):
    data = tmp_path / "steel"
    data.mkdir()
    folders.phases(data)
    table = (data / "results.csv").read_text().splitlines()
    more = [f"{line};{10 ** (row % 5)}" for row, line in enumerate(table[1:])]
    (data / "results.csv").write_text("\n".join([f"{table[0]};k (md) [m²]", *more]))
    (data / "dataset.toml").write_text('transform = {"k md" = "log10"}\n')
    study = tmp_path / "steel-first.toml"
    study.write_text(STUDY)
    assert "5 channels, phases" in shell.hpo("data", "check", data)
    output = shell.hpo("run", "--study", study, "--data", data)
    assert "16 x 16 pixels, 5 channels; 16 / 4 / 4 images for training / validation / test" in " ".join(output.split())
    shell.hpo("report", "-o", tmp_path / "report")
    shell.hpo("download", tmp_path / "champion")
    frame = pandas.read_csv(_csv(shell, tmp_path / "champion", data / "micrographs" / "m1.png"))
    assert list(frame.columns) == ["image", "YS [MPa]", "k md [m²]"] and (frame["k md [m²]"] > 0).all()


@pytest.mark.slow
def test_targets_with_gaps_go_from_check_to_predict(shell, tmp_path):
    data = tmp_path / "gaps"
    data.mkdir()
    folders.missing(data)
    (data / "dataset.toml").write_text('missing = "mask"\ntransform = {t31 = "log10"}\n')
    study = tmp_path / "gaps-first.toml"
    study.write_text(STUDY)
    assert "missing t7 8, log10 t31 8 of 24 labels" in " ".join(shell.hpo("data", "check", data).split())
    output = shell.hpo("run", "--study", study, "--data", data, "--epochs", "60")
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    labels = 4 - sum(index % 3 == 0 for index in split(24).test)
    assert [row[-2] for row in rows if row[1:2] == ["t7"]] == [str(labels)] and "nan" not in output
    shell.hpo("report", "-o", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "Labels by component, test split" in report and "nan" not in report
    shell.hpo("download", tmp_path / "champion")
    frame = pandas.read_csv(_csv(shell, tmp_path / "champion", data / "a1.png"))
    assert frame.shape == (1, 41) and frame.iloc[0, 1:].notna().all()


def _csv(shell, model, image):
    path = model.parent / "predictions.csv"
    path.write_text(shell.hpo("predict", model, image))
    return path
