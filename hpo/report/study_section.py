"""What the report says of one study: its configurations, best first, and what each parameter does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpo.queue import Job, State
from hpo.report import figures, learning, pareto, promotion, results, tables, versions
from hpo.report.answers import SAME
from hpo.report.document import Picture, Section
from hpo.report.results import TOP
from hpo.report.tables import HIGH, LOW, Table
from hpo.report.words import BASELINES, number, score_values, within_spread
from hpo.scores import analysis, learning_curve, ranking
from hpo.scores.evidence import Closed, Evidence
from hpo.study import Study, provenance
from hpo.study.records import Point
from hpo.text import counted, number_text, squared

MEAN = "mean NMSE of the repeats"
NMSE = "validation NMSE"
Record = dict[str, Any]
Importances = Callable[[Study, Sequence[tuple[Point, float]]], Mapping[str, float]]  # as hpo.search.importances


def section(evidence: Evidence, closed: Closed, importances: Importances) -> Section:
    """Return the tables of a study (1 and 2 of the source study), its effects and its figures."""
    title, unscored = f"Study {closed.row.name}", [job for job in closed.jobs if job.state != State.DONE]
    text = [closed.row.facts.description]
    text += [f"{closed.study.at_random}."] if closed.study.at_random else []
    text += [f"Doubt about the data: {note}" for note in closed.row.facts.findings or ()]
    if closed.ended.budget is not None:
        text.append(promotion.budget(closed.row.name, closed.ended.budget))
    if unscored:
        text.append(
            f"{counted(len(unscored), 'trial', 'have', of=len(closed.jobs))} no score: see the table of trials."
        )
    if not closed.points:
        return Section(title=title, text=text)
    records, baselines = trials(evidence, closed), _baselines(evidence, closed)
    listed, pictures = [_best(closed, records, baselines)], list[Picture]()
    if len(records) + len(unscored) > 1:
        listed.append(_all(evidence, closed, records, baselines))
    if len(records) > 1:
        effects, pictures = _effects(closed, importances)
        listed += effects
    listed += versions.of_test(closed.ended, name=f"{closed.row.name}-versions-test")
    text += versions.sentences(closed.ended)
    if (curve := learning_curve.of_study(closed.row, closed.jobs)) is not None:
        text += learning.lines(curve)
        listed.append(learning.table(curve))
        pictures.append(learning.picture(curve))
    sizes = [job.spec.parameters for job, _ in closed.points if job.spec]
    if (front := pareto.table(closed.row, closed.jobs)) is not None:
        text += pareto.lines(closed.row, closed.jobs)
        listed.insert(1, front)
        pictures += filter(None, [pareto.picture(closed.row, closed.jobs)])
    elif len(set(sizes)) > 2:
        lines = {
            BASELINES[name]: float(scores.validation.nmse or 0) for name, scores in closed.row.facts.predictors.items()
        }
        figure = figures.svg(figures.capacity(sizes, [score for _, score in closed.points], lines))
        words = "Size of the network and validation NMSE"
        pictures.append(Picture(name=f"{closed.row.name}-capacity", title=words, svg=figure))
    return Section(title=title, text=text, tables=listed, pictures=pictures)


def _best(closed: Closed, records: list[Record], baselines: list[Record]) -> Table:
    """Return the best configurations and the baseline predictors in their order."""
    note = (
        "Scores of the best epoch; the source study reports the last epoch's, which stand beside them. Epochs "
        "to 5 %: none for a network that has not learned more than the mean."
    )
    return tables.of_records(
        results.among_baselines(closed.row, closed.jobs, records[:TOP], baselines),
        name=f"{closed.row.name}-top",
        title=f"Best {counted(min(TOP, len(records)), 'configuration', of=len({job.number for job in closed.jobs}))}, "
        "validation split",
        note=note + (" ≈: within the spread of the first." if closed.study.trainings > 1 else ""),
        keys=[key for key in records[0] if key not in ("run_id", "state")],
        texts=dict.fromkeys(_parameters(closed), tables.cell_text),
        leading=1 + bool(_parameters(closed)),
    )


def _all(evidence: Evidence, closed: Closed, records: list[Record], baselines: list[Record]) -> Table:
    """Return all configurations as the source study orders them; those without a score stand last."""
    mse, again = f"validation MSE {squared(evidence.dataset.unit)}", closed.study.trainings > 1
    unscored = [
        {
            _counter(closed): number(job),
            "state": f"{job.state}, {closed.study.part} {job.repeat}" if again else job.state,
        }
        | (job.spec.point if job.spec else {})
        for job in closed.jobs
        if job.state != State.DONE
    ]
    return tables.of_records(
        [*sorted(records, key=lambda record: record[mse]), *baselines, *unscored],
        name=f"{closed.row.name}-trials",
        title="All configurations by validation MSE, as the source study orders them",
        note="The baseline predictors and configurations without a score stand last.",
        keys=[_counter(closed), *_parameters(closed), mse, NMSE, "R²", "NRMSE", "state"],
        texts=dict.fromkeys(_parameters(closed), tables.cell_text),
        leading=1 + bool(_parameters(closed)),
    )


def trials(evidence: Evidence, closed: Closed) -> list[Record]:
    """Return the best finished trial of each configuration, best first."""
    unit, repeats = evidence.dataset.unit, ranking.repeats(closed.jobs)
    spreads = {job.number: ranking.spread(repeats[job.number]) for job, _ in closed.points}
    by_number: dict[int, list[Job]] = {}
    for job in closed.jobs:
        by_number.setdefault(job.number, []).append(job)
    lacking = {job.number: ranking.incomplete(by_number[job.number]) for job, _ in closed.points}
    records: list[Record] = []
    for job, _ in closed.points:
        assert job.spec is not None and job.result is not None
        result, spread = ranking.result_of(repeats[job.number]), spreads[job.number]
        record = {_counter(closed): number(job), **dict.fromkeys(closed.study.space, ""), **job.spec.point}
        record |= {"weights": provenance(job.spec.model) or "from scratch", "parameters": job.spec.parameters}
        if closed.study.trainings > 1:
            record |= {} if closed.study.folds else {MEAN: spread[0]}
            record["standard deviation"] = spread[1]
            record |= {f"{closed.study.part}s": lacking[job.number]} if any(lacking.values()) else {}
            near = records and within_spread(spread, spreads[closed.points[0][0].number])
            record["≈"] = "≈" if near else ""
        record |= {NMSE: result.best_val_nmse, f"validation MSE {squared(unit)}": result.best_val_mse}
        record |= {"R²": result.validation.r2, "NRMSE": result.validation.nrmse, "MAPE": result.validation.mape}
        record |= {
            "best epoch": result.best_epoch,
            "epochs to 5 %": evidence.converged(closed.curves[job.id]["val/nmse"]),
            "last epoch NMSE": result.last_val_nmse,
            f"last epoch MSE {squared(unit)}": result.last_val_mse,
            "training s": result.seconds,
            "state": job.state,
            "run_id": job.run_id,
        }
        records.append(record)
    return records


def _baselines(evidence: Evidence, closed: Closed) -> list[Record]:
    """Return the baseline predictors as rows among the configurations."""
    first, renamed = (
        next(iter(_parameters(closed)), _counter(closed)),
        ("NMSE", f"MSE {squared(evidence.dataset.unit)}"),
    )
    records = []
    for name, predictor in closed.row.facts.predictors.items():
        scores = score_values(predictor.validation, evidence.dataset.unit)
        own = {f"validation {head}" if head in renamed else head: score for head, score in scores.items()}
        records.append({first: BASELINES[name]} | own)
    return records


def _effects(closed: Closed, importances: Importances) -> tuple[list[Table], list[Picture]]:
    """Return what each parameter does: exactly on a full grid, by Optuna's importances otherwise."""
    name, title = closed.row.name, "Importance of each parameter (Optuna's fANOVA: share of the variance of the score)"
    ordered = sorted(closed.points, key=lambda entry: (entry[0].config or 0, entry[0].number))  # as in the grid
    points, scores = [job.spec.point for job, _ in ordered if job.spec], [score for _, score in ordered]
    lost = (
        f"{counted(len(closed.lost), 'configuration', 'lack')} a score of a trial: the others were selected by how "
        "they went, and may mislead."
        if closed.lost
        else ""
    )
    if not analysis.is_factorial(points) or len(points) < 2:
        scored = [(job.spec.point, score) for job, score in closed.points if job.spec]
        records = [{"parameter": key, "importance": own} for key, own in importances(closed.study, scored).items()]
        table = tables.of_records(records, name=f"{name}-importances", title=title, note=lost)
        return [table] if records else [], []
    effects = analysis.main_effects(points, scores)
    of_effects = tables.of_records(
        [
            {"parameter": key, "value": number_text(value), "mean validation NMSE": mean, "points": count}
            for key, value, mean, count in effects
        ],
        name=f"{name}-effects",
        title="Main effects (full grid: exact)",
        note=lost,
    )
    note = (
        "Over all pairs of configurations that differ in this parameter alone; the geometric mean of the ratios. "
        + lost
    )
    of_contrasts = tables.of_records(
        [
            {
                "parameter": contrast.parameter,
                "from": number_text(contrast.low),
                "to": number_text(contrast.high),
                "NMSE ratio": contrast.ratio,
                "NMSE ratio" + LOW: contrast.interval[0],
                "NMSE ratio" + HIGH: contrast.interval[1],
                "pairs": contrast.pairs,
                "better": SAME if contrast.better is None else number_text(contrast.better),
            }
            for contrast in analysis.contrasts(points, scores)
        ],
        name=f"{name}-contrasts",
        title="What a parameter's next value does to the validation NMSE",
        note=note.strip(),
    )
    figure = figures.svg(figures.main_effects(effects, number_text))
    return [of_effects, of_contrasts], [Picture(name=f"{name}-effects", title="Main effects", svg=figure)]


def _parameters(closed: Closed) -> list[str]:
    return list(closed.row.specification.space)


def _counter(closed: Closed) -> str:
    """Return the head of the configurations' numbers: their place in the grid, or the trial's number."""
    return "config" if closed.study.sampler == "grid" else "trial"
