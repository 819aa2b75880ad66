"""Networks of stages for images of any kind: their edges, their sizes, and what training may do to an image."""

import dataclasses
import itertools
import math
from functools import partial

import cells
import numpy as np
import pytest
import torch
from test_training import SEED, SHORT, TRAIN, VALIDATION, check_resuming, numbers
from torch.nn import functional as F

from hpo import study
from hpo.errors import StudyError
from hpo.worker.packaging import package
from models import bundle, stages
from models.distortion import Distortion
from models.networks import build, parameter_count
from models.regressor import Regressor, predict
from models.sizes import size
from models.specs import ConvSpec, PeriodicSpec, SpecError, TrainingSpec, TransferSpec, to_dict
from models.symmetry import Augmentation, elements
from models.together import check_together
from models.training import Training

PADDINGS = {"circular": "circular", "reflect": "reflect", "zeros": "constant"}
STILL = torch.zeros(1, 5)  # draws that change nothing


@pytest.mark.parametrize(("padding", "mode"), PADDINGS.items())
@pytest.mark.parametrize("amounts", [(0, 0, 0), (1, 0, 0), (0, 1, 2), (3, 2, 0)])
def test_an_image_is_continued_in_the_stated_way_and_keeps_its_memory_format(padding, mode, amounts):
    pixels, rows, columns = amounts
    images = torch.rand(2, 3, 6, 7).to(memory_format=torch.channels_last)
    continued = stages.PADDINGS[padding](images, pixels, rows, columns)
    expected = F.pad(images, [pixels, pixels + columns, pixels, pixels + rows], mode=mode) if sum(amounts) else images
    assert torch.equal(continued, expected)
    assert continued.is_contiguous(memory_format=torch.channels_last)


SPECS = [
    ConvSpec(width=w, depth=d, kernel_size=k, stride=s, padding=p, normalisation=n, dropout=0.2)
    for w, d, k, s, p, n in itertools.product((3, 8), (1, 3), (1, 3, 5), (1, 2, 3), PADDINGS, ("batch", "none"))
]


def test_the_size_in_closed_form_is_that_of_the_network_for_images_of_any_shape():
    for image, targets, inputs in (((3, 67, 53), 2, 2), ((1, 54, 54), 9, 0)):
        for spec in SPECS:
            if spec.padding == "circular" and image[1] % spec.stride:
                continue
            network = build(spec, image, targets, inputs)
            assert size(spec, image, targets, inputs).parameters == parameter_count(network), spec


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (5, 2), (3, 3)])
def test_the_smallest_image_that_is_taken_works_and_a_smaller_one_is_refused(padding, kernel_size, stride):
    spec = ConvSpec(width=2, depth=2, kernel_size=kernel_size, stride=stride, padding=padding)
    sides = range(stride, 60, stride)

    def fits(side):
        try:
            return build(spec, (1, side, side), 1)
        except SpecError as error:
            assert "conv: expected images of at least" in str(error)

    side = next(side for side in sides if fits(side))
    assert fits(side)(torch.rand(2, 1, side, side)).isfinite().all()
    assert not any(fits(smaller) for smaller in sides if smaller < side)


def test_periodic_networks_are_a_case_of_these():
    images = torch.from_numpy(cells.blocks(3, 20, seed=SEED))
    outputs = []
    for spec in (PeriodicSpec(width=4), ConvSpec(width=4, padding="circular", symmetric=True)):
        torch.manual_seed(SEED)
        outputs.append(build(spec, (1, 20, 20), 9)(images))
    assert torch.equal(*outputs)
    assert "padding" not in to_dict(PeriodicSpec()) and "dropout" not in to_dict(PeriodicSpec())


def test_a_colour_image_of_odd_sides_goes_through_training_packaging_and_loading(tmp_path):
    rng = np.random.default_rng(SEED)
    images = rng.random((24, 3, 21, 34), dtype=np.float32)
    targets = np.column_stack([images[:, 0].mean((1, 2)), images[:, 2].std((1, 2))]).astype(np.float64)
    spec = ConvSpec(width=4, depth=2, padding="reflect", dropout=0.1)
    run = Training(
        spec, TrainingSpec(epochs=2, batch_size=8), train=(images, targets), validation=(images[:8], targets[:8])
    )
    list(run.epochs())
    trained = run.best_regressor()
    package(
        tmp_path / "model",
        trained,
        spec=to_dict(spec),
        image_shape=(3, 21, 34),
        target_names=("a", "b"),
        unit="1",
        example_images=images[:2],
    )
    loaded, description = bundle.load(tmp_path / "model")
    assert isinstance(loaded, Regressor)
    np.testing.assert_array_equal(predict(loaded, images), predict(trained, images))
    with pytest.raises(SpecError, match=r"expected \(channels, height, width\) = \(3, 21, 34\)"):
        bundle.check_shape(description, (3, 21, 35))


