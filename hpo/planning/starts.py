"""Trained models whose weights trials begin with: what they must be like."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.dataset import Dataset
from hpo.errors import StudyError
from hpo.study import Study
from hpo.study.records import StartingModel
from hpo.text import point_text
from models import specs

MOST_MISFITS = 5  # tensors that an error lists


@dataclass(frozen=True, kw_only=True)
class Start:
    """A trained model that trials begin with, and its files on this machine."""

    model: StartingModel
    folder: Path | None  # None if the study is planned already: its files lie at its run


def check_starts(chosen: Study, data: Dataset, starts: Mapping[str, Start]) -> None:
    """Raise StudyError if a model to start from does not fit a network of the study, or predicts other targets."""
    for name, start in starts.items():
        if start.folder is not None:
            _check(chosen, data, name, start.folder)


def _check(chosen: Study, data: Dataset, name: str, folder: Path) -> None:
    from models import bundle  # torch takes seconds, and most studies start from no model

    where = f"training.start_from = {name!r}"
    try:
        regressor, description = bundle.load(folder)
    except specs.SpecError as error:
        raise StudyError(f"{where}: {error}") from None
    expected, actual = ((one.target_names, one.input_names) for one in (data, description))
    if expected != actual:
        texts = [
            f"the targets {', '.join(names)} and {', '.join(inputs) or 'no'} inputs"
            for names, inputs in (expected, actual)
        ]
        raise StudyError(f"{where}: expected a model for {texts[0]}, as in {data.name}, found one for {texts[1]}.")
    settings = ", ".join(f"{key} = {value}" for key, value in specs.to_dict(description.model).items())
    for point in chosen.corners():
        network, training = chosen.specifications(point)
        counts = len(data.target_names), len(data.input_names)
        if training.start_from != name:
            continue
        if wrong := bundle.misfits(regressor, network, data.images.shape[1:], *counts):
            more = f"; and {len(wrong) - MOST_MISFITS} more" if len(wrong) > MOST_MISFITS else ""
            raise StudyError(
                f"{where}: {len(wrong)} of its tensors do not fit the network of {chosen.name} at "
                f"{point_text(point) or 'its one point'}: {'; '.join(wrong[:MOST_MISFITS])}{more}. "
                f"Train a network like that of the model ({settings}), or start from another one."
            )
