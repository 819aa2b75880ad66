"""Figures say what was measured: values, units, scales."""

import threading

import numpy as np
import pytest

from hpo.report import figures

CURVE = [(epoch, {"train/nmse": 1 / epoch, "val/nmse": 2 / epoch}) for epoch in range(1, 6)]


def test_loss_curves_show_the_recorded_values_of_both_splits_on_a_logarithmic_axis():
    (axes,) = figures.loss_curves({"grid/6": CURVE}).axes
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "epoch" and axes.get_title() == "grid/6"
    assert axes.get_ylabel() == "NMSE (MSE / variance of the training split)"
    train, validation = axes.lines
    assert (train.get_label(), validation.get_label()) == ("training", "validation")
    assert list(train.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(validation.get_ydata()) == [2 / epoch for epoch in range(1, 6)]


def test_loss_curves_of_several_trials_have_a_colour_each():
    (axes,) = figures.loss_curves({"a": CURVE, "b": CURVE[:2]}).axes
    assert [line.get_label() for line in axes.lines] == ["a, training", "a, validation", "b, training", "b, validation"]
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    (axes,) = figures.loss_curves({"a": CURVE, "b": CURVE}, keys=("val/nmse",)).axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]


def test_parity_has_a_panel_a_target_with_its_r2_and_the_unit_on_both_axes():
    truth = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]])
    predicted = truth + np.array([[0.5, 0.0], [0.0, 0.0], [-0.5, 0.0]])  # C11: residual 0.5, total 2
    figure = figures.parity(truth, predicted, ["C11", "C12"], "GPa")
    first, second = figure.axes
    assert first.get_title() == "C11   R² 0.750"
    assert second.get_title() == "C12   R² -", "a target that does not vary has none"
    assert (first.get_xlabel(), first.get_ylabel()) == ("true (GPa)", "predicted (GPa)")
    (diagonal,) = first.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 2]
    (points,) = first.collections
    assert np.array_equal(points.get_offsets(), np.column_stack([truth[:, 0], predicted[:, 0]]))


def test_parity_of_many_targets_shows_the_first_twelve():
    values = np.random.default_rng(0).normal(size=(10, 40))
    figure = figures.parity(values, values, [f"t{index}" for index in range(40)], "GPa")
    assert [axes.get_title().split()[0] for axes in figure.axes] == [f"t{index}" for index in range(12)]


@pytest.mark.parametrize("count", [1, 9])
def test_a_figure_is_saved_without_a_display_from_any_thread(tmp_path, count):
    values = np.random.default_rng(0).normal(size=(78, count))
    names = [f"C{index}" for index in range(count)]
    file = tmp_path / "parity.png"

    def draw() -> None:
        figures.parity(values, values, names, "GPa").savefig(file)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 150_000