FILE = """
[model]
family = "conv"
{model}
[space]
width = [4, 8]
{space}
[training]
{training}
"""


def load(tmp_path, model="", space="", training=""):
    (tmp_path / "any.toml").write_text(FILE.format(model=model, space=space, training=training))
    return study.load(str(tmp_path / "any.toml"))


def test_the_data_decide_how_images_are_continued_unless_the_file_says_it(tmp_path):
    chosen = load(tmp_path)
    assert chosen.model["padding"] == "data"
    suited = partial(chosen.suited, has_symmetries=False)
    assert suited(is_periodic=True).model["padding"] == "circular"
    assert suited(is_periodic=False).model["padding"] == "reflect"
    assert suited(is_periodic=True).needs_periodic_images()
    stated = load(tmp_path, 'padding = "zeros"')
    assert stated.suited(is_periodic=True, has_symmetries=True) == stated
    with pytest.raises(SpecError, match="stands for what the data say"):
        build(ConvSpec(), (1, 20, 20), 1)
    with pytest.raises(StudyError, match=r"space.padding: 'data' stands for one of the others"):
        load(tmp_path, space='padding = ["data", "zeros"]')
    with pytest.raises(StudyError, match=r"padding = 'mirror'; expected one of 'data', 'circular', 'reflect', 'zeros'"):
        load(tmp_path, 'padding = "mirror"')


def test_images_that_do_not_wrap_around_are_flipped_but_not_shifted():
    symmetries = {"flip_vertical": (0,), "flip_horizontal": (0,)}
    moves, images = elements(symmetries, (1, 5, 7), 1), torch.rand(40, 1, 5, 7)
    augmentation = Augmentation(moves, images.shape, torch.device("cpu"), shifts=False)
    draws = augmentation.draw(len(images))
    assert set(draws[:, 0].tolist()) == {0, 1, 2, 3} and not draws[:, 1:].any()
    for image, moved, (number, _, _) in zip(images, augmentation(images, draws), draws.tolist(), strict=True):
        assert torch.equal(moved, moves[number].move(image[None])[0])


def test_the_data_decide_how_training_images_are_moved_unless_the_file_says_it(tmp_path):
    chosen = load(tmp_path, training='augmentation = "data"')
    for is_periodic, has_symmetries, moved in (
        (True, True, "symmetry"),
        (False, True, "symmetry"),
        (True, False, "shift"),
        (False, False, "none"),
    ):
        suited = chosen.suited(is_periodic=is_periodic, has_symmetries=has_symmetries)
        assert suited.training["augmentation"] == moved
        assert suited.needs_symmetries() == has_symmetries and suited.needs_periodic_images() == is_periodic
    stated = load(tmp_path, 'padding = "zeros"', training='augmentation = "shift"')
    assert stated.suited(is_periodic=False, has_symmetries=True) == stated and stated.needs_periodic_images()
    with pytest.raises(StudyError, match=r"space.augmentation: 'data' stands for one of the others"):
        load(tmp_path, space='augmentation = ["data", "none"]')


def test_shifts_alone_change_no_target_and_need_images_that_wrap_around():
    moved = dataclasses.replace(SHORT, augmentation="shift")
    images, targets = cells.blocks(24, 16, seed=SEED), np.arange(24.0)[:, None]
    run = partial(
        Training, ConvSpec(depth=2, padding="circular"), train=(images, targets), validation=(images, targets), seed=0
    )
    training = run(moved)
    batch = training._train.shuffle(24, 2)[0]
    seen, scaled, _ = training._train.take(batch)
    assert torch.equal(scaled, training._train.targets[batch.numbers])
    assert not torch.equal(seen, torch.from_numpy(images)[batch.numbers])
    for image, number in zip(seen, batch.numbers.tolist(), strict=True):
        rolled = [np.roll(images[number], (down, right), (1, 2)) for down in range(16) for right in range(16)]
        assert any(np.array_equal(image.numpy(), each) for each in rolled)
    with pytest.raises(SpecError, match="expected images that wrap around"):
        run(moved, periodic=False)
    with pytest.raises(SpecError, match="stands for what the data say"):
        run(dataclasses.replace(SHORT, augmentation="data"))


EVERYTHING = TrainingSpec(
    epochs=SHORT.epochs, batch_size=8, learning_rate=1e-2, rotation=10.0, crop=0.8, brightness=0.1, noise=0.05
)


