"""The order of the nine components, their place in the tensor, and where the image's symmetries take them."""

import numpy as np
import pytest

from data_pipeline.components import COMPONENTS, COUPLINGS, SYMMETRIES, place, tensor, vector


def test_the_nine_components_stand_in_the_order_of_the_protocols_table():
    assert COMPONENTS == ("C11", "C22", "C33", "C12", "C23", "C13", "C44", "C55", "C66")
    assert [place(name) for name in ("C12", "C23", "C13", "C66")] == [(0, 1), (1, 2), (0, 2), (5, 5)]


def test_a_tensor_made_from_its_components_is_symmetric_and_gives_them_back():
    components = np.arange(26.0).reshape(2, 13)
    full = tensor(components, COMPONENTS + COUPLINGS)
    assert full.shape == (2, 6, 6)
    assert np.array_equal(full, np.swapaxes(full, -1, -2))
    assert np.array_equal(vector(full, COMPONENTS + COUPLINGS), components)
    assert np.count_nonzero(full[1]) == 9 + 2 * 7 - 3  # three of the nine and the four couplings occur twice
    assert full[0, 5, 0] == full[0, 0, 5] == components[0, 9]


def test_exchanging_the_axes_swaps_three_pairs_and_flips_move_nothing():
    swapped = [COMPONENTS[index] for index in SYMMETRIES["transpose"]]
    assert swapped == ["C22", "C11", "C33", "C12", "C13", "C23", "C55", "C44", "C66"]
    assert SYMMETRIES["flip_horizontal"] == SYMMETRIES["flip_vertical"] == tuple(range(9))


@pytest.mark.parametrize("name", SYMMETRIES)
def test_a_symmetry_done_twice_puts_every_component_back(name):
    order = np.array(SYMMETRIES[name])
    assert np.array_equal(order[order], np.arange(9))
