"""The report of closed studies: summary, alarms, the selected models, their curves, where they err, and how the numbers
were made."""

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from hpo.queue import State
from hpo.report import claims, error_section, figures, study_section, tables
from hpo.report.answers import OPEN
from hpo.report.document import Document, Picture, Section
from hpo.report.study_section import Importances
from hpo.report.words import BASELINES, openings
from hpo.scores import alarms, analysis, gains
from hpo.scores.evidence import Closed, Evidence
from hpo.study import Choices, Interval
from hpo.study.records import SplitScores
from hpo.text import counted, number_text, score_text, squared
from models import metrics
from models.metrics import DESCRIPTORS, Scores

Record = dict[str, Any]
SCORES_EXPLAINED = (
    "NMSE: mean over the targets of MSE / variance of the training labels; 0 is perfect, 1 is what the mean of "
    "the training labels achieves. MSE: in the label's unit squared, mean over the targets, so the largest "
    "targets make most of it. R²: against the mean of the split that is evaluated, mean over the targets "
    "(those that vary there). NRMSE: RMSE / standard deviation of the training labels. MAPE: mean of "
    "|error| / |label|, as a fraction (of targets without a label of zero there). "
    "Baseline predictors: the mean of the training labels, a cubic polynomial in the volume fraction, and ridge "
    "on descriptors of the image, all fitted on the training split; the validation split selects ridge's penalty."
)


def build(evidence: Evidence, importances: Importances) -> Document:
    """Return the whole report; `importances` of parameters where no full grid shows what they do."""
    names = [closed.row.name for closed in evidence.closed]
    return Document(
        title=f"{', '.join(names)} on {evidence.closed[0].row.facts.data.name}",
        summary=_summary(evidence),
        alarms=_alarms(evidence),
        answers=claims.answers(evidence),
        sections=[
            _models(evidence),
            *(study_section.section(evidence, closed, importances) for closed in evidence.closed),
            _curves(evidence),
            *([error_section.errors(evidence.tested)] if evidence.winners else []),
            _origin(evidence),
        ],
    )


def _summary(evidence: Evidence) -> list[str]:
    trials = sum(job.state == State.DONE for closed in evidence.closed for job in closed.jobs)
    sizes = evidence.closed[0].row.facts.data.sizes
    folds = {closed.study.folds for closed in evidence.closed}
    how = f"trained on {sizes[0]} cells and selected on {sizes[1]} others"
    if folds != {None}:
        counts = ", ".join(f"{count} folds" if count else how for count in sorted(folds, key=lambda one: one or 0))
        how = f"trained and selected on {sizes[0] + sizes[1]} cells ({counts})"
    head = (
        f"{counted(trials, 'network', 'were')} {how}. The scores below are of {counted(sizes[2], 'test cell')} that "
        "neither training nor selection saw."
    )
    if not evidence.winners:
        return [head, "No trial was finished, so no model was selected."]
    first = evidence.winners[0]
    test = first.entry.test
    cubic, mean = (_tested(evidence, name).r2 for name in ("volume fraction", "mean"))
    varies = metrics.varies(evidence.tested.truth)
    per_target = [
        (-math.inf if value is None else value, name)  # an infinite error: no R²
        for value, name, exists in zip(test.per_target["r2"], evidence.dataset.target_names, varies, strict=True)
        if exists
    ]
    worst, target = min(per_target, default=(None, "none"))
    over = counted(len(per_target), "target") if varies.all() else f"the {len(per_target)} targets that vary there"
    ends = analysis.interval(evidence.tested.samples(first.predicted)["r2"])
    r2, low, high, least = (score_text(value, ".4f") for value in (test.r2, *ends, worst))
    return [
        f"Selected: {first.title}, with {first.entry.parameters:,} parameters. It explains {percent(test.r2)} "
        f"of the variance of the labels (R² {r2}, 95 % interval {low} to {high}, mean over {over}; least {target}: "
        f"{least}). A cubic polynomial in the volume fraction alone explains {percent(cubic)}, the "
        f"mean of the training labels {percent(mean)}. The selected model is "
        f"{error_section.against(evidence.tested, first.predicted)}.",
        *_need(evidence),
        head,
    ]


def _need(evidence: Evidence) -> list[str]:
    """Say whether a network is needed, where a closing has fitted ridge on descriptors."""
    if DESCRIPTORS not in evidence.predictors:
        return []
    first, explained = evidence.winners[0], percent(_tested(evidence, DESCRIPTORS).r2)
    rival = error_section.against(evidence.tested, first.predicted, DESCRIPTORS)
    answer = "yes" if rival.startswith(error_section.BETTER) else "no"
    if rival.startswith(error_section.UNKNOWN):
        answer = OPEN
    if first.model["family"] == "descriptors":
        answer = "the selected model is none"
    return [
        f"Is a network needed here? Ridge on descriptors of the image explains {explained} of the variance, and the "
        f"selected model is {rival}: {answer}."
    ]


