"""Make and check labelled data sets."""

from pathlib import Path

from data_pipeline import dataset
from data_pipeline.dataset import Dataset
from data_pipeline.phase import Phase
from data_pipeline.split import lacks, unscored
from data_pipeline.synthesize import make as make_data

__all__ = ["Phase", "check_data", "make_data"]


def check_data(folder: Path, *, image_size: int | None = None) -> tuple[Dataset, str | None, list[str]]:
    """Return the data set, why no study can be trained on it (None if one can), and notes about its labels.

    Raise DatasetError with everything that is wrong with the folder.
    """
    data = dataset.load(folder, image_size=image_size)
    lack = lacks(data)
    return data, lack, [] if lack else unscored(data)  # a set of two cells has no splits
