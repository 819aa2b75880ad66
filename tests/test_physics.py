"""The last layer that knows mechanics: Hill's relations and the bounds of Voigt and Reuss hold whatever is learnt."""

import numpy as np
import pytest
import torch

from data_pipeline.components import COMPONENTS, SYMMETRIES, tensor
from data_pipeline.homogenize import homogenize, reuss, voigt
from data_pipeline.phase import Phase
from hpo import analysis
from models import bundle
from models.physics import NAMES, Physics
from models.regressor import Regressor, predict
from models.specs import PeriodicSpec, SpecError, build, to_dict

PAIRS = [  # soft and stiff either way round; an auxetic phase; phases of one shear modulus, and nearly of one k
    (Phase(3.5, 0.35), Phase(70.0, 0.22)),
    (Phase(70.0, 0.22), Phase(3.5, 0.35)),
    (Phase(1.0, -0.4), Phase(20.0, 0.45)),
    (Phase(2.6, 0.3), Phase(2.4, 0.2)),
    (Phase(1e-6, 0.3), Phase(1e-4, 0.2)),
]
RIGHT = {"rtol": 0, "atol": 1e-9}


def constants(matrix, inclusion):
    return {
        name: {"lame_lambda": phase.lame_lambda, "lame_mu": phase.lame_mu}
        for name, phase in (("matrix", matrix), ("inclusion", inclusion))
    }


def cell(seed, size=16, share=0.5):
    return np.random.default_rng(seed).random((size, size)) < share


def nine(full):
    return np.array([full[int(name[1]) - 1, int(name[2]) - 1] for name in NAMES])


@pytest.mark.parametrize("kind", ["hill", "bounded"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_solvers_labels_come_back_from_the_six_numbers_that_stand_for_them(kind, pair):
    physics = Physics(kind, constants(*pair), NAMES)
    images = np.stack([cell(seed, share=share) for seed, share in enumerate((0.2, 0.5, 0.8))])
    labels = np.stack([nine(homogenize(image, matrix=pair[0], inclusion=pair[1])) for image in images])
    six = physics.six(labels, images.mean(axis=(1, 2)))
    found = physics(torch.from_numpy(six), torch.from_numpy(images[:, None]).double()).numpy()
    np.testing.assert_allclose(found / labels, 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("pair", PAIRS)
def test_whatever_the_network_says_the_tensor_lies_between_the_bounds_in_the_matrix_sense(pair, scale):
    print("seed", seed := 7)
    rng = np.random.default_rng(seed)
    images = rng.random((200, 1, 8, 8)) < rng.random((200, 1, 1, 1))
    images[0], images[1] = False, True  # homogeneous: both bounds are that phase
    six = torch.from_numpy(rng.normal(scale=scale, size=(200, 6)))
    found = Physics("bounded", constants(*pair), NAMES)(six, torch.from_numpy(images).double()).numpy()
    phases = dict(zip(("matrix", "inclusion"), pair, strict=True))
    for image, full in zip(images, tensor(found, NAMES), strict=True):
        size = np.abs(full).max()
        for gap in (voigt(image.mean(), **phases) - full, full - reuss(image.mean(), **phases)):
            assert np.linalg.eigvalsh(gap)[0] > -1e-9 * size
    hill = analysis.hill_residuals(found, NAMES, images.mean(axis=(1, 2, 3)), phases)
    np.testing.assert_allclose(hill, 0, rtol=0, atol=1e-9 * np.abs(found).max())
    np.testing.assert_allclose(found[0], nine(pair[0].stiffness), rtol=1e-9, atol=0)
    np.testing.assert_allclose(found[1], nine(pair[1].stiffness), rtol=1e-9, atol=0)


def test_any_tensor_between_the_bounds_can_be_said():
    """All of the convex set, not a part: the corners of the places are the bounds themselves."""
    pair = PAIRS[0]
    physics = Physics("bounded", constants(*pair), NAMES)
    image = torch.from_numpy(cell(1)[None, None]).double()
    phases = dict(zip(("matrix", "inclusion"), pair, strict=True))
    highest = physics(torch.tensor([[40.0, 40, 0, 40, 40, 40]]).double(), image).numpy()[0]
    np.testing.assert_allclose(highest, nine(voigt(float(image.mean()), **phases)), rtol=1e-9)
    lowest = physics(torch.tensor([[-40.0, -40, 0, -40, -40, -40]]).double(), image).numpy()[0]
    softest = nine(reuss(float(image.mean()), **phases))
    for name in ("C44", "C55", "C66"):  # in the plane the bound is above the one of the whole tensor
        assert lowest[NAMES.index(name)] == pytest.approx(softest[NAMES.index(name)])
    assert lowest[0] > softest[0]


@pytest.mark.parametrize("kind", ["hill", "bounded"])
def test_a_regressor_with_physics_keeps_them_under_its_symmetries_and_in_its_file(tmp_path, kind):
    pair = PAIRS[0]
    spec = PeriodicSpec(width=4, depth=2, head=8, stride=2, physics=kind)
    torch.manual_seed(3)
    shape = (1, 16, 16)
    model = Regressor(
        build(spec, shape, 9),
        torch.tensor([0.5, 0.2, 0.1, -0.3, 0.4, 0.0]) * (1 if kind == "bounded" else 30),
        torch.full((6,), 3.0),
        symmetries=SYMMETRIES,
        image_shape=shape,
        physics=Physics(kind, constants(*pair), COMPONENTS),
    ).eval()
    images = np.stack([cell(seed)[None] for seed in range(5)]).astype(np.float32)
    found = predict(model, images)
    assert found.shape == (5, 9) and predict(model, images[:0]).shape == (0, 9)
    checked = analysis.physics(
        found, COMPONENTS, images.mean(axis=(1, 2, 3)), dict(zip(("matrix", "inclusion"), pair, strict=True))
    )
    assert checked["hill"] < 1e-5 * np.abs(found).max()
    if kind == "bounded":
        assert (checked["above_voigt"], checked["below_reuss"], checked["not_positive_definite"]) == (0, 0, 0)
    flipped = predict(model, np.ascontiguousarray(images.transpose(0, 1, 3, 2)))
    np.testing.assert_allclose(flipped, found[:, SYMMETRIES["transpose"]], rtol=0, atol=1e-5 * np.abs(found).max())
    bundle.save(tmp_path, model, model=to_dict(spec), image_shape=shape, target_names=COMPONENTS, unit="GPa")
    np.testing.assert_array_equal(predict(bundle.load(tmp_path)[0], images), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phases": None}, "and none: set model.physics"),
        ({"target_names": ("C11", "C22")}, "expected the nine components .* found C11, C22"),
        ({"phases": constants(Phase(10.0, 0.3), Phase(10.0, 0.3))}, "phases whose lambda \\+ mu differ, found"),
    ],
)
def test_physics_that_cannot_be_known_are_refused(change, message):
    given = {"phases": constants(*PAIRS[0]), "target_names": NAMES} | change
    with pytest.raises(SpecError, match=message):
        Physics("bounded", **given)
