"""The effective stiffness against reference values, closed forms, and what holds for any image."""

import json

import numpy as np
import pytest
from PIL import Image
from places import REFERENCE

from data_pipeline.components import COMPONENTS, COUPLINGS, SYMMETRIES, vector
from data_pipeline.homogenize import Phase, homogenize, reuss, voigt

VALUES = json.loads((REFERENCE / "homogenization.json").read_text())
MATRIX, INCLUSION = Phase(3.5, 0.35), Phase(70.0, 0.22)
CASES = [(material, image) for material, images in VALUES["values"].items() for image in images]
EXACT = 1e-10  # of the largest entry


def phases(material: str) -> dict[str, Phase]:
    constants = VALUES["materials"][material]
    return {
        "matrix": Phase(constants["E_m"], constants["nu_m"]),
        "inclusion": Phase(constants["E_f"], constants["nu_f"]),
    }


def reference_image(name: str) -> np.ndarray:
    return np.array(Image.open(REFERENCE / "images" / f"{name}.png"))


def blobs(seed: int, shape: tuple[int, int] = (24, 24)) -> np.ndarray:
    """An image without any symmetry: noise, smoothed a little, thresholded."""
    print(f"blobs of seed {seed}")
    noise = np.random.default_rng(seed).random(shape)
    smooth = sum(np.roll(noise, (i, j), (0, 1)) for i in range(3) for j in range(3))
    return smooth > np.median(smooth)


def stiffness(image: np.ndarray, subdivisions: int = 1) -> np.ndarray:
    return homogenize(image, matrix=MATRIX, inclusion=INCLUSION, subdivisions=subdivisions)


@pytest.mark.parametrize("subdivisions", [1, 2])
@pytest.mark.parametrize(("material", "image"), CASES)
def test_reference_values_come_out_to_1e_8_of_the_largest_entry(material, image, subdivisions):
    expected = np.array(VALUES["values"][material][image][f"one_point_{64 * subdivisions}"])
    tensor = homogenize(reference_image(image), **phases(material), subdivisions=subdivisions)
    assert np.abs(vector(tensor, COMPONENTS + COUPLINGS) - expected).max() < 1e-8 * expected.max()


@pytest.mark.parametrize("material", VALUES["materials"])
def test_a_phases_lame_constants_are_the_references(material):
    constants = VALUES["materials"][material]
    for name, phase in zip("mf", phases(material).values(), strict=True):
        assert phase.lame_lambda == pytest.approx(constants[f"lambda_{name}"], rel=1e-14)
        assert phase.lame_mu == pytest.approx(constants[f"mu_{name}"], rel=1e-14)


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (6, 9), (1, 4), (1, 1), (2, 2)])
@pytest.mark.parametrize(("value", "phase"), [(0, MATRIX), (255, INCLUSION)])
def test_a_homogeneous_cell_has_the_stiffness_of_its_phase(shape, value, phase):
    tensor = stiffness(np.full(shape, value, dtype=np.uint8))
    assert np.abs(tensor - phase.stiffness).max() < EXACT * phase.stiffness.max()


@pytest.mark.parametrize("subdivisions", [1, 2])
@pytest.mark.parametrize(("shape", "layers"), [((6, 16), 5), ((5, 9), 4), ((1, 7), 3)])
def test_a_laminate_has_its_closed_form(shape, layers, subdivisions):
    image = np.zeros(shape, dtype=bool)
    image[:, :layers] = True
    fraction = layers / shape[1]

    def mean(of_matrix, of_inclusion):
        return (1 - fraction) * of_matrix + fraction * of_inclusion

    # Layers normal to axis 1 (Backus average), m = lambda + 2 mu.
    (lm, gm), (lf, gf) = ((phase.lame_lambda, phase.lame_mu) for phase in (MATRIX, INCLUSION))
    c11 = 1 / mean(1 / (lm + 2 * gm), 1 / (lf + 2 * gf))
    ratio = mean(lm / (lm + 2 * gm), lf / (lf + 2 * gf))
    c12 = ratio * c11
    c23 = mean(lm - lm**2 / (lm + 2 * gm), lf - lf**2 / (lf + 2 * gf)) + ratio**2 * c11
    c22 = c23 + 2 * mean(gm, gf)
    shear = 1 / mean(1 / gm, 1 / gf)
    expected = np.array([c11, c22, c22, c12, c23, c12, mean(gm, gf), shear, shear, 0, 0, 0, 0])
    computed = vector(stiffness(image, subdivisions), COMPONENTS + COUPLINGS)
    assert np.abs(computed - expected).max() < EXACT * expected.max()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_shift_of_the_periodic_cell_changes_nothing(seed):
    image = blobs(seed)
    assert (
        np.abs(stiffness(np.roll(image, (5, 11), (0, 1))) - stiffness(image)).max() < EXACT * INCLUSION.stiffness.max()
    )


