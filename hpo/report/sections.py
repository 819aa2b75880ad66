"""What the report says of closed studies: their tables, figures, questions and answers. Frames hold full numbers."""

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import optuna
import pandas

from hpo.report import answers, figures
from hpo.report.document import HIGH, LOW, Document, Picture, Section, Table
from hpo.report.results import NAMES, TOP, within_spread
from hpo.scores import alarms, analysis, ranking
from hpo.scores.evidence import Closed, Evidence, Winner
from hpo.search import sampling
from hpo.study import Choices, Interval, provenance
from hpo.text import number_text, one_line, score_text, utf8
from models import metrics

WORST = 10  # test cells shown
FEWEST = 10  # trials from which importances are computed
MEAN = "mean NMSE of the repeats"
Row = dict[str, Any]


def build(evidence: Evidence) -> Document:
    """Everything the report says."""
    names = [each.row.name for each in evidence.closed]
    return Document(
        title=f"{', '.join(names)} on {evidence.closed[0].row.facts['data']['name']}",
        summary=_summary(evidence),
        alarms=_alarms(evidence),
        answers=answers.answers(evidence),
        sections=[
            _final(evidence),
            *(_study(evidence, each) for each in evidence.closed),
            _curves(evidence),
            *([_errors(evidence)] if evidence.winners else []),
            _origin(evidence),
        ],
    )


def _summary(evidence: Evidence) -> list[str]:
    trials = sum(job.state == "done" for each in evidence.closed for job in each.jobs)
    sizes = evidence.closed[0].row.facts["data"]["sizes"]
    head = (
        f"{trials} networks were trained on {sizes[0]} cells and selected on {sizes[1]} others. The scores below are "
        f"of {sizes[2]} test cells that neither training nor selection saw."
    )
    if not evidence.winners:
        return [head, "No trial was finished, so no model was selected."]
    first = evidence.winners[0]
    samples = evidence.samples(first.predicted)
    low, high = analysis.interval(samples["r2"])
    test = first.entry["test"]
    cubic, mean = (_predictor(evidence, name)["r2"] for name in ("volume fraction", "mean"))
    known = [
        (value, name)
        for value, name in zip(test["per_target"]["r2"], evidence.dataset.target_names, strict=True)
        if value is not None  # a component that does not vary in the test split
    ]
    worst, component = min(known, default=(None, "none"))
    all_vary = len(known) == len(test["per_target"]["r2"])
    over = f"{len(known)} components" if all_vary else f"the {len(known)} components that vary there"
    against = answers.against_volume_fraction(evidence, first)
    return [
        head,
        f"Selected: {first.title}, with {first.entry['parameters']:,} parameters. It explains {percent(test['r2'])} "
        f"of the variance of the labels (R² {score_text(test['r2'], '.4f')}, 95 % interval {score_text(low, '.4f')} to "
        f"{score_text(high, '.4f')}, mean over {over}; least {component}: "
        f"{score_text(worst, '.4f')}). A cubic polynomial in the volume fraction alone explains {percent(cubic)}, the "
        f"mean of the training labels {percent(mean)}. The selected model is {against}.",
    ]


def percent(r2: float | None) -> str:
    """R² as a share of the variance, with the digits that tell it from all of it."""
    if r2 is None or r2 <= 0:
        return "an unknown part" if r2 is None else "nothing"
    left = max(100 * (1 - r2), 1e-6)
    return f"{100 * r2:.{max(1, -math.floor(math.log10(left)))}f} %"


def _alarms(evidence: Evidence) -> list[str]:
    """Those of each study, as recorded at its closing (or, closed before there were any, from its results), and that
    of all together."""
    found = []
    for each in evidence.closed:
        ranked, predictors = [job for job, _ in each.points], each.row.facts["predictors"]
        recorded = each.ended.get("alarms")
        of_it = alarms.alarms(ranked, predictors, None) if recorded is None else recorded
        found += [f"{each.row.name}: {alarm}" for alarm in of_it]
    everything = [job for each in evidence.closed for job, _ in each.points]
    joint = alarms.at_the_mean(everything, evidence.closed[0].row.facts["predictors"])
    return found + [f"all studies: {alarm}" for alarm in joint if len(evidence.closed) > 1]


