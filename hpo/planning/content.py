"""What a look at the content of a data set finds before a study is planned on it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.checks import look
from data_pipeline.dataset import Understanding, the_dataset
from data_pipeline.findings import COMPARISONS, Finding
from hpo.errors import StudyError
from hpo.planning.stiffness import of_stiffness


def findings(understood: Understanding) -> tuple[Finding, ...]:
    """Return what is wrong or doubtful with images and labels, errors first, those that dataset.toml accepts last.

    Raise DatasetError if the data are not understood.
    """
    data = the_dataset(understood)
    fractions = data.images.mean(axis=(1, 2, 3), dtype=np.float64)
    where = [f"{name} ({row})" for name, row in zip(data.names, understood.rows, strict=True)]
    every = [
        *understood.notes.findings,
        *look(data, where),
        *of_stiffness(data.targets, data.target_names, fractions, data.phases, where),
    ]
    accepted = data.description.layout.accept or ()
    unsure = COMPARISONS if any(finding.name == "resized" for finding in every) else ()
    every = [
        replace(finding, is_accepted=finding.name in accepted, is_uncertain=finding.name in unsure) for finding in every
    ]
    return tuple(sorted(every, key=lambda finding: ("error", "doubt", "accepted").index(finding.kind)))


def require_content(folder: Path, every: Sequence[Finding]) -> None:
    """Raise StudyError, with all of them, if there are errors among the findings."""
    if errors := [finding for finding in every if finding.kind == "error"]:
        names = ", ".join(f'"{name}"' for name in dict.fromkeys(finding.name for finding in errors))
        raise StudyError(
            "\n  ".join([f"{folder}: its images and labels cannot be right:", *(finding.text for finding in errors)])
            + f"\nCorrect them. If all is as it should be, add to dataset.toml: accept = [{names}]"
        )
