"""Make and check labelled data sets."""

from collections.abc import Iterator
from pathlib import Path

from data_pipeline import dataset, synthesize
from data_pipeline.dataset import Dataset
from data_pipeline.phase import Phase
from data_pipeline.split import lacks, unscored


def make_data(
    folder: Path,
    *,
    count: int = 520,
    size: int = 64,
    seed: int = 0,
    matrix: Phase = synthesize.MATRIX,
    inclusion: Phase = synthesize.INCLUSION,
) -> Iterator[int]:
    """Draw `count` cells of `size` x `size` pixels and label them; yield how many are finished.

    The same call continues an interrupted one. Raise DatasetError if the folder holds something else.
    """
    return synthesize.make(folder, count=count, size=size, seed=seed, matrix=matrix, inclusion=inclusion)


def check_data(folder: Path, *, image_size: int | None = None) -> tuple[Dataset, str | None, list[str]]:
    """Return the data set, why no study can be trained on it (None if one can), and notes about its labels.

    Raise DatasetError with everything that is wrong with the folder.
    """
    data = dataset.load(folder, image_size=image_size)
    lack = lacks(data)
    return data, lack, [] if lack else unscored(data)  # a set of two cells has no splits