def _final(evidence: Evidence) -> Section:
    """Table 3 of the source study: the selected models on the test split."""
    unit, rows, known = evidence.dataset.unit, [], []
    for winner in evidence.winners:
        job = winner.job
        assert job.spec is not None and job.result is not None
        words = {"weights": winner.entry.get("weights") or "from scratch", "verdict": winner.entry["verdict"]}
        scores = _scores(evidence, winner.predicted, winner.entry["test"])
        rows.append({"model": winner.title, **words, "validation NMSE": winner.nmse, **scores})
        known.append(
            {
                "model": winner.title,
                "parameters": winner.entry["parameters"],
                "trainable": job.spec.get("trainable_parameters", winner.entry["parameters"]),
                "validation NMSE": winner.nmse,
                "best epoch": job.result["best_epoch"],
                "last epoch NMSE": job.result["last_val_nmse"],
                f"last epoch MSE {unit}²": job.result["last_val_mse"],
                "epochs to 5 %": evidence.converged(winner.curves["val/nmse"]),
                "training s": job.result["seconds"],
                "version": winner.entry["version"],
            }
        )
    for name, predicted in evidence.predictors.items():
        scores = _scores(evidence, predicted, _predictor(evidence, name))
        nmse = evidence.closed[0].row.facts["predictors"][name]["validation"]["nmse"]
        rows.append({"model": NAMES[name], "weights": "", "verdict": "", "validation NMSE": nmse, **scores})
    rows.sort(key=lambda row: row["validation NMSE"])
    final = [
        Table(
            name="models-test",
            title="Selected models on the test split",
            frame=pandas.DataFrame(rows),
            note="In the order of the validation split, which selected them; all other scores are of the test split. "
            "Brackets: 95 % intervals, bootstrap over the test cells. The trivial predictors see nothing of an image "
            "but, at most, its mean grey value.",
        ),
        Table(
            name="models",
            title="The same models: size and training",
            frame=pandas.DataFrame(known),
            note="Scores of the validation split. Epochs to 5 %: until its NMSE was within 5 % of the lowest. Version: "
            "of the registered model; none of one that does not beat the mean.",
        ),
    ]
    by_component = [
        Table(
            name=f"components-{score}",
            title=f"{title} by component, test split",
            frame=pandas.DataFrame(_by_component(evidence, score)),
        )
        for score, title in (("r2", "R²"), ("nrmse", "NRMSE"), ("rmse", f"RMSE in {unit}"), ("mape", "MAPE"))
    ]
    return Section(title="The models", tables=[*final, *by_component])


def _scores(evidence: Evidence, predicted: np.ndarray, test: Mapping[str, Any]) -> Row:
    samples, found = evidence.samples(predicted), Row()
    columns = {"nmse": "NMSE", "mse": f"MSE {evidence.dataset.unit}²", "r2": "R²", "nrmse": "NRMSE", "mape": "MAPE"}
    for score, name in columns.items():
        low, high = analysis.interval(samples[score])
        found |= {name: test[score], name + LOW: low, name + HIGH: high}
    return found


def _predictor(evidence: Evidence, name: str) -> Row:
    """Test scores of a trivial predictor, as a closing recorded them."""
    for each in evidence.closed:
        if "predictors" in each.ended:
            return dict(each.ended["predictors"][name]["test"])
    return metrics.scores(evidence.predictors[name], evidence.truth, train_variance=evidence.train_variance).to_dict()


def _by_component(evidence: Evidence, score: str) -> Iterator[Row]:
    found = [(winner.title, winner.entry["test"]) for winner in evidence.winners]
    found += [(NAMES[name], _predictor(evidence, name)) for name in evidence.predictors]
    for title, test in found:
        values, mean = test["per_target"]["mse" if score == "rmse" else score], test.get(score)
        if score == "rmse":
            values = [value**0.5 for value in values]
            mean = float(np.mean(values))
        row: Row = {"model": title}
        mark = "R² " if score == "r2" else ""  # a column's name says how many places it is shown with
        row |= {mark + name: value for name, value in zip(evidence.dataset.target_names, values, strict=True)}
        yield row | {mark + "mean": mean}


