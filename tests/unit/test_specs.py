"""Model and training specifications: their dict form, their messages, and the protocol's parameter counts."""

import itertools
import subprocess
import sys

import pytest
import torch

from models.networks import build, parameter_count
from models.sizes import size
from models.specs import (
    BaselineSpec,
    CnnSpec,
    SpecError,
    TrainingSpec,
    from_dict,
    to_dict,
    training_from_dict,
    training_to_dict,
)

IMAGE = (1, 64, 64)  # channels, height, width of the protocol
TARGETS = 9
GRID = list(itertools.product((8, 16, 32), (3, 5), (0.0, 0.2), (1e-3, 1e-4)))  # the protocol's order


def cnn_parameters(filters: int, kernel_size: int, side: int = 64, targets: int = TARGETS) -> int:
    """Weights and biases of the protocol's tunable CNN, layer by layer."""
    first = filters * kernel_size**2 + filters
    second = 2 * filters * filters * kernel_size**2 + 2 * filters
    dense = (side // 4) ** 2 * 2 * filters * 64 + 64
    return first + second + dense + 64 * targets + targets


def test_the_baseline_has_the_parameter_count_of_the_protocol():
    assert parameter_count(build(BaselineSpec(), IMAGE, TARGETS)) == 51_593


def test_config_22_has_the_parameter_count_of_the_protocol():
    filters, kernel_size, dropout, learning_rate = GRID[22]
    assert (filters, kernel_size, dropout, learning_rate) == (32, 5, 0.2, 1e-3)
    spec = CnnSpec(filters=filters, kernel_size=kernel_size, dropout=dropout)
    assert parameter_count(build(spec, IMAGE, TARGETS)) == 1_101_321


def test_all_24_configurations_have_the_parameter_count_of_the_closed_form():
    assert len(GRID) == 24
    for filters, kernel_size, dropout, _ in GRID:
        network = build(CnnSpec(filters=filters, kernel_size=kernel_size, dropout=dropout), IMAGE, TARGETS)
        assert parameter_count(network) == cnn_parameters(filters, kernel_size)


def test_other_image_shapes_and_target_counts_are_built_as_they_come():
    network = build(CnnSpec(filters=2, kernel_size=3, dropout=0.0), (3, 21, 34), 4)
    assert network(torch.zeros(2, 3, 21, 34)).shape == (2, 4)
    assert build(BaselineSpec(), (1, 10, 10), 1)(torch.zeros(2, 1, 10, 10)).shape == (2, 1)


@pytest.mark.parametrize(("spec", "side"), [(BaselineSpec(), 10), (CnnSpec(filters=1, kernel_size=5, dropout=0.0), 4)])
def test_an_image_too_small_for_two_poolings_is_refused_and_one_pixel_more_is_not(spec, side):
    build(spec, (1, side, side), 1)
    with pytest.raises(SpecError, match=f"at least {side}x{side} pixels, found .*{side - 1}"):
        build(spec, (1, side, side - 1), 1)


@pytest.mark.parametrize("spec", [BaselineSpec(), CnnSpec(filters=16, kernel_size=5, dropout=0.2)])
def test_a_model_specification_survives_the_way_through_its_dict(spec):
    assert from_dict(to_dict(spec)) == spec


def test_a_training_specification_survives_its_dict_and_defaults_to_the_protocol():
    spec = TrainingSpec(epochs=7, batch_size=3, learning_rate=0.5, target_scaling="none")
    assert training_from_dict(training_to_dict(spec)) == spec
    assert training_from_dict({}) == TrainingSpec(
        epochs=300, batch_size=32, learning_rate=1e-3, target_scaling="standard"
    )


def test_a_whole_number_serves_where_a_number_is_expected():
    spec = from_dict({"family": "cnn", "filters": 8, "kernel_size": 3, "dropout": 0})
    assert isinstance(spec, CnnSpec)
    assert isinstance(spec.dropout, float)


GOOD = {"family": "cnn", "filters": 8, "kernel_size": 3, "dropout": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": None}, "model.family is missing; there are: baseline, cnn."),
        ({"family": "cn"}, r"model.family is 'cn' \(did you mean 'cnn'\?\); there are: baseline, cnn."),
        ({"family": ["cnn"]}, r"model.family is \['cnn'\]"),
        ({"family": "baseline"}, r"model \(baseline\): unknown key 'filters'; it takes none."),
        (
            {"filtres": 8},
            r"unknown key 'filtres' \(did you mean 'filters'\?\); valid keys: filters, kernel_size, dropo",
        ),
        ({"filters": 0}, "filters = 0; expected a whole number, at least 1"),
        ({"filters": 8.0}, "filters = 8.0; expected a whole number"),
        ({"filters": True}, "filters = True; expected a whole number"),
        ({"kernel_size": 4}, "kernel_size = 4; expected an odd whole number"),
        ({"dropout": 1.0}, "dropout = 1.0; expected a number, at least 0 and below 1"),
        ({"dropout": float("nan")}, "dropout = nan; expected a number"),
        ({"dropout": "0.2"}, "dropout = '0.2'; expected a number"),
    ],
)
def test_a_wrong_model_key_is_named_with_what_it_may_hold(change, message):
    with pytest.raises(SpecError, match=message):
        from_dict(GOOD | change)


def test_a_missing_model_key_is_named():
    with pytest.raises(SpecError, match=r"model \(cnn\): dropout is missing; expected a number"):
        from_dict({key: value for key, value in GOOD.items() if key != "dropout"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"training: unknown key 'epoch' \(did you mean 'epochs'\?\)"),
        ({"epochs": 0}, "epochs = 0; expected a whole number, at least 1."),
        ({"learning_rate": 0.0}, "learning_rate = 0.0; expected a number, above 0."),
        (
            {"target_scaling": "standart"},
            r"'standart' \(did you mean 'standard'\?\); expected one of 'standard', 'none'",
        ),
    ],
)
def test_a_wrong_training_key_is_named_with_what_it_may_hold(values, message):
    with pytest.raises(SpecError, match=message):
        training_from_dict(values)


def test_the_size_in_closed_form_is_that_of_the_network_built():
    for image, targets in ((IMAGE, TARGETS), ((2, 21, 34), 4)):
        specs = [CnnSpec(filters=f, kernel_size=k, dropout=0.0) for f in (8, 16, 32) for k in (3, 5)]
        for spec in (BaselineSpec(), *specs):
            assert size(spec, image, targets).parameters == parameter_count(build(spec, image, targets))
    with pytest.raises(SpecError, match="at least 4x4 pixels"):
        size(CnnSpec(filters=1, kernel_size=3, dropout=0.0), (1, 3, 3), 1)


def test_the_multiply_adds_of_config_22_are_those_counted_by_hand():
    first, second = 64 * 64 * 32 * 25, 32 * 32 * 64 * 32 * 25
    dense, head = 16 * 16 * 64 * 64, 64 * 9
    found = size(CnnSpec(filters=32, kernel_size=5, dropout=0.2), IMAGE, TARGETS).multiply_adds
    assert found == first + second + dense + head


def test_specifications_are_read_without_importing_torch():
    code = "import sys, models.specs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
