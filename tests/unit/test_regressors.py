"""Classical predictors: fitted by scikit-learn, stored as arrays, computed from these alone."""

import itertools
import json
from dataclasses import replace

import cells
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern
from sklearn.linear_model import Ridge

from hpo import study
from hpo.errors import StudyError
from hpo.worker.packaging import package
from models import bundle, training
from models import ridge_baseline as baseline_module
from models.descriptor_net import DescriptorNet
from models.metrics import scores
from models.networks import build, parameter_count
from models.regressor import predict
from models.regressors import LEAF, REGRESSORS
from models.ridge_baseline import PENALTIES, ridge_baseline
from models.sizes import size
from models.specs import BY_DATA_KEYS, DescriptorsSpec, SpecError, TrainingSpec, to_dict
from models.together import check_together
from models.training import Training

SEED = 5
FIT = TrainingSpec(epochs=1)
SMALL = DescriptorsSpec(edges="periodic", components=4, images=40, trees=12)
IMAGES = cells.blocks(48, 20, seed=SEED)
LABELS = np.column_stack([IMAGES.mean((1, 2, 3)), IMAGES[:, 0, ::2].std((1, 2)), IMAGES[:, 0, :5].mean((1, 2)) ** 2])
TRAIN, VALIDATION = (IMAGES[:36], LABELS[:36]), (IMAGES[36:], LABELS[36:])


def fitted(spec: DescriptorsSpec, train=TRAIN, validation=VALIDATION, **arguments) -> Training:
    run = Training(spec, FIT, train=train, validation=validation, seed=SEED, **arguments)
    (epoch,) = run.epochs()
    assert epoch.best and epoch.metrics.keys() == {"train/nmse", "train/mse", "val/nmse", "val/mse", "seconds"}
    return run


