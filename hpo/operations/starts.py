"""The trained models that studies begin with (training.start_from), found by their names before a study is planned."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hpo.errors import ServiceError, StudyError, Unreachable
from hpo.files import sha256_of
from hpo.operations.connection import connect
from hpo.planning.starts import Start
from hpo.queue import StudyRow
from hpo.study import Study
from hpo.study.records import StartingModel

Starts = Mapping[str, Mapping[str, Start]]  # by the study's name, then by the model's


@contextmanager
def starting_models(studies: Sequence[Study]) -> Iterator[Starts]:
    """Give the models that each of the studies starts from, with their files in a temporary folder.

    A name means what it meant when a study was planned: `@champion` may have moved since. Raise NotFound if a name
    stands for no model, StudyError if its folder holds none.
    """
    needed = [study for study in studies if study.starting_models]
    if not needed:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="hpo-start-") as parent:
        rows = _rows()
        models: dict[str, Start] = {}
        starts: dict[str, dict[str, Start]] = {}
        for study in needed:
            planned = next(filter(None, (_as_planned(row, study) for row in reversed(rows))), None)
            for name in [] if planned is not None else study.starting_models:
                if name not in models:
                    models[name] = _start(name, Path(parent, str(len(models))))
            starts[study.name] = planned or {name: models[name] for name in study.starting_models}
        yield starts


def _rows() -> list[StudyRow]:
    """Return the studies of the database; none if it does not run."""
    with suppress(ServiceError, Unreachable), connect(mlflow=False) as connection:
        return connection.queue.studies()
    return []


def _as_planned(row: StudyRow, study: Study) -> dict[str, Start] | None:
    """Return the models that a planned study starts from, if it is this one but for what their names mean now."""
    data, models = row.facts.data, row.facts.starts or {}
    if data.uri != study.data_path or models.keys() != set(study.starting_models):
        return None
    files = {backbone: file.sha256 for backbone, file in (row.facts.weights or {}).items()}
    canonical = study.canonical(
        data_digest=data.digest,
        split_digest=data.split,
        weights=defaultdict(str, files),
        phases=row.canonical.get("phases"),
        folds_digest=row.facts.folds,
        starts={name: model.sha256 for name, model in models.items()},
    )
    return (
        {name: Start(model=model, folder=None) for name, model in models.items()}
        if canonical == row.canonical
        else None
    )


def _start(name: str, folder: Path) -> Start:
    """Return the model of a name, with a copy of its files in a new folder."""
    from hpo.operations.evaluate import FILES, opened_model  # which needs MLflow

    folder.mkdir()
    with opened_model(name) as (files, source):
        for file in FILES:
            if not (files / file).is_file():
                raise StudyError(f"training.start_from = {name!r}: expected a model's {file} in {files}, found none.")
            shutil.copyfile(files / file, folder / file)
        if (files / "source").exists():
            raise StudyError(
                f"training.start_from = {name!r}: expected a model of one of hpo's families, found one whose network "
                "is code of its author: trials cannot begin with it."
            )
    hashes = {file: sha256_of(folder / file) for file in FILES}
    return Start(model=StartingModel(name=name, source=source, files=hashes), folder=folder)
