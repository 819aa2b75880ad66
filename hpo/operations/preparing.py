"""From a name or a file to planned studies: what `run` and `detach` begin with.

What plans is imported where there is something to plan: it needs MLflow, which takes a second.
"""

import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from data_pipeline.dataset import Dataset
from data_pipeline.findings import Finding
from data_pipeline.npz import load_npz
from hpo import settings
from hpo.errors import StudyError
from hpo.operations import own_code
from hpo.operations.budgets import Wishes
from hpo.operations.connection import Connection, connect, opened
from hpo.operations.starts import starting_models
from hpo.planning.preparation import Plan, planned_row, prepare, stored
from hpo.queue import StudyRow, require_whole
from hpo.services import serving
from hpo.settings import Settings
from hpo.study import AUTO, Study, is_file, load_all, shipped
from hpo.text import near_miss, utf8
from models import weights


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
    if study == AUTO:
        raise StudyError(
            f"{AUTO} plans its studies itself: expected `hpo run --study {AUTO} --data DIR --max-hours H`, or `{AUTO}` "
            "of `hpo.api`. Each study that it has planned runs by its own name."
        )
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


@contextmanager
def ready(
    parts: Sequence[Study | Plan], chosen: Settings, say: Callable[[str], object]
) -> Iterator[tuple[list[Plan], Connection, bool]]:
    """Give the plans of studies whose data and weights are there, a connection, and whether services were started."""
    _fetch_weights([part.study if isinstance(part, Plan) else part for part in parts], say)
    prepared: list[Plan] = []
    with ExitStack() as stack:
        starts = stack.enter_context(starting_models([part for part in parts if isinstance(part, Study)]))
        for part in parts:
            prepared.append(
                part if isinstance(part, Plan) else prepare(part, earlier=prepared, starts=starts.get(part.name))
            )
        services, started = serving.up(chosen, report=say)
        connection = stack.enter_context(opened(chosen, services))
        if any(planned_row(plan, connection.queue) is None for plan in prepared):
            from hpo.planning import plans

            plans.require_contents(prepared, connection.queue)
            for plan in prepared:
                if planned_row(plan, connection.queue) is None:
                    own_code.check(plan, say)
        for note in dict.fromkeys(finding.text for plan in prepared for finding in plan.findings):
            say(f"Note: {note}")
        yield prepared, connection, started


def write_down(plan: Plan, connection: Connection, asked: Wishes, *, say: Callable[[str], object]) -> StudyRow:
    """Plan a study, or take it up again, and offer it to the pool."""
    queue, services = connection.queue, connection.services
    row = planned_row(plan, queue)
    if row is None:
        from hpo.planning import plans

        row = plans.plan(plan, queue, connection.tracker, connection.settings, services.database_url, draw=_draw)
    if asked.trials is not None:
        from hpo.planning import plans

        plans.extend(row.name, asked.trials, queue, connection.tracker)
    asked.spending.resume(queue, row.name)
    queue.revive(row.name, trials=asked.retry)
    queue.offer(row.name, priority=asked.priority)
    if queue.resume(row.name):
        from hpo.tracking.client import PAUSED

        say(f"{row.name} was paused ({row.paused}). It goes on.")
        connection.tracker.set_tags(row.facts.study_run_id, {PAUSED: ""})
    return replace(queue.study(row.name), stops=row.stops)  # a stop since is obeyed


def _fetch_weights(studies: Sequence[Study], say: Callable[[str], object]) -> None:
    """Fetch the pretrained weights that studies need and this machine lacks."""
    for backbone in dict.fromkeys(key for study in studies for key in study.pretrained() if key in weights.FILES):
        if weights.absent(weights.FILES[backbone]):
            say(f"Fetching {weights.SOURCE}{weights.FILES[backbone]} …")
            weights.fetch(backbone)


def _draw(data: Dataset, rows: Sequence[str], findings: Sequence[Finding]) -> str:
    """Return the page on images and labels."""
    from hpo.report import data_page  # matplotlib

    return data_page.page(data, rows, findings)
