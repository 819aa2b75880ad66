"""Descriptors against their closed forms: checkerboards, laminates, stripes, discs cut by an edge."""

import numpy as np
import pytest
import torch

from models import descriptors
from models.sizes import lengths, plain_count, reach
from models.specs import DescriptorsSpec

SIDE = 16


def image(pixels) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels, np.float64))[None, None]


def stripes(width: int, side: int = SIDE) -> torch.Tensor:
    """Rows of the phase, `width` pixels thick, and of the rest, as thick."""
    return image(np.repeat((np.arange(side) // width % 2 == 0)[:, None], side, axis=1))


def checkerboard(side: int = SIDE) -> torch.Tensor:
    return image(np.add.outer(np.arange(side), np.arange(side)) % 2)


def statistics(picture: torch.Tensor, longest: int, *, periodic: bool) -> np.ndarray:
    """S(y, x) with y from -longest in the rows and x from 0 in the columns."""
    vectors = descriptors.two_point(picture, longest, periodic=periodic)
    return vectors.numpy().reshape(2 * longest + 1, longest + 1)


@pytest.mark.parametrize("periodic", [True, False])
def test_two_points_of_a_checkerboard_are_in_one_phase_where_the_vector_is_even(periodic):
    # An open board of odd sides has one white field more than black ones: take even vectors on an even board only.
    computed = statistics(checkerboard(), 4, periodic=periodic)
    parity = np.add.outer(np.arange(-4, 5), np.arange(5)) % 2
    np.testing.assert_allclose(computed[parity == 1], 0, atol=1e-12)
    even = parity == 0
    if periodic:
        np.testing.assert_allclose(computed[even], 0.5, atol=1e-12)
    else:  # the white fields of the part that both ends can stand on, rounded down
        pairs = (SIDE - np.abs(np.arange(-4, 5)))[:, None] * (SIDE - np.arange(5))
        assert (np.abs(computed[even] * pairs[even] - pairs[even] / 2) <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("periodic", [True, False])
def test_two_point_statistics_by_fft_are_those_counted_one_by_one(periodic):
    picture = np.random.default_rng(0).random((7, 9))
    computed = statistics(image(picture), 3, periodic=periodic)
    for row, down in enumerate(range(-3, 4)):
        for right in range(4):
            products = [
                picture[y, x] * picture[(y + down) % 7, (x + right) % 9]
                for y in range(7)
                for x in range(9)
                if periodic or (0 <= y + down < 7 and x + right < 9)
            ]
            assert computed[row, right] == pytest.approx(np.mean(products), abs=1e-12)


def test_two_point_statistics_of_a_periodic_image_do_not_change_when_it_is_shifted():
    picture = torch.rand(1, 2, 12, 10, dtype=torch.float64)
    moved = picture.roll((5, 3), (2, 3))
    same = descriptors.two_point(picture, 4, periodic=True), descriptors.two_point(moved, 4, periodic=True)
    torch.testing.assert_close(*same)
    assert (descriptors.two_point(picture, 4, periodic=False) != descriptors.two_point(moved, 4, periodic=False)).any()


def test_the_lineal_path_of_a_laminate_falls_linearly_across_and_stays_along_it():
    width = 8
    for periodic in (True, False):
        paths = descriptors.lineal_path(stripes(width, 64), (2, 4, 8), periodic=periodic)[0].numpy()
        across, along = paths[:3], paths[3:]
        np.testing.assert_allclose(along, 0.5)
        # Of each layer width - length + 1 segments lie within: periodic ones start at any of 2 * width pixels.
        places = [4 * (width - length + 1) for length in (2, 4, 8)]
        starts = 64 if periodic else np.array([63, 61, 57])
        np.testing.assert_allclose(across, places / np.array(starts))


def test_a_segment_that_leaves_an_image_comes_in_again_only_if_it_is_periodic():
    split = image(np.repeat((np.arange(8) % 7 == 0)[None], 8, axis=0))  # the first and the last column
    assert descriptors.lineal_path(split, (2,), periodic=True)[0].tolist() == [0.25, 1 / 8]
    assert descriptors.lineal_path(split, (2,), periodic=False)[0].tolist() == [0.25, 0]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_mean_chord_of_stripes_is_their_width_across_and_the_side_along(width):
    for periodic in (True, False):
        across, along = descriptors.chord_lengths(stripes(width), periodic=periodic)[0].tolist()
        assert (across, along) == (width, SIDE)


def test_a_chord_that_an_edge_cuts_is_two_chords_unless_the_image_is_periodic():
    bar = image(np.repeat(np.isin(np.arange(SIDE), (0, 1, 2, SIDE - 1))[:, None], SIDE, axis=1))
    assert descriptors.chord_lengths(bar, periodic=True)[0, 0] == 4
    assert descriptors.chord_lengths(bar, periodic=False)[0, 0] == 2
    assert descriptors.chord_lengths(image(np.zeros((4, 4))), periodic=True).tolist() == [[0, 0]]


def test_grey_moments_are_those_of_the_textbook_and_nothing_in_a_plain_image():
    two = image([[0.2, 0.8]] * 2)
    np.testing.assert_allclose(descriptors.grey_moments(two)[0], [0.3, 0, -2], atol=1e-12)  # two equal peaks
    picture = np.random.default_rng(1).random((5, 6))
    shifted = picture - picture.mean()
    skewness = (shifted**3).mean() / picture.std() ** 3
    assert descriptors.grey_moments(image(picture))[0, 1].item() == pytest.approx(skewness)
    assert descriptors.grey_moments(image(np.full((3, 3), 0.3))).tolist() == [[0, 0, 0]]


def test_binary_patterns_tell_flat_areas_edges_and_points():
    def share(picture, number, *, periodic=True):
        return descriptors.binary_patterns(picture, periodic=periodic)[0, number].item()

    assert share(image(np.full((4, 4), 0.5)), 8) == 1  # none of the neighbours is darker
    point = np.zeros((5, 5))
    point[2, 2] = 1
    assert share(image(point), 0) == 1 / 25  # all of them are darker
    assert share(image(point), 0, periodic=False) == 1 / 9  # of the inner pixels
    assert share(stripes(4), 5) == 0.5 / 2  # the upper and lower rows of a stripe: five bright neighbours in a row
    assert share(checkerboard(), 9) == 0.5  # four bright neighbours of a white field, all apart
    assert descriptors.binary_patterns(torch.rand(3, 2, 9, 8), periodic=False).sum(1).tolist() == pytest.approx([2] * 3)


def test_patterns_and_moments_of_a_turned_image_are_the_same():
    picture = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    for compute in (descriptors.grey_moments, lambda x: descriptors.binary_patterns(x, periodic=True)):
        torch.testing.assert_close(compute(picture), compute(picture.rot90(1, (2, 3))))


@pytest.mark.parametrize("edges", ["periodic", "open"])
@pytest.mark.parametrize("chosen", ["lineal_path", "chords", "grey", "patterns"])
@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 24, 16)])
def test_the_number_of_descriptors_in_closed_form_is_how_many_there_are(edges, chosen, shape):
    spec = DescriptorsSpec(**dict.fromkeys(("lineal_path", "chords"), False) | {chosen: True, "edges": edges})
    computed = descriptors.plain(spec, torch.rand(2, *shape, dtype=torch.float64), torch.full((shape[0],), 0.5))
    assert computed.shape == (2, plain_count(spec, shape))


def test_nothing_reaches_beyond_half_a_side():
    assert [reach(DescriptorsSpec(reach=r), (1, 20, 64)) for r in (5, 10, 64)] == [5, 10, 10]
    assert [lengths(longest) for longest in (1, 2, 7, 32)] == [(), (2,), (2, 4), (2, 4, 8, 16, 32)]
