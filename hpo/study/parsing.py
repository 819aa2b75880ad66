"""From the tables of a study file to a specification; everything wrong is said with what was expected."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpo.errors import StudyError
from hpo.study import claims, objectives
from hpo.study.objectives import NMSE, SIZES
from hpo.study.space import Choices, Interval, has_place, is_number, pruned, second_values
from hpo.study.specification import BEST, DEFAULT_DATA, LEARNING, MOST_TRIALS, SAMPLERS, Study
from hpo.text import near_miss
from models import specs

PRUNERS: dict[str, dict[str, int]] = {  # settings of each pruner with their defaults
    "none": {},
    "median": {"startup_trials": 5, "warmup_epochs": 10},
    "successive-halving": {"min_epochs": 10, "reduction_factor": 3},
    "hyperband": {"min_epochs": 10, "reduction_factor": 3},
}


KEYS: dict[str, dict[str, Any]] = {  # by table: the default of each key, or its type if it has none
    "": {
        **{"description": "", "seed": 0, "repeats": 1, "starts_from": str, "best_of": str, "points": int},
        **{"report_by": [], "data": {}, "model": {}, "sampler": {}, "pruner": {}, "space": {}, "start": []},
        **{"learn_from": [], "objectives": [NMSE], "bounds": {}},
        **{"training": {}, "claims": object},
    },
    "data": {"path": DEFAULT_DATA, "image_size": int, "folds": int},
    "sampler": {"name": "grid", "trials": int, "multivariate": False},
    "bounds": dict.fromkeys(SIZES, int),
    "pruner": {"name": "none", **dict.fromkeys((key for settings in PRUNERS.values() for key in settings), int)},
}
TABLES = tuple(key for key, default in KEYS[""].items() if default == {})
OPTIONS = {"sampler.name": SAMPLERS, "pruner.name": tuple(PRUNERS)}
RANGES = {  # of whole numbers, both ends included
    **{f"pruner.{key}": (1, 10**7) for key in KEYS["pruner"] if key != "name"},
    **{"pruner.reduction_factor": (2, 10**7), "sampler.trials": (1, MOST_TRIALS), "points": (1, MOST_TRIALS)},
    **{f"bounds.{name}": (1, 10**18) for name in SIZES},
    **{"seed": (0, 2**32 - 1), "repeats": (1, 1000), "data.folds": (2, 100)},
}
TYPES = {str: "text in quotes", int: "a whole number", bool: "true or false", list: "a list", dict: "a table"}
SEQUENCE_KEYS = ("description", "sequence", "claims")


# The others are the earlier study's.
BEST_KEYS = ("description", "seed", "repeats", "best_of", "points", "space", "training", "claims")
BEST_SPACE = ("share",)  # parameters of its own: each configuration is trained at each of their values


def parse(name: str, label: str, table: dict[str, Any], earlier: Study | None, *, overridden: bool) -> Study:
    """Return the study of a file's table, with every default written out. Raise StudyError, with `label` for the file.

    `earlier`: the study that it starts from, or whose best configurations it trains.
    """
    file = _checked(label, "", table)
    data, sampler = _checked(label, "data", file["data"]), _checked(label, "sampler", file["sampler"])
    bounds = {name: most for name, most in _checked(label, "bounds", file["bounds"]).items() if most is not None}
    space = {key: _parameter(label, key, value) for key, value in file["space"].items()}
    _check_space(label, file["model"], file["training"], space)
    _check_conditions(label, space, BEST if "best_of" in table else sampler["name"])
    file["training"] = specs.training_defaults(file["model"].get("family")) | file["training"]
    again = "best_of" in table
    kind = BEST if again else sampler["name"]
    study = Study(
        name=name,
        overridden=overridden,
        data_path=data["path"],
        image_size=data["image_size"],
        folds=data["folds"],
        sampler=kind,
        trials=_needed(label, "points", file["points"]) * len(_shares(label, space))
        if again
        else _planned(label, kind, sampler["trials"], space),
        multivariate=sampler["multivariate"],
        start=_start(label, kind, file["start"], space),
        space=space,
        pruner=_pruner(label, file["pruner"]),
        starts_from=None if again else earlier,
        best_of=earlier if again else None,
        report_by=tuple(file["report_by"]),
        learn_from=tuple(file["learn_from"]),
        objectives=tuple(file["objectives"]),
        bounds=bounds,
        claims=claims.parse(label, table.get("claims", [])),
        **{key: file[key] for key in ("description", "seed", "model", "training", "repeats")},
    )
    _check_together(label, table, study)
    try:  # every extreme of the space must be a network and a training that exist
        for point in (*study.corners(), *second_values(study.space), *study.start):
            study.specifications(point)
        completed = _completed(study)
    except specs.SpecError as error:
        raise StudyError(f"{label}: {error}") from None
    if study.starts_from is not None:
        _check_start(label, completed, study.starts_from)
    return completed


def _check_together(label: str, table: Mapping[str, Any], study: Study) -> None:
    """Raise StudyError if keys that are right by themselves do not go together."""
    if study.best_of is not None:
        _check_seeds(label, study, study.best_of)
    elif "points" in table:
        raise StudyError(f"{label}: points: they are those of the study that best_of names, and there is none.")
    if "starts_from" in table and study.starting_models:
        raise StudyError(f"{label}: starts_from and training.start_from: a trial begins with one network: keep one.")
    if study.multivariate and study.sampler != "tpe":
        raise StudyError(f"{label}: sampler.multivariate: only \"tpe\" has it, found sampler.name = '{study.sampler}'.")
    if study.repeats > 1 and study.is_pruned:
        raise StudyError(f"{label}: repeats and a pruner do not go together: every repeat of a point counts.")
    if study.learn_from and (
        study.sampler not in LEARNING
        or not all(isinstance(one, str) for one in study.learn_from)
        or len({*study.learn_from}) < len(study.learn_from)
    ):
        raise StudyError(
            f"{label}: learn_from: expected names of studies, each once, beside a sampler that learns "
            f"({', '.join(LEARNING)}), found {list(study.learn_from)!r} and sampler.name = '{study.sampler}'."
        )
    family, pruner = study.model.get("family"), study.pruner["name"]
    objectives.check(label, study.objectives, study.bounds, family=family, pruner=pruner)
    _check_folds(label, study)
    if len(study.start) > study.trials:
        raise StudyError(f"{label}: start: expected at most sampler.trials = {study.trials} points, found more.")
    for key in study.report_by:
        if not isinstance(key, str) or key not in study.space:
            valid = ", ".join(study.space)
            raise StudyError(f"{label}: report_by: expected parameters of [space] ({valid}), found {key!r}.")


def _check_folds(label: str, study: Study) -> None:
    """Raise StudyError if something does not go together with a cross-validation."""
    if study.starts_from is not None and (study.folds or study.starts_from.folds):
        raise StudyError(
            f"{label}: data.folds: a study that starts from the networks of another one has no folds, nor has the "
            f"other, {study.starts_from.name}: its networks have seen the images that would validate. Remove the key."
        )
    if study.folds and study.starting_models:
        raise StudyError(
            f"{label}: data.folds and training.start_from do not go together: that model may have seen the images that "
            "validate. Remove one of them."
        )
    if study.folds and study.pruner["name"] != "none":
        raise StudyError(
            f"{label}: data.folds and a pruner do not go together: the mean over all folds of a point decides. "
            'Remove one, as with pruner.name = "none".'
        )
    if study.folds and study.repeats > 1:
        raise StudyError(
            f"{label}: data.folds and repeats do not go together: each configuration is trained once for each fold. "
            "Remove one, as with repeats = 1."
        )


def _check_seeds(label: str, study: Study, earlier: Study) -> None:
    """Raise StudyError if a seed of the earlier study would be used again."""
    seeds = range(study.seed, study.seed + study.repeats)
    if taken := [seed for seed in range(earlier.seed, earlier.seed + earlier.repeats) if seed in seeds]:
        raise StudyError(
            f"{label}: seed: best configurations are trained with other seeds than in {earlier.name}: expected others "
            f"than {taken[0]}, found {study.seed}{f' to {seeds[-1]}' if study.repeats > 1 else ''}."
        )


def _check_start(label: str, study: Study, earlier: Study) -> None:
    """The networks of one must be those the other begins with, on the same data in the same scale."""
    if study.model["family"] != "transfer" or earlier.model["family"] != "transfer":
        raise StudyError(f'{label}: starts_from: expected model.family = "transfer" here and in {earlier.name}.')
    for key in ("seed", "data_path", "image_size"):
        here, there = getattr(study, key), getattr(earlier, key)
        if here != there:
            raise StudyError(f"{label}: starts_from: expected the {key} of {earlier.name}, {there!r}, found {here!r}.")
    if study.training.get("target_scaling") != earlier.training.get("target_scaling"):
        raise StudyError(f"{label}: starts_from: expected the training.target_scaling of {earlier.name}.")
    for key in ("backbone", "weights"):
        if missing := set(study.values_of(key)) - set(earlier.values_of(key)):
            raise StudyError(f"{label}: starts_from: {earlier.name} has no {key} {', '.join(sorted(missing))}.")


def _completed(study: Study) -> Study:
    """The same study with every default written out, so that leaving a key away or giving its default is the same."""
    model, training = study.trial(study.corners()[0])
    fixed_model = {key: value for key, value in model.items() if key not in study.space}
    fixed_training = {key: value for key, value in training.items() if key not in study.space}
    return replace(study, model=fixed_model, training=fixed_training)


def _pruner(label: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The pruner's name with all its settings."""
    name = _checked(label, "pruner", table)["name"]
    settings = {key: value for key, value in table.items() if key != "name"}
    check_keys(label, "pruner", settings, tuple(PRUNERS[name]))
    return {"name": name, **PRUNERS[name], **settings}


