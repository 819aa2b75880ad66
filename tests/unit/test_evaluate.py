"""A model is evaluated on further labelled images, if they are of the kind that it was trained on."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import folders
import numpy as np
import pytest
import records
import torch

from data_pipeline.dataset import load
from data_pipeline.errors import DatasetError
from hpo import api
from hpo.cli.main import main
from hpo.errors import ModelError, ReportError, ServiceError, TrackingUnreachable, UserError
from hpo.operations import evaluate
from hpo.scores import analysis, tested
from hpo.worker import trained_on
from models import bundle, metrics
from models.networks import build
from models.regressor import Regressor, predict
from models.specs import CnnSpec, to_dict

SPEC = CnnSpec(filters=2, kernel_size=3, dropout=0.0)


@pytest.fixture(autouse=True)
def no_services(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))


def model_of(data, folder, *, has_facts=True):
    """Write a model that was trained on a data set, as a download has it; its weights are random."""
    torch.manual_seed(3)
    shape = tuple(data.images.shape[1:])
    mean, variance = metrics.moments(data.targets)
    levels = (float(data.images.min()), float(data.images.max()))
    count = 0 if data.inputs is None else data.inputs.shape[1]
    ends = [] if data.inputs is None else np.column_stack([data.inputs.min(axis=0), data.inputs.max(axis=0)]).tolist()
    regressor = Regressor(
        build(SPEC, shape, len(mean), count),
        torch.tensor(mean),
        torch.tensor(np.sqrt(variance)),
        levels=levels,
        input_names=data.input_names,
        ranges=tuple(map(tuple, ends)),
    )
    layout = data.description.layout.of_images()
    extra = {"data": {"name": data.name, "digest": data.digest, "layout": layout.to_dict()}}
    extra |= {trained_on.KEY: trained_on.describe(data)} if has_facts else {}
    facts = {"image_shape": shape, "target_names": data.target_names, "unit": data.unit}
    bundle.save(folder, regressor, model=to_dict(SPEC), pixels=layout.pixels(), extra=extra, **facts)
    return folder, regressor.eval()


def part_of(folder, data, indices, to, table):
    """Copy some images of a data set, and their rows of its table, into a folder of their own."""
    to.mkdir()
    head, *rows = (folder / table).read_text().splitlines()
    for index in indices:
        shutil.copy(folder / data.names[index], to)
    kept = [row for row in rows if any(data.names[index].endswith(row.split(";")[0] + ".png") for index in indices)]
    (to / table).write_text("\n".join([head, *kept]))
    shutil.copy(folder / "dataset.toml", to) if (folder / "dataset.toml").exists() else None
    return to


@pytest.fixture
def steel(tmp_path):
    """Phases in colours, and one target."""
    folders.phases(tmp_path / "steel") if (tmp_path / "steel").mkdir() is None else None
    return tmp_path / "steel"


def test_the_test_cells_of_the_study_get_the_numbers_of_the_report(steel, tmp_path):
    data = load(steel)
    folder, regressor = model_of(data, tmp_path / "model")
    train, test = data.split.train, data.split.test
    images = data.images[test]
    baselines = {name: fit(*data.part(train))(images) for name, fit in metrics.PREDICTORS.items()}
    variance = metrics.moments(data.targets[train])[1]
    predicted = predict(regressor, images)
    expected = tested.Tested(
        dataset=data,
        indices=test,
        models={"model": predicted},
        predictors=baselines,
        train_variance=variance,
        phases=None,
    )
    result = api.evaluate(folder, part_of(steel, data, sorted(test), tmp_path / "new", "results.csv"))
    assert sorted(result.tested.truth.ravel()) == sorted(expected.truth.ravel())
    scores = {"model": predicted, **baselines}
    for name, means in result.means.items():
        own = expected.scores(scores[name])
        assert means["nmse"] == pytest.approx(own.nmse, rel=1e-5) and means["r2"] == pytest.approx(own.r2, rel=1e-5)
    for row in result.as_dict()["targets"]:
        assert row["nrmse_low"] < row["nrmse"] < row["nrmse_high"] and row["unit"] == "MPa"
    assert [row["outside"] for row in result.distance[:2]] == [0, 0]
    assert result.run_id is None and "not known" in result.notes[-1]


@pytest.mark.parametrize("case", ["phases", "logarithms", "missing", "numbered", "inputs"])
def test_the_facts_of_training_survive_the_way_through_the_specification(case, tmp_path):
    {"inputs": inputs, **folders.CASES, "missing": masked, "logarithms": folders.logarithms}[case](tmp_path)
    data = load(tmp_path)
    sizes = {"channels": data.images.shape[1], "inputs": len(data.input_names), "targets": data.targets.shape[1]}
    facts = trained_on.restore(json.loads(json.dumps(trained_on.describe(data))), **sizes, where="spec.json")
    assert facts.variance == pytest.approx(metrics.moments(data.targets[data.split.train])[1])
    images, _, *beside = data.part(data.split.test)
    for name, fit in metrics.PREDICTORS.items():
        expected = fit(*data.part(data.split.train))(images, *beside)
        assert facts.predictors[name](images, *beside) == pytest.approx(expected, rel=1e-9)


def test_facts_of_training_from_before_a_baseline_predictor_was_known_are_read(steel, monkeypatch):
    data = load(steel)
    facts = json.loads(json.dumps(trained_on.describe(data)))
    monkeypatch.setitem(metrics.PREDICTORS, "a later one", metrics.mean_predictor)
    sizes = {"channels": data.images.shape[1], "inputs": 0, "targets": data.targets.shape[1]}
    predictors = trained_on.restore(facts, **sizes, where="spec.json").predictors
    assert set(predictors) == {"mean", "volume fraction"}


def inputs(folder):
    """Write a data set with a number beside each image."""
    folders.numbered(folder)
    head, *rows = (folder / "table.csv").read_text().splitlines()
    lines = [f"{row},{(index * 7) % 11}" for index, row in enumerate(rows)]
    (folder / "table.csv").write_text("\n".join([f"{head},R", *lines]))
    (folder / "dataset.toml").write_text('inputs = ["R"]\n')


def masked(folder):
    folders.missing(folder)
    (folder / "dataset.toml").write_text('missing = "mask"\n')


def test_missing_labels_count_nowhere_and_inputs_are_taken(tmp_path):
    for form in (masked, inputs):
        folder = tmp_path / form.__name__
        folder.mkdir()
        form(folder)
        data = load(folder)
        model, _ = model_of(data, tmp_path / f"model-{form.__name__}")
        (folder / "dataset.toml").unlink()  # what it says is the model's, or harmless here
        result = api.evaluate(model, folder)
        assert np.array_equal(result.tested.truth, data.targets, equal_nan=True)
        assert "NaN" not in json.dumps(result.as_dict())
    rows = [row for row in api.evaluate(tmp_path / "model-masked", tmp_path / "masked").targets]
    assert {row["labels"] for row in rows if row["target"] == "t7"} == {16}


def test_a_target_with_a_transform_is_scored_on_its_scale_and_in_its_unit(tmp_path):
    folder = tmp_path / "rock"
    folder.mkdir()
    folders.logarithms(folder)
    model, _ = model_of(load(folder), tmp_path / "model")
    (folder / "dataset.toml").unlink()
    result = api.evaluate(model, folder)
    rows = {(row["target"], row["predictor"]): row for row in result.as_dict()["targets"]}
    scale, plain = (rows[name, "model"] for name in ("log10 k", "k"))
    assert (scale["unit"], plain["unit"]) == ("log10 m²", "m²") and scale["nrmse"] is not None
    truth, predicted = (10.0 ** values[:, 0] for values in (result.tested.truth, result.tested.predicted))
    assert plain["rmse"] == pytest.approx(((predicted - truth) ** 2).mean() ** 0.5) and plain["nrmse"] is None


def test_a_model_of_an_earlier_hpo_says_what_cannot_be_known(steel, tmp_path, capsys):
    folder, _ = model_of(load(steel), tmp_path / "model", has_facts=False)
    assert main(["evaluate", str(folder), str(steel), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["targets"][0]["nrmse"] is None and result["targets"][0]["r2"] is not None
    assert {row["predictor"] for row in result["targets"]} == {"model"} and len(result["worst"]) == 10
    assert "baseline predictors and the volume fractions of training are not known" in result["notes"][-1]


def test_terminal_and_page_show_scores_worst_images_and_distance(steel, tmp_path, capsys):
    folder, _ = model_of(load(steel), tmp_path / "model")
    page = tmp_path / "page.html"
    for _ in range(2):  # a page of hpo is replaced
        assert main(["evaluate", str(folder), str(steel), "-o", str(page)]) == 0
    output = capsys.readouterr().out
    assert "YS" in output and "NRMSE of the volume fraction" in output and "micrographs/m" in output
    assert output.count("volume fraction of phase [") >= 10, "by image, and in the distance"
    text = page.read_text()
    assert text.count("<svg") == 3 and "Prediction over label, new images" in text and "95 % low" not in text
    page.write_text("notes of mine")
    with pytest.raises(ReportError, match="no page of hpo"):
        api.evaluate(folder, steel, page=page)
    assert page.read_text() == "notes of mine"


def test_images_without_a_finite_prediction_are_the_worst_and_no_score_hides_them(steel, tmp_path, monkeypatch):
    folder, _ = model_of(load(steel), tmp_path / "model")
    finite = evaluate.predicted

    def broken(*arguments):
        targets = finite(*arguments)
        targets[5], targets[9], targets[11] = np.inf, np.nan, 1e200  # whose square is infinite
        return targets

    monkeypatch.setattr(evaluate, "predicted", broken)
    page = tmp_path / "page.html"
    result = api.evaluate(folder, steel, page=page)
    assert result.tested.worst[:3].tolist() == [5, 9, 11] and np.isinf(result.tested.nrmse[[5, 9, 11]]).all()
    content = result.as_dict()
    assert [row["nrmse"] for row in content["worst"][:3]] == [None] * 3 and content["worst"][3]["nrmse"] > 0
    assert content["scores"]["model"]["nmse"] is None and content["scores"]["mean"]["nmse"] is not None
    assert "for 2 of 24 images are not finite" in result.notes[0] and "is not comparable with" in result.summary[0]
    assert "NRMSE -" in page.read_text()


def test_an_image_without_a_label_that_counts_has_no_nrmse_and_is_none_of_the_worst(steel):
    data = load(steel)
    targets = data.targets.copy()
    targets[3] = np.nan
    own = tested.Tested(
        dataset=replace(data, targets=targets),
        indices=np.arange(len(targets)),
        models={"model": data.targets + 1.0},
        predictors={},
        train_variance=np.ones(targets.shape[1]),
        phases=None,
    )
    assert np.isnan(own.nrmse[3]) and np.delete(own.nrmse, 3) == pytest.approx(1.0) and 3 not in own.worst


def test_images_far_from_training_are_counted(steel, tmp_path):
    data = load(steel)
    order = np.argsort(data.images[:, 0].mean(axis=(1, 2)))
    folder, _ = model_of(replace(data, images=data.images[np.r_[order[:20], order[:4]]]), tmp_path / "model")
    result = api.evaluate(folder, steel)
    outside = {row["what"]: row["outside"] for row in result.distance}
    assert outside["height x width"] == 0 and outside["volume fraction of phase [20, 20, 20]"] >= 1
    assert any(f"{outside['volume fraction of phase [20, 20, 20]']} of 24 images" in note for note in result.notes)


# --- refusals ---


def other_targets(folder):
    text = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(text.replace("YS [MPa]", "hardness"))


def other_unit(folder):
    text = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(text.replace("[MPa]", "[GPa]"))


def other_colour(folder):
    (folder / "dataset.toml").write_text('levels = "rgb"\n')


def other_transform(folder):
    (folder / "dataset.toml").write_text('transform = {YS = "log10"}\n')


def foreign_pixels(folder):
    pixels = folders.cells(phases=5)
    palette = folders.PALETTE.copy()
    palette[2] = (1, 2, 3)
    folders.pictures(folder / "micrographs", [f"m{row}.png" for row in range(folders.N)], palette[pixels])


def other_size(folder):
    pixels = folders.PALETTE[folders.cells(size=20, phases=5)]
    folders.pictures(folder / "micrographs", [f"m{row}.png" for row in range(folders.N)], pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_targets, "no column is called YS"),
        (other_unit, "expected YS in MPa, found GPa"),
        (other_colour, 'levels: expected "phases", found "rgb"'),
        (other_transform, "transform: expected nothing, found"),
        (foreign_pixels, "expected one of the 5 phases' colours"),
        (other_size, "(5, 16, 16), as the model was trained, found (5, 20, 20)"),
    ],
)
def test_images_of_another_kind_are_refused_with_the_difference(change, message, steel, tmp_path):
    folder, _ = model_of(load(steel), tmp_path / "model")
    change(steel)
    with pytest.raises((ModelError, DatasetError)) as error:
        api.evaluate(folder, steel)
    text = str(error.value)
    assert message in text and "takes images of 16 x 16 pixels, 5 channels" in text and "YS in MPa" in text


def test_pixels_of_0_and_1_are_refused_where_0_and_255_are_meant(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    folders.numbered(folder)
    model, _ = model_of(load(folder), tmp_path / "model")
    folders.pictures(folder, [f"{row + 1:04d}_a.png" for row in range(folders.N)], folders.cells())
    with pytest.raises(ModelError, match="expected pixels up to about 1"):
        api.evaluate(model, folder)


def test_a_course_folder_and_one_with_a_header_are_the_same_to_a_model(data, tmp_path):
    trained = load(data)
    model, regressor = model_of(trained, tmp_path / "model")
    result = api.evaluate(model, data)
    assert result.tested.predicted == pytest.approx(predict(regressor, trained.images), rel=1e-6)
    headed = shutil.copytree(data, tmp_path / "headed")
    table = next(headed.glob("*.csv"))
    table.write_text(",".join(["Image no.", *trained.target_names]) + "\n" + table.read_text())
    for index in range(len(trained.images)):
        (headed / f"{index}_cell.png").rename(headed / f"cell_{index + 1:03d}.png")
    (headed / "dataset.toml").write_text('unit = "GPa"\n')
    assert api.evaluate(model, headed).means == result.means


@pytest.mark.parametrize("content", [[], {"images": 3}, {"variance": [[1]]}, "text", {"nodes": "x" * 10}])
def test_damaged_facts_of_training_are_one_message(content, steel, tmp_path):
    folder, _ = model_of(load(steel), tmp_path / "model")
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {trained_on.KEY: content}))
    with pytest.raises(ModelError, match="the facts of the training split"):
        api.evaluate(folder, steel)


def test_scores_are_not_lost_when_mlflow_goes_away(steel, tmp_path, monkeypatch, caplog):
    folder, _ = model_of(load(steel), tmp_path / "model")

    def away(*_):
        raise TrackingUnreachable("gone")

    def no_copy(*_):
        raise ServiceError("no sound copy")

    connection = SimpleNamespace(settings=SimpleNamespace(home=tmp_path), tracker=None)
    study = records.study_row("grid")
    recorded = evaluate._Recorded(connection=connection, study=study, job=SimpleNamespace(run_id="r"))
    monkeypatch.setattr(evaluate, "connect", lambda: nullcontext(connection))
    monkeypatch.setattr(evaluate, "_of_folder", lambda *_: recorded)
    monkeypatch.setattr(evaluate.registry, "versions", lambda *_: [])
    monkeypatch.setattr(evaluate.data_files, "fetch", no_copy)
    monkeypatch.setattr(evaluate, "_logged", away)
    result = api.evaluate(folder, steel)
    assert result.run_id is None and {"mean", "volume fraction"} <= result.means.keys()
    assert "no sound copy" in caplog.text and "Not logged to MLflow" in caplog.text


def test_a_name_that_is_no_folder_needs_the_services(steel):
    with pytest.raises(UserError, match="not running"):
        api.evaluate("@champion", steel)


def test_a_folder_without_a_model_gets_one_message(steel, caplog):
    caplog.set_level("INFO", "hpo")
    with pytest.raises(UserError, match=r"spec\.json: no such file; a model's folder holds weights\.safetensors"):
        api.evaluate(steel, steel)
    assert "Not logged" not in caplog.text


def test_tensors_that_are_not_finite_are_left_out_of_the_shares(data):
    tensors = load(data).targets[:4].copy()
    shares = analysis.physics(tensors, load(data).target_names, np.full(4, 0.5), None)
    broken = np.vstack([tensors, np.full((1, tensors.shape[1]), np.inf)])
    assert analysis.physics(broken, load(data).target_names, np.full(5, 0.5), None) == shares


def test_intervals_of_targets_have_the_means_of_those_over_all():
    random = np.random.default_rng(1)
    truth, error = random.normal(size=(30, 3)), random.normal(size=(30, 3))
    drawn = analysis.resamples(30)
    both = [
        function(truth, truth + error, train_variance=np.ones(3), drawn=drawn)
        for function in (analysis.score_samples, analysis.target_samples)
    ]
    for name, samples in both[0].items():
        assert both[1][name].mean(axis=1) == pytest.approx(samples)