def estimated(spec: DescriptorsSpec, features: np.ndarray, targets: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What scikit-learn's estimators, each fitted to one target alone, predict."""
    columns = []
    for column in range(targets.shape[1]):
        rows = ~np.isnan(targets[:, column])
        if spec.regressor == "ridge":
            estimator = Ridge(alpha=spec.alpha)
        elif spec.regressor == "gaussian-process":
            length = spec.length * np.sqrt(2 * features.shape[1])
            nu = {"matern-3/2": 1.5, "matern-5/2": 2.5}.get(spec.kernel)
            kernel = RBF(length) if nu is None else Matern(length, nu=nu)
            estimator = GaussianProcessRegressor(kernel, alpha=spec.alpha, optimizer=None)
        else:
            estimator = HistGradientBoostingRegressor(
                max_iter=spec.trees,
                max_depth=spec.tree_depth,
                max_leaf_nodes=None,
                min_samples_leaf=LEAF,
                learning_rate=spec.shrinkage,
                l2_regularization=spec.alpha,
                early_stopping=False,
            )
        columns.append(estimator.fit(features[rows], targets[rows, column]).predict(new))
    return np.column_stack(columns)


@settings(max_examples=40, deadline=None)
@given(
    regressor=st.sampled_from(list(REGRESSORS)),
    kernel=st.sampled_from(["rbf", "matern-3/2", "matern-5/2"]),
    alpha=st.floats(1e-4, 10),
    length=st.floats(0.2, 5),
    depth=st.integers(1, 6),
    shrinkage=st.floats(0.01, 1),
    shape=st.tuples(st.integers(2, 60), st.integers(1, 8), st.integers(1, 3)),
    missing=st.floats(0, 0.4),
    seed=st.integers(0, 2**32 - 1),
)
def test_predictions_equal_those_of_scikit_learn(
    regressor, kernel, alpha, length, depth, shrinkage, shape, missing, seed
):
    count, width, targets = shape
    spec = replace(
        SMALL, regressor=regressor, kernel=kernel, alpha=alpha, length=length, tree_depth=depth, shrinkage=shrinkage,
        images=60,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    features, new = rng.standard_normal((count, width)).round(1), rng.standard_normal((30, width)).round(1)
    labels = rng.standard_normal((count, targets))
    labels[2:][rng.random((count - 2, targets)) < missing] = np.nan
    module = REGRESSORS[regressor](spec, width, targets)
    module.fit(features, labels, lambda: None)
    computed = module(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(computed, estimated(spec, features, labels, new), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_the_whole_model_is_what_scikit_learn_makes_of_its_descriptors(regressor):
    spec = replace(SMALL, regressor=regressor)
    run = fitted(spec)
    network = run.network
    assert isinstance(network, DescriptorNet)
    with torch.no_grad():
        extracted = network.extract(torch.from_numpy(IMAGES)).numpy()
    plain, statistics = extracted[:, : network.plain], extracted[:, network.plain :]
    analysis = PCA(4, svd_solver="full").fit(statistics[:36])
    features = np.hstack([plain, analysis.transform(statistics)])
    deviation = features[:36].std(axis=0)
    deviation[-4:] = deviation[-4]  # components have one scale
    features = (features - features[:36].mean(axis=0)) / np.where(deviation > 1e-9, deviation, 1)
    features = features.astype(np.float32).astype(np.float64)
    scaled = run.scaling.apply(LABELS[:36]).double().numpy()
    expected = estimated(spec, features[:36], scaled, features[36:]) * run.scaling.scale + run.scaling.mean
    np.testing.assert_allclose(predict(run.best_regressor(), IMAGES[36:]), expected, atol=1e-6)
    assert run.best_nmse < 0.5  # it has learnt something


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_a_fit_gives_the_same_bits_again_and_after_an_interruption(regressor):
    spec = replace(SMALL, regressor=regressor, images=20)
    first, second = fitted(spec), fitted(spec)
    killed = Training(spec, FIT, train=TRAIN, validation=VALIDATION, seed=SEED)
    with pytest.raises(training.Interrupted):
        next(killed.epochs(lambda: True))
    list(killed.epochs())
    resumed = Training(spec, FIT, train=TRAIN, validation=VALIDATION, seed=SEED, state=first.state())
    assert not list(resumed.epochs())
    for other in (second, killed, resumed):
        assert (other.best_nmse, other.last_mse) == (first.best_nmse, first.last_mse)
        for name, tensor in first.best_regressor().state_dict().items():
            assert torch.equal(other.best_regressor().state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "regressor", ["ridge", *(pytest.param(name, marks=pytest.mark.long) for name in ("trees", "gaussian-process"))]
)
def test_phases_with_scalars_and_missing_labels_go_through_packaging_and_loading(regressor, tmp_path):
    rng = np.random.default_rng(SEED)
    phases = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (30, 18, 13))].transpose(0, 3, 1, 2)
    inputs = rng.random((30, 2))
    labels = np.column_stack([inputs[:, 0], phases[:, 1].mean((1, 2))])
    labels[3:9, 1] = np.nan
    spec = replace(SMALL, regressor=regressor, edges="open", grey=True, patterns=True)
    run = fitted(spec, (phases, labels, inputs), (phases[:9], labels[:9], inputs[:9]), input_names=("a", "b"))
    trained = run.best_regressor()
    package(
        tmp_path / "model", trained, spec=to_dict(spec), image_shape=(3, 18, 13), target_names=("x", "y"), unit="1",
        example_images=phases[:2], example_inputs=inputs[:2].astype(np.float32),
    )  # fmt: skip
    loaded, description = bundle.load(tmp_path / "model")
    np.testing.assert_array_equal(predict(loaded, phases, inputs), predict(trained, phases, inputs))
    assert description.model == spec and json.loads((tmp_path / "model/spec.json").read_text())["model"] == to_dict(
        spec
    )
    exported = torch.export.load(tmp_path / "model/data/model.pt2").module()
    beside = torch.from_numpy(inputs).float()
    np.testing.assert_allclose(
        exported(torch.from_numpy(phases), beside).detach().numpy(), predict(trained, phases, inputs), atol=1e-6
    )
    with pytest.raises(SpecError, match="expected \\(channels, height, width\\)"):
        bundle.check_shape(description, (3, 18, 14))
    assert not list(tmp_path.rglob("*.pkl"))


def test_the_baseline_is_ridge_whose_penalty_the_validation_split_selects():
    predictor = ridge_baseline(TRAIN, VALIDATION, periodic=True)
    variance = LABELS[:36].var(axis=0)
    best = scores(predictor(IMAGES[36:]), LABELS[36:], train_variance=variance).nmse
    own = [fitted(DescriptorsSpec(edges="periodic", alpha=penalty)).best_nmse for penalty in PENALTIES]
    assert best == pytest.approx(min(own), rel=1e-4)
    assert len({round(nmse, 6) for nmse in own}) > 1


def test_the_baseline_takes_inputs_gaps_and_more_images_than_it_learns_from(monkeypatch):
    monkeypatch.setattr(baseline_module, "MOST_IMAGES", 30)
    inputs, labels = np.random.default_rng(SEED).random((48, 1)), LABELS[:, :2].copy()
    labels[:, 1] = 3 * inputs[:, 0]
    labels[4:9, 0] = np.nan
    predictor = ridge_baseline(
        (IMAGES[:36], labels[:36], inputs[:36]), (IMAGES[36:], labels[36:], inputs[36:]), periodic=False,
        input_names=("ratio",),
    )  # fmt: skip
    assert np.abs(predictor(IMAGES[36:], inputs[36:])[:, 1] - labels[36:, 1]).max() < 0.3
    with pytest.raises(SpecError, match="at least 3x3 pixels"):
        ridge_baseline((IMAGES[:, :, :2, :2], labels), (IMAGES[:, :, :2, :2], labels), periodic=False)


def test_the_size_in_closed_form_is_that_of_the_module():
    specs = [replace(SMALL, regressor=name, two_point=on, chords=on) for name in REGRESSORS for on in (True, False)]
    for spec, (shape, targets, inputs) in itertools.product(specs, (((3, 21, 34), 2, 2), ((1, 12, 12), 9, 0))):
        assert size(spec, shape, targets, inputs).parameters == parameter_count(build(spec, shape, targets, inputs))


def test_a_process_takes_at_most_the_images_it_is_given_and_ignores_the_rest():
    run = fitted(replace(SMALL, regressor="gaussian-process", images=10))
    assert run.network.regressor.points.shape[0] == 10
    fewer = fitted(replace(SMALL, regressor="gaussian-process", images=500))
    assert (fewer.network.regressor.weights[36:] == 0).all()


def test_grey_images_are_cut_at_the_mean_grey_value_of_training():
    grey = (IMAGES * 0.4 + 0.3).astype(np.float32)
    run = fitted(SMALL, (grey[:36], LABELS[:36]), (grey[36:], LABELS[36:]))
    assert run.network.level.item() == pytest.approx(grey[:36].mean())
    assert fitted(SMALL).network.level.item() == 0.5


FILE = """
[model]
family = "descriptors"
{model}
[space]
alpha = [0.1, 1.0]
{space}
{training}
"""


def load(tmp_path, model="", space="", training=""):
    (tmp_path / "classical.toml").write_text(FILE.format(model=model, space=space, training=training))
    return study.load(str(tmp_path / "classical.toml"))


def test_a_study_of_descriptors_has_one_epoch_and_edges_by_the_data(tmp_path):
    chosen = load(tmp_path)
    assert chosen.training["epochs"] == 1 and chosen.model["edges"] == "data"
    assert [chosen.suited(is_periodic=wraps, has_symmetries=True).model["edges"] for wraps in (True, False)] == list(
        BY_DATA_KEYS["edges"]
    )
    assert chosen.suited(is_periodic=True, has_symmetries=False).needs_periodic_images()
    assert not chosen.suited(is_periodic=False, has_symmetries=False).needs_periodic_images()
    with pytest.raises(SpecError, match="edges = 'data' stands for what the data say"):
        build(DescriptorsSpec(), (1, 20, 20), 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training": "[training]\nepochs = 20"}, "training: epochs: model.family = 'descriptors' is fitted once"),
        ({"training": "[training]\naugmentation = 'symmetry'"}, "training: augmentation: model.family"),
        ({"space": "edges = ['data', 'open']"}, "space.edges: 'data' stands for one of the others"),
        ({"model": "componets = 3"}, "unknown key 'model.componets'. Did you mean 'components'?"),
        ({"model": "tree_depth = 9"}, "tree_depth = 9; expected a whole number, at least 1 and at most 6"),
    ],
)
def test_what_a_fit_does_not_know_is_refused(tmp_path, keys, message):
    with pytest.raises(StudyError) as raised:
        load(tmp_path, **keys)
    assert message in str(raised.value)
    check_together(SMALL, TrainingSpec(epochs=1, share=0.5, threads=2))
