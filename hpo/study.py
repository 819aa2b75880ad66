"""A study file, its overrides, its identity, and the points it plans.

Nothing here touches a database, a server or torch.
"""

import difflib
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hpo.errors import StudyConflict, StudyError
from models import specs

NUMERICS_VERSION = 1  # raised when a change of ours moves the numbers of an unchanged study
RESERVED = re.compile(r"champion|latest|v?[0-9]+", re.IGNORECASE)  # a study's name is an alias of its model, too
SAMPLERS = ("grid", "random", "tpe")
DEFAULT_DATA = "default"

KEYS: dict[str, tuple[str, ...]] = {
    "": ("description", "seed", "report_by", "data", "model", "sampler", "space", "training"),
    "data": ("path", "image_size"),
    "sampler": ("name", "trials"),
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A parameter with a finite list of values, in the order the file gives."""

    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A parameter between two bounds, both included; whole numbers when both bounds are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A validated study. `name` is the file's; `overridden` says that something in it was replaced."""

    name: str
    overridden: bool
    description: str
    seed: int
    report_by: tuple[str, ...]  # parameters; the best trial of each of their values is scored on the test split
    data_path: str  # a folder, or "default"
    image_size: int | None  # pixels, or None: as the images are
    model: dict[str, Any]
    sampler: str
    trials: int  # how many points are planned
    space: dict[str, Choices | Interval]
    training: dict[str, Any]

    def canonical(self, *, data_digest: str, split_digest: str) -> dict[str, Any]:
        """Everything that determines a result, as plain data: the identity of the study."""
        return {
            "data": {"digest": data_digest, "image_size": self.image_size},
            "split": split_digest,
            "seed": self.seed,
            "model": self.model,
            "sampler": {"name": self.sampler, "trials": self.trials},
            "space": [[name, _plain(parameter)] for name, parameter in self.space.items()],
            "training": self.training,
            "report_by": list(self.report_by),
            "numerics": NUMERICS_VERSION,
        }

    def grid(self) -> list[dict[str, Any]]:
        """The grid's points in the order of their config numbers: first key slowest, last key fastest."""
        axes = [parameter.values for parameter in self.space.values() if isinstance(parameter, Choices)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*axes)]

    def trial(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's and the training's settings at one point, complete and validated."""
        in_training = specs.training_keys()
        model = self.model | {key: value for key, value in point.items() if key not in in_training}
        training = self.training | {key: value for key, value in point.items() if key in in_training}
        return specs.to_dict(specs.from_dict(model)), specs.training_to_dict(specs.training_from_dict(training))


def trial_spec(
    plan: Study, identity: str, data: Mapping[str, Any], point: dict[str, Any], *, config: int | None
) -> tuple[dict[str, Any], float]:
    """The frozen description of one trial, and its cost (multiply-adds of one image, forward).

    `data`: what the study's facts say of the data set (digest, split, image_shape, target_names).
    """
    model, training = plan.trial(point)
    size = specs.size(specs.from_dict(model), tuple(data["image_shape"]), len(data["target_names"]))
    return {
        "point": point,
        "config": config,
        "model": model,
        "training": training,
        "seed": plan.seed,
        "parameters": size.parameters,
        "data": data["digest"],
        "split": data["split"],
        "identity": identity,
        "numerics": NUMERICS_VERSION,
    }, size.multiply_adds


def restore(name: str, canonical: Mapping[str, Any]) -> Study:
    """The study that a canonical spec, as the database keeps it, stands for."""
    space: dict[str, Choices | Interval] = {
        key: Choices(values=tuple(value)) if isinstance(value, list) else Interval(**value)
        for key, value in canonical["space"]
    }
    return Study(
        name=name.partition("+")[0],
        overridden="+" in name,
        description="",
        seed=canonical["seed"],
        report_by=tuple(canonical["report_by"]),
        data_path="",
        image_size=canonical["data"]["image_size"],
        model=canonical["model"],
        sampler=canonical["sampler"]["name"],
        trials=canonical["sampler"]["trials"],
        space=space,
        training=canonical["training"],
    )


def digest(canonical: Mapping[str, Any]) -> str:
    """SHA-256 of a canonical spec, 64 hex digits."""
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def conflict(name: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> StudyConflict:
    """The error that a name stands for another canonical spec already; it says where the two differ."""
    ours, theirs = _flat(recorded), _flat(found)
    differences = [
        f"{key}: expected {_shown(ours.get(key))} as recorded, found {_shown(theirs.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    return StudyConflict(
        f"Refusing to go on with the study '{name}', which is recorded with another specification. "
        f"{'; '.join(differences)}. Nothing was touched. Either give the changed study another name, or remove the "
        f"recorded one with `hpo delete --study {name}`."
    )


def _flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if key == "space":  # pairs, in order
            value = {name: parameter for name, parameter in value} | {"order": [name for name, _ in value]}
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text[:8] if len(text) == 64 and not set(text) - set("0123456789abcdef") else text  # a digest


def full_name(study: Study, identity: str) -> str:
    """The file's name; with any override or other data, `+` and eight hex digits of the spec behind it."""
    return f"{study.name}+{identity[:8]}" if study.overridden else study.name


def shipped() -> list[str]:
    """Names of the studies that come with the product."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load(name: str, overrides: Sequence[str] = ()) -> Study:
    """A shipped study by name, or a user's by path, with `KEY=VALUE` overrides. Raises StudyError."""
    path = Path(name)
    if name in shipped():
        label, text = f"study {name}", (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    elif name.endswith(".toml") or "/" in name:
        label, text = name, _read(path)
        name = path.name.removesuffix(".toml")
        if not name or any(character not in _NAME for character in name):
            raise StudyError(f"{label}: expected a file name of letters, digits, '.', '_' and '-', found '{name}'.")
        if name in shipped():
            raise StudyError(f"{label}: '{name}' is the name of a shipped study: give the file another name.")
        if RESERVED.fullmatch(name):
            raise StudyError(
                f"{label}: '{name}' means something else to the model registry: give the file another name."
            )
    else:
        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise StudyError(
            f"No study is called '{name}'.{hint} There are: {', '.join(shipped())}; or give the path of a .toml file."
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{label}: not valid TOML: {error}.") from None
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), str) and data["path"] != DEFAULT_DATA:
        data["path"] = str((path.parent / Path(data["path"]).expanduser()).absolute())  # relative to the study file
    original = json.dumps(table, sort_keys=True, default=str)
    for override in overrides:
        _override(table, override)
    return _parse(name, label, table, overridden=json.dumps(table, sort_keys=True, default=str) != original)


_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def _folder() -> Any:
    return resources.files("hpo") / "studies"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"{path}: there is no such study file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: expected a readable UTF-8 text file, found: {error}.") from None


