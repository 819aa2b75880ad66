"""A learning curve for people: a table and sentences on what more training images would bring, and a figure."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.queue import finite
from hpo.report import tables
from hpo.report.tables import HIGH, LOW, Table
from hpo.report.words import BASELINES
from hpo.scores.learning_curve import ALL, Errors, LearningCurve
from hpo.scores.power_law import FEWEST_SIZES, PowerLaw
from hpo.text import in_brackets, point_text, score_text

if TYPE_CHECKING:
    from hpo.report.document import Picture

NOTE = (
    "RMSE in the unit behind the target, means over the seeds, validation split. Slope: the exponent b of the power "
    "law a / images^b, fitted to the logarithms of all trainings. Brackets: 95 % intervals from the fit's covariance "
    "(Student's t). That of the forecast also covers a law with a floor under the error, if the trainings leave one "
    "open. The forecast holds for further images like these, and for this configuration."
)


def table(curve: LearningCurve) -> Table:
    """Return the errors by the number of training images, and the forecast for twice as many."""
    forecast = f"{2 * curve.images:,} images, forecast"
    sizes = [f"{size:,} images" for size in curve.sizes]
    keys = [*sizes, forecast, forecast + LOW, forecast + HIGH, "slope", "slope" + LOW, "slope" + HIGH]
    records: list[dict[str, Any]] = []
    for errors in curve.errors:
        values: dict[str, Any] = {"target": _name(errors), "curve": _verdict(errors.law)}
        values |= zip(sizes, errors.means, strict=True)
        if (law := errors.law) is not None:
            values |= zip(keys[-3:], (law.exponent, *law.exponent_interval), strict=True)
        if law is not None and not law.is_poor:
            values |= zip(keys[-6:-3], (law.twice, *law.twice_interval), strict=True)
        records.append(values | {BASELINES[name]: error for name, error in errors.baselines.items()})
    heads = [BASELINES[name] for name in curve.errors[0].baselines]
    return tables.of_records(
        records,
        title=f"{curve.study}{in_brackets(point_text(curve.point))}: errors by the number of training images",
        name=f"{curve.study}-learning-curve",
        note=NOTE,
        keys=["target", *keys, "curve", *heads],
        texts=dict.fromkeys([*sizes, forecast, "slope", *heads], score_text),
        left=["curve"],
    )


def lines(curve: LearningCurve) -> list[str]:
    """Return sentences on what twice the training images would bring to the mean NRMSE of all targets."""
    errors = curve.errors[0]
    law, what = errors.law, "mean NRMSE" if errors.name == ALL else f"RMSE of {_name(errors)}"
    if law is None:
        return [f"No forecast: expected trainings on {FEWEST_SIZES} or more shares of the images, found fewer."]
    slope = f"slope {law.exponent:.2f} {_ends(law.exponent_interval, '.2f')}"
    if law.is_poor:
        return [
            f"No forecast: a power law does not describe how the {what} changes with the images ({slope}). A misfit as "
            f"large as here has a probability of {law.misfit:.1g}."
        ]
    if law.is_flat:
        return [
            f"The {what} does not fall measurably from {curve.sizes[0]:,} to {curve.images:,} training images "
            f"({slope}): more images of this kind would hardly help this configuration."
        ]
    may_stay = law.twice_interval[1] >= law.now
    return [
        f"Twice the training images ({2 * curve.images:,}) would bring the {what} from {law.now:.3g} to about "
        f"{law.twice:.3g} {_ends(law.twice_interval, '.3g')} ({slope})."
        + (" It may also stay as it is: these trainings do not exclude a floor." if may_stay else "")
    ]


def picture(curve: LearningCurve) -> "Picture":
    """Return the figure of the errors over the number of training images."""
    from hpo.report import figures
    from hpo.report.document import Picture

    figure = figures.svg(figures.learning_curve(curve.trained_on, {_name(errors): errors for errors in curve.errors}))
    return Picture(name=f"{curve.study}-learning-curve", title="Errors and the number of training images", svg=figure)


def files(curve: LearningCurve) -> Mapping[str, str]:
    """Return the text of the files at a study's run, by their names."""
    return {
        "learning-curve.csv": tables.csv(tables.frame(table(curve))),
        "learning-curve.json": json.dumps(finite(curve.to_json()), indent=2, allow_nan=False),
        "learning-curve.svg": picture(curve).svg,
        "learning-curve.txt": tables.text(table(curve)) + "\n".join(lines(curve)) + "\n",
    }


def metrics(curve: LearningCurve) -> dict[str, float | None]:
    """Return the metrics of a study's run: of the mean NRMSE; no forecast where the law does not fit."""
    law = next((errors.law for errors in curve.errors if errors.name == ALL), None)
    if law is None:
        return {}
    return {"learning_curve_slope": law.exponent, "forecast_val_nrmse": None if law.is_poor else law.twice}


def _name(errors: Errors) -> str:
    return "all, mean NRMSE" if errors.name == ALL else f"{errors.name}{f' [{errors.unit}]' if errors.unit else ''}"


def _verdict(law: PowerLaw | None) -> str:
    if law is None:
        return "too few trainings"
    return "no power law" if law.is_poor else "flat" if law.is_flat else "falls"


def _ends(interval: tuple[float, float], places: str) -> str:
    return f"[{interval[0]:{places}}, {interval[1]:{places}}]"
