"""Networks for periodic cells: their layers, their size, and how image and targets move together."""

import itertools
import json

import cells
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipeline import target_moves
from data_pipeline.components import COMPONENTS, COUPLINGS, SYMMETRIES, vector
from data_pipeline.homogenize import homogenize
from data_pipeline.phase import Phase
from hpo.tracking.foreign import PT2
from hpo.worker.packaging import package
from models import bundle
from models.networks import build, parameter_count
from models.regressor import Regressor, predict
from models.sizes import size
from models.specs import PeriodicSpec, SpecError, from_dict, to_dict
from models.stages import wrap
from models.symmetry import Augmentation, elements

SEED = 3
SPEC = PeriodicSpec(width=4, depth=2, head=8, stride=1)
SHAPE = (1, 16, 16)
CLOSE = 2e-6  # of the largest prediction: other batches and strides round differently
MOVED = {"flip_vertical": np.flipud, "flip_horizontal": np.fliplr, "transpose": np.transpose, "quarter_turn": np.rot90}


def network(spec=SPEC, shape=SHAPE, targets=9):
    """One whose batch-norms have seen something, and whose biases are not zero."""
    torch.manual_seed(SEED)
    made = build(spec, shape, targets)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(3):
            made.train()(torch.rand(8, *shape))
    return made.eval()


def regressor(spec=SPEC):
    """In GPa, with another mean and scale for each target."""
    made = network(spec)
    with torch.no_grad():
        made.head.weight *= 10  # else a random network says nearly the same of all images
    mean, scale = torch.linspace(5, 30, 9), torch.linspace(1, 10, 9)
    return Regressor(made, mean, scale, symmetries=SYMMETRIES, image_shape=SHAPE).eval()


def assert_close(found, expected, close=CLOSE):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=close * np.abs(expected).max())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("normalisation", "activation"), [("batch", "gelu"), ("group", "silu"), ("none", "relu")])
def test_the_network_computes_its_layers_in_both_memory_formats(normalisation, activation, channels_last):
    spec = PeriodicSpec(
        width=3, depth=2, kernel_size=5, stride=1, normalisation=normalisation, activation=activation, head=7
    )
    shape = (2, 12, 20)
    made = network(spec, shape)
    w = {name: tensor.clone().contiguous().double() for name, tensor in made.state_dict().items()}

    def block(name, x):
        kernel, bias = w[f"{name}.convolution.weight"], w.get(f"{name}.convolution.bias")
        x = F.conv2d(F.pad(x, [2] * 4, mode="circular"), kernel, bias)
        if normalisation != "none":
            numbers = [w[f"{name}.normalisation.{key}"] for key in ("weight", "bias")]
            if normalisation == "group":
                x = F.group_norm(x, np.gcd(8, x.shape[1]), *numbers)
            else:
                averages = [w[f"{name}.normalisation.running_{key}"] for key in ("mean", "var")]
                x = F.batch_norm(x, *averages, *numbers)
        return getattr(F, activation)(x)

    images = torch.rand(5, *shape)
    hidden = images.double()
    for stage in range(2):
        hidden = F.avg_pool2d(block(f"stages.{stage}.first", hidden), 2)
        hidden = hidden + block(f"stages.{stage}.second", hidden)
    seen = torch.cat([hidden.mean((2, 3)), images.double().mean((2, 3))], dim=1)
    seen = getattr(F, activation)(F.linear(seen, w["dense.0.weight"], w["dense.0.bias"]))
    expected = F.linear(seen, w["head.weight"], w["head.bias"]).numpy()
    if channels_last:
        made = made.to(memory_format=torch.channels_last)
    assert_close(made(images).detach().numpy(), expected, 1e-5)