@pytest.mark.parametrize("augmentation", ["none", "symmetry"])
def test_a_training_with_changed_images_is_resumed_to_the_bit(tmp_path, augmentation):
    short = TrainingSpec(**{**vars(EVERYTHING), "augmentation": augmentation})
    symmetries = {"flip_vertical": (0, 1, 2), "flip_horizontal": (0, 1, 2), "transpose": (0, 2, 1)}
    spec = ConvSpec(width=4, depth=2, head=8, padding="zeros", dropout=0.2)
    check_resuming(tmp_path, spec=spec, short=short, symmetries=symmetries, periodic=False)


def test_each_change_of_the_images_changes_what_is_trained():
    def curve(**changes):
        run = Training(
            ConvSpec(width=4, depth=1, padding="zeros"),
            TrainingSpec(epochs=1, batch_size=8, **changes),
            train=TRAIN,
            validation=VALIDATION,
            seed=SEED,
        )
        return [numbers(epoch)[2]["train/nmse"] for epoch in run.epochs()]

    settings = ({}, {"rotation": 10.0}, {"crop": 0.8}, {"brightness": 0.1}, {"noise": 0.05})
    curves = [curve(**changes) for changes in settings]
    assert len({tuple(values) for values in curves}) == len(settings)


def drawn(**draws):
    places = {"angle": 0, "magnification": 1, "right": 2, "down": 3, "brightness": 4}
    row = STILL.clone()
    for name, value in draws.items():
        row[0, places[name]] = value
    return row


def changed(images, draws, **settings):
    return Distortion(TrainingSpec(**settings))(images, draws.expand(len(images), -1))


def test_a_turn_by_a_right_angle_is_exact_and_no_turn_changes_nothing():
    images = torch.rand(3, 2, 8, 8)
    turned = changed(images, drawn(angle=0.5), rotation=180.0)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed(images, STILL, rotation=30.0), images, atol=1e-5, rtol=0)


def test_a_turn_keeps_a_round_inclusion_in_an_image_of_unequal_sides():
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(32.0), indexing="ij")
    distance = torch.hypot(rows - 23.5, columns - 15.5)
    disc, seen = torch.sigmoid(8 - distance)[None, None], distance < 15  # beyond, the image is reflected
    for angle in (0.1, 0.25, -0.4):
        assert (changed(disc, drawn(angle=angle), rotation=180.0) - disc)[0, 0, seen].abs().max() < 0.03


@pytest.mark.parametrize(("right", "down"), [(0.0, 0.0), (1.0, -1.0), (-1.0, 0.5)])
def test_a_crop_magnifies_that_part_of_the_image(right, down):
    """On a ramp the value at each place follows in closed form."""
    ramp = torch.linspace(0.01, 0.99, 50).expand(1, 1, 50, 50)
    cropped = changed(ramp, drawn(magnification=1.0, right=right, down=down), crop=0.5)
    places = (torch.arange(50) + 0.5) / 50 * 2 - 1  # of pixel centres, -1..1
    expected = 0.5 + (places * 0.5 + 0.5 * right) * 0.5 * 0.98 * 50 / 49
    inner = slice(2, -2)  # beyond the centres of the pixels at the edge the ramp turns back
    torch.testing.assert_close(cropped[0, 0, 25, inner], expected[inner].float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(changed(ramp, drawn(magnification=-1.0), crop=0.5), ramp, atol=1e-5, rtol=0)


def test_brightness_and_noise_have_the_stated_size_and_stay_between_0_and_1():
    grey = torch.full((64, 1, 32, 32), 0.5)
    torch.testing.assert_close(changed(grey, drawn(brightness=-1.0), brightness=0.2), grey - 0.2)
    assert changed(grey, drawn(brightness=1.0), brightness=0.9).max() == 1
    torch.manual_seed(SEED)
    noisy = changed(grey, STILL, noise=0.05)
    deviation, n = (noisy - 0.5).std().item(), noisy.numel()
    assert abs(deviation - 0.05) < 5 * 0.05 / math.sqrt(2 * n), f"seed {SEED}"


@pytest.mark.parametrize("change", [{"rotation": 5.0}, {"crop": 0.9}, {"brightness": 0.1}, {"noise": 0.1}])
def test_models_that_need_the_images_as_they_are_refuse_changed_ones(change):
    (name,) = change
    with pytest.raises(SpecError, match=f"training: {name}: the features of a frozen backbone"):
        check_together(TransferSpec(backbone="vgg16"), TrainingSpec(**change))
    with pytest.raises(SpecError, match=f"training: {name}: model.physics computes with the phases"):
        check_together(PeriodicSpec(physics="hill"), TrainingSpec(**change))
    check_together(ConvSpec(), TrainingSpec(**change))