def percent(r2: float | None) -> str:
    """Return R² as a share of the variance, with the digits that tell it from all of it."""
    if r2 is None or r2 <= 0:
        return "an unknown part" if r2 is None else "nothing"
    left = max(100 * (1 - r2), 1e-6)
    return f"{100 * r2:.{max(1, -math.floor(math.log10(left)))}f} %"


def _alarms(evidence: Evidence) -> list[str]:
    """Return the alarms of each study, as recorded at its closing (or from its results, if it closed before there were
    any), and that of all studies together."""
    sentences = []
    for closed in evidence.closed:
        ranked, predictors = [job for job, _ in closed.points], closed.row.facts.predictors
        recorded = closed.ended.alarms
        own = alarms.alarms(ranked, predictors, None) if recorded is None else recorded
        sentences += [f"{closed.row.name}: {alarm}" for alarm in own]
    everything = [job for closed in evidence.closed for job, _ in closed.points]
    joint = alarms.at_the_mean(everything, evidence.closed[0].row.facts.predictors)
    return sentences + [f"all studies: {alarm}" for alarm in joint if len(evidence.closed) > 1]


def _models(evidence: Evidence) -> Section:
    """Return the selected models and the baseline predictors on the test split (table 3 of the source study)."""
    unit, on_test, training = evidence.dataset.unit, [], []
    for winner in evidence.winners:
        job, entry = winner.job, winner.entry
        assert job.spec is not None and job.result is not None
        words = {"model": winner.title, "weights": entry.weights or "from scratch", "verdict": entry.verdict}
        scores = error_section.scored(evidence.tested, winner.predicted, entry.test)
        on_test.append({**words, "validation NMSE": winner.nmse, **scores})
        training.append(
            {
                "model": winner.title,
                "parameters": entry.parameters,
                "trainable": job.spec.trainable_parameters or entry.parameters,
                "validation NMSE": winner.nmse,
                "best epoch": job.result.best_epoch,
                "last epoch NMSE": job.result.last_val_nmse,
                f"last epoch MSE {squared(unit)}": job.result.last_val_mse,
                "epochs to 5 %": evidence.converged(winner.curves["val/nmse"]),
                "training s": job.result.seconds,
                "version": entry.version,
            }
        )
    for name, predicted in evidence.predictors.items():
        nmse = _validated(evidence, name).nmse
        scores = error_section.scored(evidence.tested, predicted, _tested(evidence, name))
        on_test.append({"model": BASELINES[name], "weights": "", "verdict": "", "validation NMSE": nmse, **scores})
    by_title = {winner.title: winner.entry.test for winner in evidence.winners}
    by_title |= {BASELINES[name]: _tested(evidence, name) for name in evidence.predictors}
    of_test = tables.of_records(
        sorted(on_test, key=lambda record: record["validation NMSE"]),
        left=("weights", "verdict"),
        name="models-test",
        title="Selected models on the test split",
        note="In the order of the validation split, which selected them; all other scores are of the test split. "
        "Brackets: 95 % intervals, bootstrap over the test cells. Mean and volume fraction see nothing of an "
        "image but, at most, its mean grey value.",
    )
    of_training = tables.of_records(
        training,
        name="models",
        title="The same models: size and training",
        note="Scores of the validation split. Epochs to 5 %: until its NMSE was within 5 % of the lowest. Version: "
        "of the registered model; a model that does not beat the mean has none.",
    )
    return Section(
        title="The models",
        tables=[
            of_test,
            of_training,
            *_gains(evidence),
            *error_section.by_target(evidence.tested, by_title),
        ],
    )


def _gains(evidence: Evidence) -> list[tables.Table]:
    """Return the table of what the winners gain over the baseline predictors; none where that was not recorded."""
    table = tables.of_records(
        [
            {"model": winner.title, "over": BASELINES[name], "gain": gain.gain}
            | {f"gain{tables.LOW}": gain.low, f"gain{tables.HIGH}": gain.high}
            | {"resampled": counted(gain.drawn, gain.unit), "trials": gain.trials}
            for winner in evidence.winners
            for name, gain in (winner.entry.gains or {}).items()
        ],
        left=("over", "resampled"),
        name="gains",
        title="Gain over the baseline predictors on the validation split",
        note="Validation NMSE of the baseline predictor less that of the model, with its 95 % interval: bootstrap-t "
        f"over the images, {gains.RESAMPLES:,} resamples, seed {gains.SEED}. In each resample the best of the trials "
        "is selected again. A model whose interval over the mean is not above 0 does not become @champion.",
    )
    return [table] if table.rows else []


def _tested(evidence: Evidence, name: str) -> Scores:
    """Return the test scores of a baseline predictor, as a closing recorded them."""
    for scores in _recorded(evidence, name):
        if scores.test is not None:
            return scores.test
    return evidence.tested.scores(evidence.predictors[name])


def _validated(evidence: Evidence, name: str) -> Scores:
    """Return the validation scores of a baseline predictor: those of planning, else of a closing."""
    planned = evidence.closed[0].row.facts.predictors.get(name)
    return (planned or next(_recorded(evidence, name))).validation