def _study(evidence: Evidence, each: Closed) -> Section:
    """Tables 1 and 2 of the source study: the best points, and all of them; what each parameter does."""
    ended = [job for job in each.jobs if job.state in ("dead", "diverged", "pruned", "cancelled")]
    text = [each.row.facts.get("description") or ""]
    text += [f"{each.study.at_random}."] if each.study.at_random else []
    text += [f"{len(ended)} of {len(each.jobs)} trials have no score: see the table of trials."] if ended else []
    if not each.points:
        return Section(title=f"Study {each.row.name}", text=text)
    frame = trials(evidence, each)
    best = pandas.DataFrame(_predictor_rows(evidence, each)).reindex(columns=frame.columns)
    top = pandas.concat([frame.head(TOP), best])
    scores = top.get(MEAN, top["validation NMSE"]).fillna(top["validation NMSE"]).to_numpy(float, copy=True)
    unstable = ranking.diverged(each.jobs)  # such points come last, as they do in the election
    scores[[row for row, (job, _) in enumerate(each.points[:TOP]) if job.number in unstable]] = np.inf
    top = top.iloc[np.argsort(scores, kind="stable")]
    pictures: list[Picture] = []
    tables = [
        Table(
            name=f"{each.row.name}-top",
            title=f"Best {min(TOP, len(frame))} of {len({job.number for job in each.jobs})} points, validation split",
            frame=top.drop(columns=["run_id", "state"]),
            note="Scores of the best epoch; the source study reports the last epoch's, which stand beside them. Epochs "
            "to 5 %: none for a network that has not learned more than the mean."
            + (" ≈: within the spread of the first." if each.study.repeats > 1 else ""),
        )
    ]
    unfinished = _unfinished(each)
    if len(frame) + len(unfinished) > 1:
        by_mse = frame.sort_values(f"validation MSE {evidence.dataset.unit}²", kind="stable")
        mse = f"validation MSE {evidence.dataset.unit}²"
        columns = [_number(each), *_parameters(each), mse, "validation NMSE", "R²", "NRMSE", "state"]
        parts = [by_mse, pandas.DataFrame(_predictor_rows(evidence, each)), unfinished]
        tables.append(
            Table(
                name=f"{each.row.name}-trials",
                title="All points by validation MSE, as the source study orders them",
                frame=pandas.concat([part for part in parts if len(part)])[columns],
                note="The trivial predictors and points without a score stand last.",
            )
        )
    if len(frame) > 1:
        found, drawn = _effects(each)
        tables, pictures = tables + found, pictures + drawn
    sizes = [job.spec["parameters"] for job, _ in each.points if job.spec]
    if len(set(sizes)) > 2:
        lines = {NAMES[name]: found["validation"]["nmse"] for name, found in each.row.facts["predictors"].items()}
        picture = figures.capacity(sizes, [score for _, score in each.points], lines)
        title = "Size of the network and validation NMSE"
        pictures.append(Picture(name=f"{each.row.name}-capacity", title=title, svg=figures.svg(picture)))
    return Section(title=f"Study {each.row.name}", text=text, tables=tables, pictures=pictures)


def trials(evidence: Evidence, each: Closed) -> pandas.DataFrame:
    """The best finished trial of each point, best first."""
    rows: list[Row] = []
    unit, repeated = evidence.dataset.unit, ranking.repeats(each.jobs)
    best = ranking.spread(repeated[each.points[0][0].number]) if each.points else None
    lacking = {
        job.number: ranking.incomplete([j for j in each.jobs if j.number == job.number]) for job, _ in each.points
    }
    for job, _ in each.points:
        assert job.spec is not None and job.result is not None
        found, curve = job.result, each.curves[job.id]["val/nmse"]
        mean, deviation = ranking.spread(repeated[job.number])
        repeats: Row = {MEAN: mean, "standard deviation": deviation}
        if any(lacking.values()):
            repeats["repeats"] = lacking[job.number]
        repeats |= {"≈": "≈" if rows and best and within_spread((mean, deviation), best) else ""}
        rows.append(
            {
                _number(each): job.number if job.config is None else job.config,
                **job.spec["point"],
                "weights": provenance(job.spec["model"]) or "from scratch",
                "parameters": job.spec["parameters"],
                **(repeats if each.study.repeats > 1 else {}),
                "validation NMSE": found["best_val_nmse"],
                f"validation MSE {unit}²": found["best_val_mse"],
                "R²": found["validation"]["r2"],
                "NRMSE": found["validation"]["nrmse"],
                "MAPE": found["validation"]["mape"],
                "best epoch": found["best_epoch"],
                "epochs to 5 %": evidence.converged(curve),
                "last epoch NMSE": found["last_val_nmse"],
                f"last epoch MSE {unit}²": found["last_val_mse"],
                "training s": found["seconds"],
                "state": job.state,
                "run_id": job.run_id,
            }
        )
    return pandas.DataFrame(rows)