def _checked(label: str, where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each key that a table may have, or its default."""
    check_keys(label, where, table, tuple(KEYS[where]))
    values = {key: None if isinstance(default, type) else default for key, default in KEYS[where].items()}
    for key, value in table.items():
        full, default = f"{where}.{key}" if where else key, KEYS[where][key]
        values[key] = checked_value(label, full, value, default if isinstance(default, type) else type(default))
        low, high = RANGES.get(full, (None, 0))
        if low is not None and not low <= value <= high:
            raise StudyError(f"{label}: {full}: expected a whole number from {low} to {high}, found {value}.")
        if full in OPTIONS and value not in OPTIONS[full]:
            options, near = ", ".join(OPTIONS[full]), near_miss(value, OPTIONS[full])
            raise StudyError(f"{label}: {full}: expected one of {options}, found '{value}'.{near}")
    return values


def check_keys(label: str, where: str, table: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in table:
        if key not in valid:
            full = f"{where}.{key}" if where else key
            raise StudyError(
                f"{label}: unknown key '{full}'.{near_miss(key, valid)} Valid keys here: {', '.join(valid) or 'none'}."
            )


def _check_space(label: str, model: dict[str, Any], training: dict[str, Any], space: Mapping[str, Any]) -> None:
    family = checked_value(label, "model.family", model.get("family"), str)
    try:
        model_keys = specs.model_keys(family)
    except specs.SpecError as error:
        raise StudyError(f"{label}: model.{error}") from None
    check_keys(label, "training", training, specs.training_keys())
    if family != specs.PYTHON:  # which takes options of any name
        check_keys(label, "model", model, ("family", *model_keys))
        check_keys(label, "space", space, (*model_keys, *specs.training_keys()))
    for key in (*specs.BY_DATA_KEYS, "augmentation"):
        values = space.get(key)
        if isinstance(values, Choices) and specs.BY_DATA in values.values:
            raise StudyError(f"{label}: space.{key}: '{specs.BY_DATA}' stands for one of the others: leave it out.")
    for key in space:
        if key in model or key in training:
            table = "model" if key in model else "training"
            raise StudyError(f"{label}: '{key}' stands in [space] and in [{table}]: keep one of them.")


def _planned(label: str, sampler: str, trials: int | None, space: Mapping[str, Choices | Interval]) -> int:
    """How many trials to plan."""
    if sampler != "grid":
        return _needed(label, "sampler.trials", trials)
    if trials is not None:
        raise StudyError(f"{label}: sampler.trials: a grid trains all its points: remove the key.")
    count = 1
    for key, parameter in space.items():
        if not isinstance(parameter, Choices):
            raise StudyError(f"{label}: space.{key}: a grid needs a list of values, found an interval.")
        count *= len(parameter.values)
    if count > MOST_TRIALS:
        raise StudyError(f"{label}: the grid has {count} points; at most {MOST_TRIALS} can be planned.")
    return count


def _shares(label: str, space: Mapping[str, Choices | Interval]) -> tuple[Any, ...]:
    """Return the shares of the training images on which each best configuration is trained."""
    shares = space.get("share", Choices(values=(1.0,)))
    if not isinstance(shares, Choices):
        raise StudyError(f"{label}: space.share: expected a list of shares of the training images, found an interval.")
    return shares.values


def _needed(label: str, key: str, trials: int | None) -> int:
    if trials is None:
        raise StudyError(f"{label}: {key}: expected a whole number, found nothing.")
    return trials


def _start(
    label: str, sampler: str, points: Sequence[Any], space: Mapping[str, Choices | Interval]
) -> tuple[dict[str, Any], ...]:
    """The points to begin with, each with all parameters of the space, in its order."""
    if points and sampler == "grid":
        raise StudyError(f"{label}: start: a grid trains all its points: remove the key.")
    for number, point in enumerate(points):
        where = f"start[{number}]"
        check_keys(label, where, checked_value(label, where, point, dict), tuple(space))
        for key, parameter in space.items():
            is_wanted = has_place(parameter, point)
            if within(parameter, point.get(key)) if is_wanted else key not in point:
                continue
            expected = _shown_space(parameter) if is_wanted else "nothing, for its condition (when) does not hold"
            raise StudyError(f"{label}: {where}.{key}: expected {expected}, found {_text(point.get(key))}.")
    return tuple(pruned(space, point) for point in points)


def within(parameter: Choices | Interval, value: Any) -> bool:
    """Return whether a parameter can have a value."""
    if isinstance(parameter, Choices):
        return any(type(choice) is type(value) and choice == value for choice in parameter.values)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not parameter.low <= value <= parameter.high:
        return False
    whole = isinstance(parameter.low, int) and isinstance(parameter.high, int)
    if whole and not isinstance(value, int):
        return False
    steps = (value - parameter.low) / parameter.step if parameter.step else 0
    return abs(steps - round(steps)) < 1e-8


def _shown_space(parameter: Choices | Interval) -> str:
    if isinstance(parameter, Choices):
        return f"one of {', '.join(map(repr, parameter.values))}"
    steps = f" in steps of {parameter.step}" if parameter.step else ""
    whole = isinstance(parameter.low, int) and isinstance(parameter.high, int)
    return f"a {'whole ' if whole else ''}number from {parameter.low} to {parameter.high}{steps}"


def _parameter(label: str, key: str, value: Any) -> Choices | Interval:
    where = f"{label}: space.{key}"
    if isinstance(value, dict) and "when" in value:
        when = checked_value(label, f"space.{key}.when", value["when"], dict)
        conditions = {name: tuple(one) if isinstance(one, list) else (one,) for name, one in when.items()}
        rest = {name: one for name, one in value.items() if name != "when"}
        if "values" in rest:
            check_keys(label, f"space.{key}", rest, ("values", "when"))
        return replace(_parameter(label, key, rest.get("values", rest)), when=conditions)
    if isinstance(value, list):
        if not value or not all(isinstance(item, (bool, int, float, str)) for item in value):
            raise StudyError(f"{where}: expected a list of numbers, words or true/false, found {value!r}.")
        if len({(isinstance(choice, bool), choice) for choice in value}) != len(
            value
        ):  # 0, 0.0 and -0.0 are one number
            raise StudyError(f"{where}: a value stands twice in {value!r}: each would be trained twice. Keep one.")
        return Choices(values=tuple(value))
    if not isinstance(value, dict):
        raise StudyError(f"{where}: expected a list of values or {{low = ..., high = ...}}, found {value!r}.")
    check_keys(label, f"space.{key}", value, ("low", "high", "log", "step", "when"))
    bounds = [value.get("low"), value.get("high")]
    if not all(map(is_number, bounds)):
        raise StudyError(f"{where}: expected numbers for low and high, found {value!r}.")
    interval = Interval(**value)
    whole = all(isinstance(bound, int) for bound in bounds)
    if not interval.low < interval.high:
        raise StudyError(f"{where}: expected low < high, found {interval.low} and {interval.high}.")
    if not isinstance(interval.log, bool):
        raise StudyError(f"{where}: log: expected true or false, found {interval.log!r}.")
    if interval.log and (interval.low <= 0 or interval.step is not None):
        raise StudyError(f"{where}: log = true needs low > 0 and no step, found {value!r}.")
    if interval.step is not None and not (is_number(interval.step, whole=whole) and interval.step > 0):
        kind = "whole " if whole else ""
        raise StudyError(f"{where}: step: expected a positive {kind}number, found {interval.step!r}.")
    return interval


def _check_conditions(label: str, space: Mapping[str, Choices | Interval], sampler: str) -> None:
    """Raise StudyError if a condition is none that the parameters before it can meet."""
    before: dict[str, tuple[Any, ...]] = {}  # values of those with a list
    for key, parameter in space.items():
        where = f"{label}: space.{key}.when"
        if parameter.when is not None and (sampler == "grid" or not parameter.when):
            raise StudyError(
                f"{where}: expected a condition, in a study whose sampler chooses, found {dict(parameter.when)} and "
                f"sampler.name = '{sampler}'. A grid trains all combinations."
            )
        for name, values in (parameter.when or {}).items():
            if name not in before:
                raise StudyError(
                    f"{where}: expected a parameter with a list of values that stands before {key} in [space] "
                    f"({', '.join(before) or 'there is none'}), found '{name}'.{near_miss(name, before)}"
                )
            for value in values or ("nothing",):
                if not within(Choices(values=before[name]), value):
                    options = ", ".join(map(repr, before[name]))
                    near = near_miss(str(value), [str(option) for option in before[name]])
                    raise StudyError(f"{where}.{name}: expected one of {options}, found {_text(value)}.{near}")
        if isinstance(parameter, Choices):
            before[key] = parameter.values


def subtable(label: str, table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return dict(checked_value(label, key, table.get(key, {}), dict))


def checked_value(label: str, key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise StudyError(f"{label}: {key}: expected {TYPES[kind]}, found {_text(value)}.")
    return value


def _text(value: Any) -> str:
    return "nothing" if value is None else repr(value)
