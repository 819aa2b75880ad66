"""From a name or a file to the studies that `run` and `dry_run` begin with."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.npz import load_npz
from hpo import settings
from hpo.errors import StudyError
from hpo.operations.connection import connect
from hpo.planning.preparation import Plan, stored
from hpo.queue import require_whole
from hpo.services import serving
from hpo.study import Study, is_file, load_all, shipped
from hpo.text import near_miss, utf8


def load(
    study: str,
    *,
    data: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    prerequisites: bool = False,
) -> list[Study] | list[Plan]:
    """Return the studies that a name or file stands for, with overrides (`KEY=VALUE` or `STUDY:KEY=VALUE`).

    `prerequisites`: with the studies that they start from. A name that is neither shipped nor a file may be that of a
    study which is planned already: return its plan, from what the database keeps. Raise StudyError if a file or an
    override is wrong, or there is no such study.
    """
    short = {"training.epochs": epochs, "seed": seed, "data.path": data and os.fspath(data)}
    given = [f"{key}={json.dumps(value)}" for key, value in reversed(short.items()) if value is not None]
    # an override of one study (STUDY:KEY=VALUE) comes behind those of all studies, and wins
    given += overrides
    if is_file(study):
        words = ["hpo", "run", "--study", study, *(word for override in given for word in ("--set", override))]
        words += ["--with-prerequisites"] * prerequisites
        command = utf8(f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}")
        return [replace(part, command=command) for part in load_all(study, given, prerequisites=prerequisites)]
    plan = _planned(study)
    if given:
        raise StudyError(f"{study} is planned already, and stays as it is: expected no override, found {given[0]}.")
    return [plan]


def _planned(name: str) -> Plan:
    """Return the plan of a study in the database. Raise StudyError if there is none of this name."""
    chosen, names = settings.read(), "unknown while the services do not run (`hpo up` starts them)"
    if serving.running(chosen, mlflow=False):
        from hpo.tracking import data_sets

        with connect() as connection:
            rows = {row.name: row for row in connection.queue.studies()}
            if name in rows:
                require_whole(rows[name])
                data = data_sets.fetch(chosen.home, connection.tracker, name, rows[name].facts)
                return stored(rows[name], load_npz(data))
            names = ", ".join(rows) or "none"
    raise StudyError(
        f"No study is called '{name}'.{near_miss(name, shipped())} There are: {', '.join(shipped())}; planned here: "
        f"{names}; or give the path of a .toml file."
    )


def as_parts(study: str | Sequence[Study | Plan]) -> Sequence[Study | Plan]:
    """Return the studies of a name or file, or those that were loaded."""
    return load(study) if isinstance(study, str) else study