def _recorded(evidence: Evidence, name: str) -> Iterator[SplitScores]:
    """Yield the scores of a baseline predictor in each closing that has them."""
    for closed in evidence.closed:
        if closed.ended.predictors is not None and name in closed.ended.predictors:
            yield closed.ended.predictors[name]


def _curves(evidence: Evidence) -> Section:
    """Return the loss curves of the winners (figures 1 to 7 of the source study)."""
    pictures: list[Picture] = []

    def draw(name: str, title: str, curves: Mapping[str, figures.Curve], **options: Any) -> None:
        pictures.append(Picture(name=name, title=title, svg=figures.svg(figures.loss_curves(curves, **options))))

    roles = {"baseline": "the baseline", "grid": "the best tuned network"}
    for winner in evidence.winners:
        if winner.role in ("baseline", "grid") or winner.model["family"] != "transfer":
            title = f"Loss of {roles.get(winner.role, 'the best')}: {winner.title}"
            draw(f"loss-{len(pictures)}", title, {winner.title: winner.curve})
    backbones = [winner.model["backbone"] for winner in evidence.winners if winner.model["family"] == "transfer"]
    for name in dict.fromkeys(backbones):
        winners = [winner for winner in evidence.winners if winner.model.get("backbone") == name]
        phases = {"head": "head only", "fine-tuned": "fine-tuned"}
        words = " and ".join(text for role, text in phases.items() if role in {winner.role for winner in winners})
        draw(f"phases-{name}", f"{name}: {words}", {winner.title: winner.curve for winner in reversed(winners)})
    curves = {winner.title: winner.curve for winner in evidence.winners}
    if len(curves) > 1:
        for score, words in (("val/nmse", "Validation"), ("train/nmse", "Training")):
            draw(f"all-{words.lower()}", f"{words} loss of all models", curves, keys=(score,))
    note = "NMSE of each epoch on a logarithmic axis. Training: mean over the epoch while it learned, dropout included."
    return Section(title="Loss curves", text=[note], pictures=pictures)


def _origin(evidence: Evidence) -> Section:
    """Return how the numbers were made: data, settings, versions, and what each score means."""
    origins = {closed.row.name: _origin_of(evidence, closed) for closed in evidence.closed}
    keys = dict.fromkeys(key for origin in origins.values() for key in origin)
    table = tables.of_records(
        [{"what": key} | {name: origin.get(key, "") for name, origin in origins.items()} for key in keys],
        name="origin",
        title="Data, settings, versions",
        texts=dict.fromkeys(origins, number_text),
        left=list(origins),
        limit=len(keys),
    )
    selection = (
        "Selected on the validation split alone. The test split was opened when each study closed, for its selected "
        "models; this report shows what was predicted then."
    )
    selection += "".join(
        f" {closed.row.name} closed again after more trials: it has {openings(closed.ended)}."
        for closed in evidence.closed
        if (closed.ended.openings or 1) > 1
    )
    return Section(title="How these numbers were made", text=[SCORES_EXPLAINED, selection], tables=[table])


def _origin_of(evidence: Evidence, closed: Closed) -> Record:
    facts, plan = closed.row.facts.data, closed.study
    tags = next((winner.tags for winner in evidence.winners if winner.study == closed.row.name), {})
    done = [job for job in closed.jobs if job.result and job.state == State.DONE]
    begin, end = closed.row.created_at, max((job.changed_at for job in closed.jobs), default=closed.row.created_at)
    space = {name: map(number_text, _values(parameter)) for name, parameter in plan.space.items()}
    packages = ("hpo", "torch", "optuna", "mlflow", "numpy")
    return {
        "trials": f"{len(done)} of {len(closed.jobs)} with a score",
        "sampler, pruner": f"{plan.sampler}, {plan.pruner['name']}",
        "seed": plan.seed,
        "repeats": plan.repeats,
        **({"folds": plan.folds} if plan.folds else {}),
        **{f"model.{name}": value for name, value in plan.model.items()},
        **{f"training.{name}": value for name, value in plan.training.items()},
        **{f"space.{name}": ", ".join(values) for name, values in space.items()},
        "data set": f"{facts.name}, digest {facts.digest[:16]}{facts.beside}",
        "split (training/validation/test)": f"{'/'.join(map(str, facts.sizes))}, digest {facts.split[:16]}",
        "identity": closed.row.identity[:16],
        "planned": datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "planned to closed, min": (end - begin) / 60,
        "training min, all trials": sum(job.result.seconds for job in done if job.result) / 60,
        "device": tags.get("hpo.device", ""),
        "versions": ", ".join(f"{package} {tags.get('hpo.version.' + package, '?')}" for package in packages),
        "commit": tags.get("hpo.commit", ""),
    }


def _values(parameter: Choices | Interval) -> list[Any]:
    return list(parameter.values) if isinstance(parameter, Choices) else [parameter.low, parameter.high]