SIGN_1 = np.diag([1, 1, 1, 1, -1, -1])  # axis 1 reversed, in Voigt order 11, 22, 33, 23, 13, 12
SIGN_2 = np.diag([1, 1, 1, -1, 1, -1])
SWAP = np.eye(6)[[1, 0, 2, 4, 3, 5]]
TRANSFORMED = {
    "flip_horizontal": (np.fliplr, SIGN_1),
    "flip_vertical": (np.flipud, SIGN_2),
    "transpose": (np.transpose, SWAP),
    "quarter_turn": (np.rot90, SIGN_2 @ SWAP),
}


@pytest.mark.parametrize("shape", [(24, 24), (15, 15)])
@pytest.mark.parametrize("name", SYMMETRIES)
def test_the_tensor_goes_where_the_image_goes(name, shape):
    image = blobs(3, shape)
    transform, rotation = TRANSFORMED[name]
    before, after = stiffness(image), stiffness(transform(image))
    assert np.abs(before[[0, 0, 1, 3], [1, 5, 5, 4]]).min() > 1e-3  # nothing vanishes by a symmetry of the image
    assert np.abs(after - rotation @ before @ rotation.T).max() < EXACT * before.max()
    assert np.abs(vector(after) - vector(before)[..., list(SYMMETRIES[name])]).max() < EXACT * before.max()


@pytest.mark.parametrize(("seed", "shape"), [(4, (24, 24)), (5, (15, 15)), (6, (10, 21)), (7, (1, 12)), (8, (2, 3))])
def test_effective_stiffness_lies_between_reuss_and_voigt_as_matrices(seed, shape):
    image = blobs(seed, shape)
    tensor = stiffness(image, 2)
    bounds = {"matrix": MATRIX, "inclusion": INCLUSION}
    upper, lower = voigt(image.mean(), **bounds), reuss(image.mean(), **bounds)
    assert np.linalg.eigvalsh(upper - tensor).min() > -EXACT * upper.max()
    assert np.linalg.eigvalsh(tensor - lower).min() > -EXACT * upper.max()
    assert np.linalg.eigvalsh(upper - lower).max() > 1  # GPa: the bounds are apart
    assert np.array_equal(tensor, tensor.T)


@pytest.mark.parametrize(("material", "image"), CASES)
def test_hills_two_phase_relations_hold_to_rounding(material, image):
    pixels, constants = reference_image(image), VALUES["materials"][material]
    lm, mm, lf, mf = (constants[key] for key in ("lambda_m", "mu_m", "lambda_f", "mu_f"))
    k_m, k_f = lm + mm, lf + mf
    e = -(lf - lm) / (2 * (k_f - k_m))
    s = 2 * k_m * e + lm
    fraction = (pixels == 255).mean()
    mean_l, mean_p = lm + fraction * (lf - lm), lm + 2 * mm + fraction * (lf + 2 * mf - lm - 2 * mm)
    tensor = homogenize(pixels, **phases(material), subdivisions=1)
    c11, c22, c33, c12, c23, c13 = vector(tensor)[:6]
    assert abs(c13 - (s - e * (c11 + c12))) < EXACT * tensor.max()
    assert abs(c23 - (s - e * (c12 + c22))) < EXACT * tensor.max()
    assert abs(c33 - (mean_p + 2 * e * mean_l - e * (c13 + c23))) < EXACT * tensor.max()


def test_the_stiffness_does_not_depend_on_the_way_the_image_says_inclusion():
    image = blobs(9)
    assert np.array_equal(stiffness(image), stiffness(image.astype(np.uint8)))
    assert np.array_equal(stiffness(image), stiffness(image.astype(np.uint8) * np.uint8(255)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.array([[0, 128, 255]], dtype=np.uint8), r"pixels 0 and 255 .* found \[0, 128, 255\]"),
        (np.zeros((4, 4)), "bool or uint8, found .* float64"),
        (np.zeros((2, 4, 4), dtype=bool), r"\(h, w\)"),
        (np.zeros((0, 4), dtype=bool), "non-empty"),
    ],
)
def test_an_image_that_is_not_two_phase_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        stiffness(image)


@pytest.mark.parametrize(
    ("young", "poisson"), [(0, 0.3), (-1, 0.3), (1, 0.5), (1, -1), (float("nan"), 0.3), ("1", 0.3)]
)
def test_a_phase_that_no_stable_material_has_is_refused(young, poisson):
    with pytest.raises(ValueError, match="expected"):
        Phase(young, poisson)