def _override(table: dict[str, Any], text: str) -> None:
    """Replace one value; the value is TOML, or a bare word."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise StudyError(f"--set {text}: expected KEY=VALUE, for example training.epochs=10.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    *tables, last = key.split(".")
    for part in tables:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise StudyError(f"--set {text}: '{part}' is a value, not a table, in this study.")
        table = inner
    if last == "path" and tables == ["data"] and parsed != DEFAULT_DATA:
        parsed = str(Path(str(parsed)).expanduser().absolute())
    table[last] = parsed


def _parse(name: str, label: str, table: dict[str, Any], *, overridden: bool) -> Study:
    _check_keys(label, "", table, KEYS[""])
    data, sampler = _table(label, table, "data"), _table(label, table, "sampler")
    _check_keys(label, "data", data, KEYS["data"])
    _check_keys(label, "sampler", sampler, KEYS["sampler"])
    model, training = _table(label, table, "model"), _table(label, table, "training")
    space = {key: _parameter(label, key, value) for key, value in _table(label, table, "space").items()}
    _check_space(label, model, training, space)

    kind = _value(label, "sampler.name", sampler.get("name", "grid"), str)
    if kind not in SAMPLERS:
        near = difflib.get_close_matches(kind, SAMPLERS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise StudyError(f"{label}: sampler.name: expected one of {', '.join(SAMPLERS)}, found '{kind}'.{hint}")
    study = Study(
        name=name,
        overridden=overridden,
        description=_value(label, "description", table.get("description", ""), str),
        seed=_value(label, "seed", table.get("seed", 0), int),
        report_by=tuple(_value(label, "report_by", table.get("report_by", []), list)),
        data_path=_value(label, "data.path", data.get("path", DEFAULT_DATA), str),
        image_size=None if "image_size" not in data else _value(label, "data.image_size", data["image_size"], int),
        model=model,
        sampler=kind,
        trials=_planned(label, kind, sampler, space),
        space=space,
        training=training,
    )
    if not 0 <= study.seed < 2**32:
        raise StudyError(f"{label}: seed: expected a whole number of 0 to 2^32 - 1, found {study.seed}.")
    for key in study.report_by:
        if key not in space:
            raise StudyError(f"{label}: report_by: expected parameters of [space] ({', '.join(space)}), found '{key}'.")
    try:  # every extreme of the space must be a network and a training that exist
        for point in study.grid() if kind == "grid" else _corners(space):
            study.trial(point)
        return _completed(study)
    except specs.SpecError as error:
        raise StudyError(f"{label}: {error}") from None


def _completed(study: Study) -> Study:
    """The same study with every default written out, so that leaving a key away or giving its default is the same."""
    point = study.grid()[0] if study.sampler == "grid" else _corners(study.space)[0]
    model, training = study.trial(point)
    fixed_model = {key: value for key, value in model.items() if key not in study.space}
    fixed_training = {key: value for key, value in training.items() if key not in study.space}
    return Study(**{**study.__dict__, "model": fixed_model, "training": fixed_training})


def _check_keys(label: str, where: str, table: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in table:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            full = f"{where}.{key}" if where else key
            raise StudyError(f"{label}: unknown key '{full}'.{hint} Valid keys here: {', '.join(valid)}.")


def _check_space(label: str, model: dict[str, Any], training: dict[str, Any], space: Mapping[str, Any]) -> None:
    family = _value(label, "model.family", model.get("family"), str)
    try:
        model_keys = specs.model_keys(family)
    except specs.SpecError as error:
        raise StudyError(f"{label}: model.{error}") from None
    _check_keys(label, "model", model, ("family", *model_keys))
    _check_keys(label, "training", training, specs.training_keys())
    _check_keys(label, "space", space, (*model_keys, *specs.training_keys()))
    for key in space:
        if key in model or key in training:
            table = "model" if key in model else "training"
            raise StudyError(f"{label}: '{key}' stands in [space] and in [{table}]: keep one of them.")


def _planned(label: str, sampler: str, table: Mapping[str, Any], space: Mapping[str, Choices | Interval]) -> int:
    if sampler != "grid":
        trials = _value(label, "sampler.trials", table.get("trials"), int)
        if not 1 <= trials <= 100_000:
            raise StudyError(f"{label}: sampler.trials: expected 1 to 100000, found {trials}.")
        return trials
    if "trials" in table:
        raise StudyError(f"{label}: sampler.trials: a grid trains all its points: remove the key.")
    count = 1
    for key, parameter in space.items():
        if not isinstance(parameter, Choices):
            raise StudyError(f"{label}: space.{key}: a grid needs a list of values, found an interval.")
        count *= len(parameter.values)
    if count > 100_000:
        raise StudyError(f"{label}: the grid has {count} points; at most 100000 can be planned.")
    return count


def _parameter(label: str, key: str, value: Any) -> Choices | Interval:
    where = f"{label}: space.{key}"
    if isinstance(value, list):
        if not value or not all(isinstance(item, (bool, int, float, str)) for item in value):
            raise StudyError(f"{where}: expected a list of numbers, words or true/false, found {value!r}.")
        if len(set(map(repr, value))) != len(value):
            raise StudyError(f"{where}: a value stands twice in {value!r}.")
        return Choices(values=tuple(value))
    if not isinstance(value, dict):
        raise StudyError(f"{where}: expected a list of values or {{low = ..., high = ...}}, found {value!r}.")
    _check_keys(label, f"space.{key}", value, ("low", "high", "log", "step"))
    bounds = [value.get("low"), value.get("high")]
    if not all(isinstance(bound, (int, float)) and not isinstance(bound, bool) for bound in bounds):
        raise StudyError(f"{where}: expected numbers for low and high, found {value!r}.")
    interval = Interval(**value)
    if not interval.low < interval.high:
        raise StudyError(f"{where}: expected low < high, found {interval.low} and {interval.high}.")
    if interval.log and (interval.low <= 0 or interval.step is not None):
        raise StudyError(f"{where}: log = true needs low > 0 and no step, found {value!r}.")
    if interval.step is not None and not (isinstance(interval.step, (int, float)) and interval.step > 0):
        raise StudyError(f"{where}: step: expected a positive number, found {interval.step!r}.")
    return interval


def _corners(space: Mapping[str, Choices | Interval]) -> list[dict[str, Any]]:
    """Points at the lowest and the highest end of every parameter, one parameter at a time."""
    ends = {key: p.values if isinstance(p, Choices) else (p.low, p.high) for key, p in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    return [first, *({**first, key: value} for key, values in ends.items() for value in values)]


def _plain(parameter: Choices | Interval) -> Any:
    return list(parameter.values) if isinstance(parameter, Choices) else dict(parameter.__dict__)


def _table(label: str, table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return _value(label, key, table.get(key, {}), dict)


def _value(label: str, key: str, value: Any, kind: type) -> Any:
    names = {str: "text in quotes", int: "a whole number", list: "a list", dict: "a table"}
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "nothing" if value is None else repr(value)
        raise StudyError(f"{label}: {key}: expected {names[kind]}, found {found}.")
    return value