def test_an_image_is_continued_periodically_and_keeps_its_memory_format():
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for pixels in (0, 1, 4):
        found = wrap(images, pixels)
        assert torch.equal(found, F.pad(images, [pixels] * 4, mode="circular"))
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_stride_makes_the_first_convolution_the_one_of_the_image_cut_into_patches():
    spec = PeriodicSpec(width=3, depth=1, kernel_size=3, stride=2)
    first = network(spec).stages[0].first.convolution
    images = torch.rand(4, *SHAPE)
    patches = F.pixel_unshuffle(images, 2)  # their four pixels as channels
    kernel = F.pixel_unshuffle(first.weight, 2)
    expected = F.conv2d(F.pad(patches, [1] * 4, mode="circular"), kernel)
    assert_close(first(wrap(images, 2)).detach().numpy(), expected.detach().numpy())
    with pytest.raises(SpecError, match="stride = 2: expected images whose sides are multiples of it, found 16x15"):
        build(spec, (1, 16, 15), 9)


SPECS = [
    PeriodicSpec(width=w, depth=d, kernel_size=k, stride=s, normalisation=n, head=h, volume_fraction=v)
    for w, d, k, s, n, h, v in itertools.product(
        (3, 16), (1, 3), (3, 5), (1, 2), ("batch", "none"), (0, 10), (True, False)
    )
]


def test_the_size_in_closed_form_is_that_of_the_network_built():
    for image, targets in (((1, 64, 64), 9), ((2, 22, 34), 4)):
        for spec in SPECS:
            assert size(spec, image, targets).parameters == parameter_count(build(spec, image, targets)), spec


def test_the_default_network_has_the_parameters_and_multiply_adds_counted_by_hand():
    # in, out, pixels a side of what comes out; the first kernel has 6x6 pixels, as 3x3 of four channels would
    convolutions = [(4, 24, 32), (24, 24, 16), (24, 48, 16), (48, 48, 8), (48, 96, 8), (96, 96, 4)]
    head = 97 * 64 + 64 * 9
    found = size(PeriodicSpec(), (1, 64, 64), 9)
    assert found.parameters == 9 * sum(i * o for i, o, _ in convolutions) + 2 * 2 * (24 + 48 + 96) + head + 64 + 9
    assert found.parameters == 169_097
    assert found.multiply_adds == 9 * sum(i * o * side**2 for i, o, side in convolutions) + head


@pytest.mark.parametrize(("kernel_size", "side"), [(3, 5), (9, 13)])
def test_an_image_one_pixel_too_small_for_the_last_convolution_is_refused(kernel_size, side):
    spec = PeriodicSpec(width=2, depth=2, kernel_size=kernel_size, stride=1)
    build(spec, (1, side, side), 1)(torch.rand(2, 1, side, side))
    with pytest.raises(SpecError, match=f"periodic: expected images of at least {side}x{side} pixels, found"):
        build(spec, (1, side, side - 1), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"normalization": "batch"},
            r"unknown key 'normalization' \(did you mean 'normalisation'\?\); valid keys: width, depth, kernel_s",
        ),
        ({"activation": "gleu"}, r"'gleu' \(did you mean 'gelu'\?\); expected one of 'relu', 'gelu', 'silu'"),
        ({"depth": 0}, "depth = 0; expected a whole number, at least 1 and at most 6"),
        ({"symmetric": 1}, "symmetric = 1; expected true or false"),
        ({"volume_fraction": "yes"}, "volume_fraction = 'yes'; expected true or false"),
        ({"head": True}, "head = True; expected a whole number"),
    ],
)
def test_a_wrong_key_is_named_with_what_it_may_hold(change, message):
    with pytest.raises(SpecError, match=message):
        from_dict({"family": "periodic"} | change)


def test_the_specification_survives_the_way_through_its_dict_and_needs_no_key():
    assert from_dict(to_dict(SPEC)) == SPEC
    assert from_dict({"family": "periodic"}) == PeriodicSpec()


