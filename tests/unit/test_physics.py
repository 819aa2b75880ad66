"""The last layer that knows mechanics: Hill's relations and the bounds of Voigt and Reuss hold whatever is learnt."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.components import COMPONENTS, SYMMETRIES, tensor
from data_pipeline.homogenize import homogenize, reuss, voigt
from data_pipeline.phase import Phase
from hpo.errors import ModelError
from hpo.operations import predict as files
from hpo.scores import analysis
from models import bundle
from models.networks import build
from models.physics import NAMES, Physics
from models.regressor import Regressor, predict
from models.specs import PeriodicSpec, SpecError, to_dict

PAIRS = [  # soft and stiff either way round; an auxetic phase; of one shear modulus; tiny; nearly of one k, both ways
    (Phase(3.5, 0.35), Phase(70.0, 0.22)),
    (Phase(70.0, 0.22), Phase(3.5, 0.35)),
    (Phase(1.0, -0.4), Phase(20.0, 0.45)),
    (Phase(2.6, 0.3), Phase(2.4, 0.2)),
    (Phase(1e-6, 0.3), Phase(1e-4, 0.2)),
    (Phase(3.5, 0.35), Phase(7.62, 0.1)),
    (Phase(7.62, 0.1), Phase(3.5, 0.35)),
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


def said(scale, seed=7):
    """Random images of blocks (200, 1, 8, 8), two of them homogeneous, and what a network may say of them (200, 6)."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    images = rng.random((200, 1, 8, 8)) < rng.random((200, 1, 1, 1))
    images[0], images[1] = False, True  # homogeneous: both bounds are that phase
    return images, torch.from_numpy(rng.normal(scale=scale, size=(200, 6)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_tensor_lies_between_the_bounds_whatever_the_network_says(pair, scale):
    images, six = said(scale)
    found = Physics("bounded", constants(*pair), NAMES)(six, torch.from_numpy(images).double()).numpy()
    phases = dict(zip(("matrix", "inclusion"), pair, strict=True))
    for image, full in zip(images, tensor(found, NAMES), strict=True):
        size = np.abs(full).max()
        for gap in (voigt(image.mean(), **phases) - full, full - reuss(image.mean(), **phases)):
            assert np.linalg.eigvalsh(gap)[0] > -1e-9 * size
    hill = analysis.hill_residuals(found, NAMES, images.mean(axis=(1, 2, 3)), phases)
    np.testing.assert_allclose(hill, 0, rtol=0, atol=1e-9 * np.abs(found).max())
    # And as Hill 1964 writes them, which loses digits where the phases' k nearly agree.
    (l_m, mu_m), (l_f, mu_f) = ((phase.lame_lambda, phase.lame_mu) for phase in pair)
    k_m, k_f, f = l_m + mu_m, l_f + mu_f, images.mean(axis=(1, 2, 3))
    e = -(l_f - l_m) / (2 * (k_f - k_m))
    c11, c22, c33, c12, c23, c13 = found.T[:6]
    for component, other in ((c13, c11), (c23, c22)):
        expected = l_m + 2 * k_m * e - e * (other + c12)
        np.testing.assert_allclose(component, expected, rtol=0, atol=1e-9 * (1 + abs(e)) * np.abs(found).max())
    mean_l, mean_mu = l_m + f * (l_f - l_m), mu_m + f * (mu_f - mu_m)
    expected = mean_l + 2 * mean_mu + 2 * e * mean_l - e * (c13 + c23)
    np.testing.assert_allclose(c33, expected, rtol=0, atol=1e-9 * (1 + abs(e)) * np.abs(found).max())
    np.testing.assert_allclose(found[0], nine(pair[0].stiffness), rtol=1e-9, atol=0)
    np.testing.assert_allclose(found[1], nine(pair[1].stiffness), rtol=1e-9, atol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_single_precision_loses_no_digits_however_near_the_phases_are(pair):
    images, six = said(3.0)
    physics, phases = Physics("bounded", constants(*pair), NAMES), dict(zip(("matrix", "inclusion"), pair, strict=True))
    found = physics(six.float(), torch.from_numpy(images).float()).numpy().astype(np.float64)
    exact = physics(six.float().double(), torch.from_numpy(images).double()).numpy()
    size = np.abs(exact).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / size, exact / size, rtol=0, atol=3e-6)
    checked = analysis.physics(found, NAMES, images.mean(axis=(1, 2, 3)), phases)
    assert (checked["above_voigt"], checked["below_reuss"]) == (0, 0)


def test_where_there_is_no_way_between_the_bounds_the_place_is_the_middle():
    """As in homogeneous cells, whose volume fraction is 0 or 1 but for rounding, and phases of one shear modulus."""
    for pair, fractions in ((PAIRS[0], np.array([0.0, 1.0, 1e-14, 1 - 1e-14])), (PAIRS[3], np.array([0.4]))):
        physics = Physics("bounded", constants(*pair), NAMES)
        labels = np.stack([nine(pair[round(f)].stiffness) for f in fractions]) * (1 + 1e-12)
        six = physics.six(labels, fractions)
        np.testing.assert_array_equal(six[:, 1:], 0)


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


@pytest.mark.parametrize("kind", ["none", "hill", "bounded"])
def test_an_image_that_is_not_of_two_phases_is_predicted_only_without_physics(tmp_path, kind):
    spec, shape = PeriodicSpec(width=2, depth=1, head=0, symmetric=False, physics=kind), (1, 8, 8)
    physics = None if kind == "none" else Physics(kind, constants(*PAIRS[0]), COMPONENTS)
    outputs = 9 if physics is None else 6
    model = Regressor(build(spec, shape, 9), torch.zeros(outputs), torch.ones(outputs), physics=physics)
    bundle.save(tmp_path, model, model=to_dict(spec), image_shape=shape, target_names=COMPONENTS, unit="GPa")
    pixels = cell(0, 8).astype(np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "two.png")
    pixels[3, 4:6] = 1, 128
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    assert len(files.predict(tmp_path, [tmp_path / "two.png"])) == 1
    if physics is None:
        files.predict(tmp_path, [tmp_path / "grey.png"])
        return
    with pytest.raises(ModelError, match=r"grey.png: expected pixels of 0 and 255 alone, found 2 of 64 in between"):
        files.predict(tmp_path, [tmp_path / "two.png", tmp_path / "grey.png"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phases": None}, "and none: set model.physics"),
        ({"target_names": ("C11", "C22")}, "expected the nine components .* found C11, C22"),
        (
            {"phases": constants(Phase(10.0, 0.3), Phase(10.0, 0.3))},
            "phases whose lambda \\+ mu differ by more than 0.1%",
        ),
    ],
)
def test_physics_that_cannot_be_known_are_refused(change, message):
    given = {"phases": constants(*PAIRS[0]), "target_names": NAMES} | change
    with pytest.raises(SpecError, match=message):
        Physics("bounded", **given)
