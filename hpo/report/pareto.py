"""The Pareto front of a study with several objectives: its table, its figure, its files at the study's run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpo.queue import Job, StudyRow
from hpo.report import tables
from hpo.report.tables import Column, Row, Table
from hpo.report.words import BASELINES, label, number
from hpo.scores import pareto, ranking
from hpo.study import SIZES, sizing
from hpo.text import counted

if TYPE_CHECKING:
    from hpo.report.document import Picture

ON_FRONT = "front"  # what tables and MLflow's tag say of a configuration on it
TAG = "hpo.pareto"  # of a trial's run


def table(row: StudyRow, jobs: Sequence[Job]) -> Table | None:
    """Return the front beside the baseline predictors, lowest validation NMSE first; None of a study with one
    objective, or without a finished configuration."""
    places = pareto.of_study(row, jobs)
    if not places:
        return None
    objectives, repeats = row.specification.objectives, ranking.repeats(jobs)
    counter = "config" if row.specification.sampler == "grid" else "trial"
    scored: list[tuple[float, Row]] = []
    for place in places:
        if not place.is_on_front:
            continue
        assert place.job.spec is not None
        score, *sizes = place.values.values()
        values = {counter: number(place.job), "point": label(place.job.spec), "NMSE": score}
        values |= {"R²": ranking.result_of(repeats[place.job.number]).validation.r2}
        scored.append((score, Row(values=values | dict(zip(objectives[1:], sizes, strict=True)))))
    for name, scores in row.facts.predictors.items():
        nmse, r2 = scores.validation.nmse or 0.0, scores.validation.r2
        scored.append((nmse, Row(values={"point": BASELINES[name], "NMSE": nmse, "R²": r2}, style="dim")))
    on_front = sum(place.is_on_front for place in places)
    return Table(
        name=f"{row.name}-pareto",
        title=f"{row.name}: Pareto front of {_words(objectives)}, "
        f"{counted(on_front, 'configuration', of=len(places))}, validation split",
        note="No other configuration is at least as good in each of the objectives and better in one. The baseline "
        "predictors stand for comparison.",
        columns=[
            Column(name=counter, text=tables.cell_text),
            Column(name="point", left=True),
            Column(name="NMSE"),
            Column(name="R²"),
            *(Column(name=name, label=SIZES[name], text=tables.cell_text) for name in objectives[1:]),
        ],
        rows=[entry for _, entry in sorted(scored, key=lambda one: one[0])],
    )


def records(row: StudyRow, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the configurations on the front for programs, lowest validation NMSE first."""
    return [
        {"number": place.job.number, "point": place.job.spec.point, "values": place.values}
        for place in pareto.of_study(row, jobs)
        if place.is_on_front and place.job.spec is not None
    ]


def lines(row: StudyRow, jobs: Sequence[Job]) -> list[str]:
    """Return a sentence on the front; none of a study with one objective."""
    places = pareto.of_study(row, jobs)
    if not places:
        return []
    on_front = counted(sum(place.is_on_front for place in places), "configuration", "are", of=len(places))
    objectives = row.specification.objectives
    return [f"{on_front} on the Pareto front of {_words(objectives)}; the first one decides on aliases."]


def picture(row: StudyRow, jobs: Sequence[Job]) -> "Picture | None":
    """Return the figure of the validation NMSE over each size, the front marked; None as `table`."""
    from hpo.report import figures
    from hpo.report.document import Picture

    places = pareto.of_study(row, jobs)
    if not places:
        return None
    objectives = row.specification.objectives
    baselines = {BASELINES[name]: float(scores.validation.nmse or 0) for name, scores in row.facts.predictors.items()}
    figure = figures.pareto(
        {SIZES[name]: [place.values[name] for place in places] for name in objectives[1:]},
        [place.values[objectives[0]] for place in places],
        [place.is_on_front for place in places],
        baselines,
    )
    return Picture(name=f"{row.name}-pareto", title="Pareto front", svg=figures.svg(figure))


def files(row: StudyRow, jobs: Sequence[Job]) -> Mapping[str, str]:
    """Return the text of the files at a study's run, by their names; none of a study with one objective."""
    of_front, drawn = table(row, jobs), picture(row, jobs)
    if of_front is None or drawn is None:
        return {}
    full = tables.frame(of_front)
    return {"pareto.csv": tables.csv(full), "pareto.json": tables.records(full), "pareto.svg": drawn.svg}


def tags(row: StudyRow, jobs: Sequence[Job]) -> dict[int, dict[str, str]]:
    """Return the tags of the runs of each finished configuration, by its number: whether it is on the front.

    None of a study with one objective.
    """
    marks = pareto.marks(row, jobs)
    numbers = ranking.repeats(jobs) if marks else {}
    return {number: {TAG: ON_FRONT if marks.get(number) else "dominated"} for number in numbers}


def values(row: StudyRow, jobs: Sequence[Job]) -> dict[int, dict[str, Any]]:
    """Return, for each configuration by its number, what tables of trials say of sizes and front beside the scores."""
    measures, marks = sizing.measures(row.specification), pareto.marks(row, jobs)
    of_trials: dict[int, dict[str, Any]] = {}
    for job in jobs:
        if job.spec is not None and measures and job.kind == "trial":
            sizes = {name: value for name, value in job.sizes(measures).items() if value}
            mark = {"pareto": marks[job.number]} if job.number in marks else {}
            of_trials[job.number] = of_trials.get(job.number, {}) | sizes | mark
    return of_trials


def _words(objectives: Sequence[str]) -> str:
    """Return the objectives as a sentence has them: `NMSE and parameters`."""
    *others, last = ("NMSE", *(SIZES[name] for name in objectives[1:]))
    return f"{', '.join(others)} and {last}"
