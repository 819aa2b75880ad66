"""Which version is the champion: points are compared by the mean over their seeds."""

import math

from hpo.promotion import standings
from hpo.registry import Version
from hpo.tracking import OWNER


def version(number, study, trial, own, **tags):
    tags = {f"hpo.{name}": str(value) for name, value in tags.items()}
    tags |= {"hpo.study": study, "hpo.trial": str(trial), "hpo.best_val_nmse": repr(own)}
    return Version(
        number=number, key="", run_id=f"r{number}", model_id=f"m{number}", description="", aliases=(), tags=tags
    )


def first(versions):
    found = standings(versions)
    return min(found, key=found.__getitem__)


LUCKY = version(1, "search", 7, 0.001)
GRID = version(2, "grid", 22, 0.005)


def test_a_network_stands_for_its_point_and_a_lucky_seed_does_not_win():
    assert first([LUCKY, GRID]) == 1
    repeated = version(3, "repeated", 0, 0.0005, point_val_nmse=0.006)
    assert first([GRID, repeated]) == 2, "its best seed is lower, its mean is not"
    assert standings([repeated]) == {3: (0.006, 0.0005)}


def test_where_another_point_is_better_on_average_the_searchs_own_winner_stands_behind_all():
    again = version(3, "again", 0, 0.002, point_val_nmse=0.003, best_of="search/4")
    assert standings([LUCKY, GRID, again])[1] == (math.inf, 0.001)
    assert first([LUCKY, GRID, again]) == 3
    assert first([LUCKY, GRID, version(3, "again", 0, 0.007, point_val_nmse=0.008, best_of="search/4")]) == 2


def test_a_study_answers_for_none_of_the_same_name_in_another_database():
    again = version(3, "again", 0, 0.002, point_val_nmse=0.003, best_of="search/4", database="other")
    assert OWNER == "hpo.database" and first([LUCKY, again]) == 1


def test_where_the_point_is_the_same_the_network_with_the_lowest_score_of_all_its_seeds_is_chosen():
    again = version(3, "again", 0, 0.002, point_val_nmse=0.003, best_of="search/7")
    assert standings([LUCKY, again]) == {1: (0.003, 0.001), 3: (0.003, 0.002)}
    assert first([LUCKY, again]) == 1
    lower = version(3, "again", 0, 0.0008, point_val_nmse=0.003, best_of="search/7")
    assert first([LUCKY, lower]) == 3
    other = version(4, "other+01234567", 1, 0.0009, point_val_nmse=0.0025, best_of="search/7")
    assert standings([LUCKY, again, other])[1] == (0.0025, 0.001), "of two studies of the point the lower mean"