def _predictor_rows(evidence: Evidence, each: Closed) -> list[Row]:
    first = next(iter(_parameters(each)), _number(each))
    rows = []
    for name, found in each.row.facts["predictors"].items():
        scores = found["validation"]
        rows.append(
            {
                first: NAMES[name],
                "validation NMSE": scores["nmse"],
                f"validation MSE {evidence.dataset.unit}²": scores["mse"],
                "R²": scores["r2"],
                "NRMSE": scores["nrmse"],
                "MAPE": scores["mape"],
            }
        )
    return rows


def _unfinished(each: Closed) -> pandas.DataFrame:
    """Trials without a score: dead, diverged, pruned, cancelled."""
    again = each.study.repeats > 1
    rows = [
        {
            _number(each): job.number if job.config is None else job.config,
            **(job.spec or {}).get("point", {}),
            "state": f"{job.state}, repeat {job.repeat}" if again else job.state,
        }
        for job in each.jobs
        if job.state != "done"
    ]
    return pandas.DataFrame(rows)


def _effects(each: Closed) -> tuple[list[Table], list[Picture]]:
    """What each parameter does: exactly on a full grid, by Optuna's importances otherwise."""
    found = sorted(each.points, key=lambda point: (point[0].config or 0, point[0].number))  # in the grid's order
    points, scores = [job.spec["point"] for job, _ in found if job.spec], [score for _, score in found]
    lost = (
        f"{len(each.lost)} points lack a score of a trial: what is left was selected by how it went, and may mislead."
    )
    lost = lost if each.lost else ""
    if analysis.is_factorial(points) and len(points) > 1:
        effects = analysis.main_effects(points, scores)
        columns = ("parameter", "value", "mean validation NMSE", "points")
        rows = [dict(zip(columns, (name, number_text(value), *rest), strict=True)) for name, value, *rest in effects]
        pairs = [
            {
                "parameter": pair.parameter,
                "from": number_text(pair.low),
                "to": number_text(pair.high),
                "NMSE ratio": pair.ratio,
                "NMSE ratio" + LOW: pair.interval[0],
                "NMSE ratio" + HIGH: pair.interval[1],
                "pairs": pair.pairs,
                "better": answers.SAME if pair.better is None else number_text(pair.better),
            }
            for pair in analysis.contrasts(points, scores)
        ]
        note = "Over all pairs of points that differ in this parameter alone; the geometric mean of the ratios."
        tables = [
            Table(
                name=f"{each.row.name}-effects",
                title="Main effects (full grid: exact)",
                frame=pandas.DataFrame(rows),
                note=lost,
            ),
            Table(
                name=f"{each.row.name}-contrasts",
                title="What a parameter's next value does to the validation NMSE",
                frame=pandas.DataFrame(pairs),
                note=f"{note} {lost}".strip(),
            ),
        ]
        picture = figures.svg(figures.main_effects(effects, number_text))
        return tables, [Picture(name=f"{each.row.name}-effects", title="Main effects", svg=picture)]
    importances = _importances(each)
    if not importances:
        return [], []
    frame = pandas.DataFrame({"parameter": list(importances), "importance": list(importances.values())})
    title = "Importance of each parameter (Optuna's fANOVA: share of the variance of the score)"
    return [Table(name=f"{each.row.name}-importances", title=title, frame=frame, note=lost)], []


def _importances(each: Closed) -> dict[str, float]:
    """Optuna's importances, of the finished trials as the database has them; none of fewer than ten."""
    if len(each.points) < FEWEST:
        return {}
    made, distributions = optuna.create_study(), sampling.distributions(each.study)
    for job, score in each.points:
        assert job.spec is not None
        made.add_trial(optuna.trial.create_trial(params=job.spec["point"], distributions=distributions, value=score))
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(made, evaluator=evaluator))
    except (ValueError, RuntimeError):  # scores that do not differ
        return {}