def test_a_shift_by_the_networks_stride_changes_nothing_and_another_shift_something():
    images = torch.from_numpy(cells.blocks(4, 16, seed=SEED))
    made = network()
    with torch.no_grad():
        before = made(images).numpy()
        for shift in ((4, 0), (0, 8), (12, 4)):
            assert_close(made(images.roll(shift, (2, 3))).numpy(), before)
        assert np.abs(made(images.roll((1, 2), (2, 3))).numpy() - before).max() > 100 * CLOSE * np.abs(before).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("periodic") / "model"
    package(
        folder,
        regressor(),
        spec=to_dict(SPEC),
        image_shape=SHAPE,
        target_names=COMPONENTS,
        unit="GPa",
        example_images=cells.blocks(2, 16, seed=SEED),
    )
    return folder


@pytest.mark.parametrize("name", SYMMETRIES)
def test_the_loaded_models_predictions_go_where_the_image_goes(folder, name):
    model, _ = bundle.load(folder)
    images = cells.blocks(5, 16, seed=SEED)
    moved = np.stack([MOVED[name](image) for image in images[:, 0]])[:, None]
    before = predict(model, images)
    assert_close(predict(model, moved), before[:, list(SYMMETRIES[name])])
    bare = Regressor(model.network, model.target_mean, model.target_scale)  # which has no symmetry of its own
    assert np.abs(predict(bare, moved) - predict(bare, images)[:, list(SYMMETRIES[name])]).max() > 1e-3 * before.max()


def test_mlflow_pytorch_and_the_loaded_model_agree_for_any_batch_size(folder):
    import mlflow.pyfunc

    model, served = bundle.load(folder)[0], mlflow.pyfunc.load_model(str(folder))
    exported = torch.export.load(folder / PT2).module()
    for count in (1, 2, 70):
        images = cells.blocks(count, 16, seed=SEED)
        expected = predict(regressor(), images)
        assert_close(predict(model, images), expected)
        assert_close(served.predict(images), expected)
        assert_close(exported(torch.from_numpy(images)).detach().numpy(), expected)


@pytest.mark.parametrize(
    ("symmetries", "message"),
    [
        (None, '"symmetries": expected an object of lists, as the model needs it, found None'),
        ({"transpose": "no"}, '"symmetries": expected an object of lists'),
        ({}, "nothing is known of how the targets of this data set change"),
        ({"half_turn": list(range(9))}, "nothing is known of how the targets"),
        ({"transpose": [0] * 9}, r"symmetries: transpose: expected a permutation of 0 to 8, found \(0, 0"),
        ({"transpose": [*map(float, range(9))]}, "transpose: expected a permutation"),
        ({"flip_vertical": [0, 1]}, "flip_vertical: expected a permutation of 0 to 8"),
    ],
)
def test_a_model_whose_symmetries_are_missing_or_wrong_is_refused(tmp_path, symmetries, message):
    bundle.save(
        tmp_path, regressor(), model=to_dict(SPEC), image_shape=SHAPE, target_names=COMPONENTS, unit="GPa", extra=None
    )
    spec = json.loads((tmp_path / "spec.json").read_text())
    assert spec["symmetries"] == {name: list(order) for name, order in SYMMETRIES.items()}
    if symmetries is None:
        del spec["symmetries"]
    else:
        spec["symmetries"] = symmetries
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(SpecError, match=message):
        bundle.load(tmp_path)


def test_a_square_has_eight_symmetries_and_another_rectangle_four():
    eight = elements(SYMMETRIES, (1, 6, 6), 9)
    image = torch.arange(36.0).view(1, 1, 6, 6)
    assert len({tuple(each.move(image).flatten().tolist()) for each in eight}) == len(eight) == 8
    assert torch.equal(eight[0].move(image), image) and eight[0].order == tuple(range(9))
    flips = {name: SYMMETRIES[name] for name in ("flip_vertical", "flip_horizontal")}
    assert len(elements(flips, (1, 6, 4), 9)) == 4
    with pytest.raises(SpecError, match="transpose: expected a square image, found 6x4 pixels"):
        elements(SYMMETRIES, (1, 6, 4), 9)


def test_targets_go_with_the_image_and_back_in_the_right_order():
    # Permutations that do not commute tell flips-then-transposition from any other order.
    symmetries = {"flip_vertical": (1, 0, 2), "flip_horizontal": (0, 1, 2), "transpose": (0, 2, 1)}
    targets = torch.tensor([[1.0, 2.0, 3.0]])
    for each in elements(symmetries, (1, 2, 2), 3):
        expected = targets[:, [1, 0, 2]] if -2 in each.flips else targets
        expected = expected[:, [0, 2, 1]] if each.transposed else expected
        assert torch.equal(targets[:, list(each.order)], expected)
        assert torch.equal(each.undo(expected), targets)


@pytest.mark.parametrize("shape", [(16, 16), (8, 14)])
def test_the_solver_gives_moved_images_the_labels_that_augmentation_gives_them(shape):
    torch.manual_seed(SEED)
    symmetries = {name: order for name, order in SYMMETRIES.items() if "flip" in name or shape[0] == shape[1]}
    moves = elements(symmetries, (1, *shape), 9)
    image = np.random.default_rng(SEED).random(shape)
    image = sum(np.roll(image, (i, j), (0, 1)) for i in range(3) for j in range(3))
    image = image > np.median(image)

    def label(pixels):
        return vector(homogenize(pixels, matrix=Phase(3.5, 0.35), inclusion=Phase(70.0, 0.22), subdivisions=1))

    augmentation = Augmentation(moves, (1, *shape), torch.device("cpu"))
    draws = augmentation.draw(len(moves))
    draws[:, 0] = torch.arange(len(moves))  # each symmetry once, each with a shift of its own
    images = torch.from_numpy(image.astype(np.float32)).expand(len(moves), 1, *shape)
    before = label(image)
    for moved, (number, down, right) in zip(augmentation(images, draws), draws.tolist(), strict=True):
        by_hand = moves[number].move(images[:1].roll((down, right), (2, 3)))
        assert torch.equal(moved[None], by_hand)
        expected = before[list(moves[number].order)]
        assert np.abs(label(moved[0].numpy() > 0.5) - expected).max() < 1e-10 * before.max(), f"seed {SEED}"


def test_the_solver_gives_couplings_the_signs_that_a_description_states():
    names = COMPONENTS + COUPLINGS
    flips = {name: f"-{name}" for name in COUPLINGS}
    swaps = {"C11": "C22", "C13": "C23", "C44": "C55", "C16": "C26"}
    stated = target_moves.orders({"flip_horizontal": flips, "flip_vertical": flips, "transpose": swaps}, names)
    image = np.random.default_rng(SEED).random((8, 8)).repeat(2, axis=0).repeat(2, axis=1) > 0.5

    def label(pixels):
        return vector(homogenize(pixels, matrix=Phase(3.5, 0.35), inclusion=Phase(70.0, 0.22), subdivisions=1), names)

    before = label(image)
    for move in elements(stated, (1, 16, 16), len(names)):
        moved = move.move(torch.from_numpy(image[None, None].astype(np.float32)))[0, 0].numpy() > 0.5
        expected = move.moved(before[None])
        assert np.abs(label(moved) - expected[0]).max() < 1e-10 * before.max()
        assert np.array_equal(move.undo(torch.from_numpy(expected)).numpy()[0], before)


def test_every_symmetry_and_every_shift_is_drawn_as_often_as_every_other():
    torch.manual_seed(SEED)
    augmentation = Augmentation(elements(SYMMETRIES, (1, 4, 4), 9), (1, 4, 4), torch.device("cpu"))
    n = 12_800
    draws = augmentation.draw(n)
    counts = torch.bincount(draws @ torch.tensor([16, 4, 1]), minlength=128).double()
    assert len(counts) == 128
    chi_squared = ((counts - n / 128) ** 2 / (n / 128)).sum().item()
    assert abs(chi_squared - 127) < 5 * (2 * 127) ** 0.5, f"seed {SEED}"