def _curves(evidence: Evidence) -> Section:
    """Figures 1 to 7 of the source study."""
    pictures: list[Picture] = []
    roles = {"baseline": "the baseline", "grid": "the best tuned network"}
    for winner in evidence.winners:
        if winner.role in ("baseline", "grid") or winner.model["family"] != "transfer":
            title = f"Loss of {roles.get(winner.role, 'the best')}: {winner.title}"
            pictures.append(_picture(f"loss-{len(pictures)}", title, {winner.title: winner.curve}))
    backbones = [winner.model["backbone"] for winner in evidence.winners if winner.model["family"] == "transfer"]
    for name in dict.fromkeys(backbones):
        found = [winner for winner in evidence.winners if winner.model.get("backbone") == name]
        curves = {winner.title: winner.curve for winner in reversed(found)}
        phases = {"head": "head only", "fine-tuned": "fine-tuned"}
        words = " and ".join(text for role, text in phases.items() if role in {winner.role for winner in found})
        pictures.append(_picture(f"phases-{name}", f"{name}: {words}", curves))
    everyone = {winner.title: winner.curve for winner in evidence.winners}
    if len(everyone) > 1:
        for score, words in (("val/nmse", "Validation"), ("train/nmse", "Training")):
            pictures.append(_picture(f"all-{words.lower()}", f"{words} loss of all models", everyone, keys=(score,)))
    note = "NMSE of each epoch on a logarithmic axis. Training: mean over the epoch while it learned, dropout included."
    return Section(title="Loss curves", text=[note], pictures=pictures)


def _picture(name: str, title: str, curves: Mapping[str, figures.Curve], **options: Any) -> Picture:
    return Picture(name=name, title=title, svg=figures.svg(figures.loss_curves(curves, **options)))


def _errors(evidence: Evidence) -> Section:
    """Where the selected model errs, and whether what it says is possible."""
    first, data = evidence.winners[0], evidence.dataset
    nrmse = np.sqrt(((first.predicted - evidence.truth) ** 2 / evidence.train_variance).mean(axis=1))
    tables, kinds = [], evidence.kinds
    if kinds is not None:
        rows = []
        for kind in sorted(set(kinds)):
            inside = np.array(kinds) == kind
            scores = metrics.scores(
                first.predicted[inside], evidence.truth[inside], train_variance=evidence.train_variance
            )
            cubic = metrics.scores(
                evidence.predictors["volume fraction"][inside],
                evidence.truth[inside],
                train_variance=evidence.train_variance,
            )
            row = {"kind": kind, "test cells": int(inside.sum()), "NMSE": scores.nmse, "R²": scores.r2}
            rows.append(row | {"NMSE, volume fraction": cubic.nmse, "R², volume fraction": cubic.r2})
        note = "By the word behind the number in the image's name. R² against the mean of the kind itself."
        tables.append(Table(name="kinds", title="By kind of microstructure", frame=pandas.DataFrame(rows), note=note))
    tables.append(_physics(evidence))
    worst = np.argsort(-nrmse, kind="stable")[:WORST]
    tables.append(_worst(evidence, first, nrmse, worst))
    images = data.images[evidence.split.test][worst].mean(axis=1)
    titles = [f"{one_line(data.names[evidence.split.test[index]])}\nNRMSE {nrmse[index]:.3f}" for index in worst]
    pictures = [
        Picture(
            name="parity",
            title="Prediction over label, test split",
            svg=figures.svg(figures.parity(evidence.truth, first.predicted, data.target_names, data.unit)),
        ),
        Picture(
            name="errors",
            title="Error of each test cell over its volume fraction",
            svg=figures.svg(figures.errors(evidence.fractions, nrmse, kinds)),
        ),
        Picture(
            name="worst", title=f"The {len(worst)} worst test cells", svg=figures.svg(figures.cells(images, titles))
        ),
    ]
    text = [f"All of the selected model, {first.title}."]
    return Section(title="Where it errs", text=text, tables=tables, pictures=pictures)


def _physics(evidence: Evidence) -> Table:
    unit, names = evidence.dataset.unit, evidence.dataset.target_names
    said = {winner.title: winner.predicted for winner in evidence.winners}
    said |= {NAMES[name]: predicted for name, predicted in evidence.predictors.items()}
    rows = []
    for title, predicted in {**said, "the labels themselves": evidence.truth}.items():
        found = analysis.physics(predicted, names, evidence.fractions, evidence.phases)
        columns = {
            "not positive definite": "not_positive_definite",
            "above Voigt": "above_voigt",
            "below Reuss": "below_reuss",
            f"Hill residual {unit}": "hill",
        }
        rows.append({"model": title} | {column: found[key] for column, key in columns.items()})
    missing = ""
    if not evidence.phases:
        missing = " No phases are given, or the images have more than two: bounds and relations are not measured."
    return Table(
        name="physics",
        title="Physical consistency, test split",
        frame=pandas.DataFrame(rows),
        note="Shares of the predicted tensors; bounds in the matrix sense: Voigt - C and C - Reuss must be positive "
        "semi-definite. Hill residual: root mean square over C13, C23, C33 of what Hill's two-phase relations miss."
        + missing,
    )


def _worst(evidence: Evidence, first: Winner, nrmse: np.ndarray, worst: Iterable[int]) -> Table:
    rows = []
    for index in worst:
        image = utf8(evidence.dataset.names[evidence.split.test[index]])
        for what, values in (("label", evidence.truth[index]), ("prediction", first.predicted[index])):
            row = {"image": image, "volume fraction": float(evidence.fractions[index]), "NRMSE": float(nrmse[index])}
            row |= {"what": what} | dict(zip(evidence.dataset.target_names, map(float, values), strict=True))
            rows.append(row)
    title = f"The worst test cells, label and prediction in {evidence.dataset.unit}"
    return Table(name="worst", title=title, frame=pandas.DataFrame(rows))


def _origin(evidence: Evidence) -> Section:
    """What the numbers were made from, with and where."""
    found: dict[str, Row] = {}
    for each in evidence.closed:
        facts, plan = each.row.facts["data"], each.study
        tags = next((winner.tags for winner in evidence.winners if winner.study == each.row.name), {})
        done = [job for job in each.jobs if job.result and job.state == "done"]
        begin, end = each.row.created_at, max((job.changed_at for job in each.jobs), default=each.row.created_at)
        row: Row = {
            "trials": f"{len(done)} of {len(each.jobs)} with a score",
            "sampler, pruner": f"{plan.sampler}, {plan.pruner['name']}",
            "seed": plan.seed,
            "repeats": plan.repeats,
            **{f"model.{name}": value for name, value in plan.model.items()},
            **{f"training.{name}": value for name, value in plan.training.items()},
            **{
                f"space.{name}": ", ".join(map(number_text, _values(parameter)))
                for name, parameter in plan.space.items()
            },
            "data set": f"{facts['name']}, digest {facts['digest'][:16]}",
            "split (training/validation/test)": f"{'/'.join(map(str, facts['sizes']))}, digest {facts['split'][:16]}",
            "identity": each.row.identity[:16],
            "planned": datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "planned to closed, min": (end - begin) / 60,
            "training min, all trials": sum(job.result["seconds"] for job in done if job.result) / 60,
            "device": tags.get("hpo.device", ""),
            "versions": ", ".join(
                f"{name} {tags.get('hpo.version.' + name, '?')}"
                for name in ("hpo", "torch", "optuna", "mlflow", "numpy")
            ),
            "commit": tags.get("hpo.commit", ""),
        }
        found[each.row.name] = row
    what = list(dict.fromkeys(key for row in found.values() for key in row))
    columns = {name: [row.get(key, "") for key in what] for name, row in found.items()}
    frame = pandas.DataFrame({"what": what} | columns, dtype=object)
    table = Table(name="origin", title="Data, settings, versions", frame=frame, shown=len(frame), plain=True)
    text = [
        "NMSE: mean over the components of MSE / variance of the training labels; 0 is perfect, 1 is what the mean of "
        "the training labels achieves. MSE: in the label's unit squared, mean over the components, so the largest "
        "components make most of it. R²: against the mean of the split that is evaluated, mean over the components "
        "(those that vary there). NRMSE: RMSE / standard deviation of the training labels. MAPE: mean of "
        "|error| / |label|, as a fraction (of components without a label of zero there). "
        "Trivial predictors: the mean of the training labels, and a cubic polynomial in the volume fraction, both "
        "fitted on the training split.",
        "Selected on the validation split alone. The test split was opened when each study closed, for its selected "
        "models; this report shows what was predicted then.",
    ]
    return Section(title="How these numbers were made", text=text, tables=[table])


def _values(parameter: Choices | Interval) -> list[Any]:
    return list(parameter.values) if isinstance(parameter, Choices) else [parameter.low, parameter.high]


def _parameters(each: Closed) -> list[str]:
    return [name for name, _ in each.row.spec["space"]]


def _number(each: Closed) -> str:
    """What counts the points: their place in the grid, or the trial's number."""
    return "config" if each.study.sampler == "grid" else "trial"
