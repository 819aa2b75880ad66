"""A study file, its overrides, its identity, and the points it plans.

Nothing here touches a database, a server or torch.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hpo.errors import StudyConflict, StudyError
from hpo.study.records import SourceTrial, StudyFacts, TrialSpec
from models import sizes, specs

NUMERICS_VERSION = 1  # raised when a change of ours moves the numbers of an unchanged study
RESERVED = re.compile(r"champion|latest|v?[0-9]+", re.IGNORECASE)  # a study's name is an alias of its model, too
SAMPLERS = ("grid", "random", "tpe")
BARE = "-not-pretrained"  # behind a study's name
BEST = "best"  # in the place of a sampler: the best points of an earlier study
DEFAULT_DATA = "default"
LONGEST_NAME = 200  # characters; names of files and aliases, which have more behind it, may have 255

# By pruner, its settings and their defaults: all whole numbers of at least 1.
PRUNERS: dict[str, dict[str, int]] = {
    "none": {},
    "median": {"startup_trials": 5, "warmup_epochs": 10},
    "successive-halving": {"min_epochs": 10, "reduction_factor": 3},
    "hyperband": {"min_epochs": 10, "reduction_factor": 3},
}

KEYS: dict[str, tuple[str, ...]] = {
    "": (
        *("description", "seed", "repeats", "starts_from", "best_of", "points", "report_by"),
        *("data", "model", "sampler", "pruner", "space", "start", "training"),
    ),
    "data": ("path", "image_size"),
    "sampler": ("name", "trials", "multivariate"),
    "pruner": ("name", *dict.fromkeys(key for settings in PRUNERS.values() for key in settings)),
}
TABLES = ("data", "model", "sampler", "pruner", "space", "training")
SEQUENCE_KEYS = ("description", "sequence")
BEST_KEYS = ("description", "seed", "repeats", "best_of", "points", "training")  # the others are the earlier study's


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

    @property
    def top(self) -> float:
        """The highest value in reach: the steps need not come out even."""
        if self.step is None:
            return self.high
        if all(isinstance(each, int) for each in (self.low, self.high, self.step)):
            return self.high - (self.high - self.low) % self.step
        steps = (self.high - self.low) / self.step
        return self.high if abs(steps - round(steps)) < 1e-8 else self.low + math.floor(steps) * self.step


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
    multivariate: bool  # whether TPE looks at the parameters together
    start: tuple[dict[str, Any], ...]  # the first of the points, where the file gives them
    space: dict[str, Choices | Interval]
    training: dict[str, Any]
    pruner: dict[str, Any]  # its name, and all its settings
    repeats: int  # how often each point is trained, each time with another seed
    starts_from: "Study | None"  # whose best networks the trials begin with
    best_of: "Study | None" = None  # whose best points are trained again

    def canonical(
        self,
        *,
        data_digest: str,
        split_digest: str,
        weights: Mapping[str, str] | None = None,
        phases: Mapping[str, Mapping[str, float]] | None = None,
    ) -> dict[str, Any]:
        """Everything that determines a result, as plain data: the identity of the study.

        `weights` has the SHA-256 of each backbone's pretrained weights, `phases` the constants of the data's. What is
        not used is not named: a study that does without a setting keeps the identity it had before there was one.
        """
        used: dict[str, Any] = {}
        if self.starts_from is not None:
            first = self.starts_from.canonical(data_digest=data_digest, split_digest=split_digest, weights=weights)
            used["starts_from"] = {"study": _with_digits(self.starts_from, digest(first)), "spec": first}
        elif self.pretrained():
            used["weights"] = {backbone: (weights or {})[backbone] for backbone in self.pretrained()}
        if self.best_of is not None:
            first = self.best_of.canonical(
                data_digest=data_digest, split_digest=split_digest, weights=weights, phases=phases
            )
            used["best_of"] = {"study": _with_digits(self.best_of, digest(first)), "spec": first}
        if self.needs_phases():
            used["phases"] = phases
        if self.pruner["name"] != "none":
            used["pruner"] = self.pruner
        if self.repeats > 1:
            used["repeats"] = self.repeats
        if self.start:
            used["start"] = list(self.start)
        multivariate = {"multivariate": True} if self.multivariate else {}
        return used | {
            "data": {"digest": data_digest, "image_size": self.image_size},
            "split": split_digest,
            "seed": self.seed,
            "model": self.model,
            "sampler": {"name": self.sampler, "trials": self.trials, **multivariate},
            "space": [[name, _plain(parameter)] for name, parameter in self.space.items()],
            "training": self.training,
            "report_by": list(self.report_by),
            "numerics": NUMERICS_VERSION,
        }

    @property
    def follows(self) -> "Study | None":
        """The study that has to be finished before this one."""
        return self.starts_from or self.best_of

    @property
    def threads(self) -> int:
        """How many cores each of its trainers uses: the most that one of its trials asks for."""
        return int(self.most("threads"))

    def most(self, key: str) -> float:
        """The largest value that a number among the training's settings takes."""
        settings = (specs.training_from_dict(training) for _, training in map(self.trial, self.corners()))
        return max(float(getattr(each, key)) for each in settings)

    def pretrained(self) -> list[str]:
        """The backbones whose pretrained weights this study, or the one it starts from, begins with."""
        if self.starts_from is not None:
            return self.starts_from.pretrained()
        if "imagenet" not in self._values("weights"):
            return []
        return [str(backbone) for backbone in self._values("backbone")]

    @property
    def at_random(self) -> str:
        """That there are backbones that are not pretrained, in words; empty if there are none."""
        if self.all_at_random:
            return "Not pretrained: the backbones' weights are at random"
        return "Not all backbones are pretrained" if "none" in self._values("weights") else ""

    @property
    def all_at_random(self) -> bool:
        """Whether none of its backbones is pretrained."""
        return set(self._values("weights")) == {"none"}

    def _values(self, key: str) -> tuple[Any, ...]:
        """The values a key of [model] takes."""
        parameter = self.space.get(key)
        if isinstance(parameter, Choices):
            return parameter.values
        return (self.model[key],) if key in self.model else ()

    def grid(self) -> list[dict[str, Any]]:
        """The grid's points in the order of their config numbers: first key slowest, last key fastest."""
        axes = [parameter.values for parameter in self.space.values() if isinstance(parameter, Choices)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*axes)]

    def corners(self) -> list[dict[str, Any]]:
        """The points of a grid, else those at the ends of the space."""
        return self.grid() if self.sampler == "grid" else _corners(self.space)

    def largest(self) -> list[dict[str, Any]]:
        """The points of a grid, else those of the highest numbers with each stride, of which an image's sides must be
        multiples: if these networks fit an image, all others do."""
        if self.sampler == "grid":
            return self.grid()
        highest, stride = _highest(self.space), self.space.get("stride")
        if isinstance(stride, Interval):
            return [
                highest | {"stride": each}
                for each in range(int(stride.low), int(stride.high) + 1, int(stride.step or 1))
            ]
        return [highest | {"stride": each} for each in stride.values] if stride else [highest]

    def combinations(self, *keys: str) -> list[dict[str, Any]]:
        """The points of a grid, else those at the lowest ends of the space with each combination of names, and of the
        lowest numbers, that these parameters can have."""
        if self.sampler == "grid":
            return self.grid()
        ends = {key: p.values if isinstance(p, Choices) else (p.low,) for key, p in self.space.items()}
        axes = [values if key in keys else values[:1] for key, values in ends.items()]
        return [dict(zip(ends, values, strict=True)) for values in itertools.product(*axes)]

    def trial(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's and the training's settings at one point, complete and validated."""
        in_training = specs.training_keys()
        model = self.model | {key: value for key, value in point.items() if key not in in_training}
        training = self.training | {key: value for key, value in point.items() if key in in_training}
        chosen = specs.from_dict(model), specs.training_from_dict(training)
        specs.check_together(*chosen)
        return specs.to_dict(chosen[0]), specs.training_to_dict(chosen[1])

    def needs_phases(self) -> bool:
        """Whether it can be run only where the constants of two phases are known."""
        return any(specs.physical(specs.from_dict(self.trial(point)[0])) for point in self.corners())

    def needs_symmetries(self) -> bool:
        """Whether it can be run only where it is known how the targets move with the image."""
        return any(
            specs.needs_symmetries(specs.from_dict(model), specs.training_from_dict(training))
            for model, training in map(self.trial, self.corners())
        )


def trial_spec(
    plan: Study,
    identity: str,
    facts: StudyFacts,
    point: dict[str, Any],
    *,
    config: int | None,
    repeat: int = 0,
) -> tuple[TrialSpec, float]:
    """The frozen description of one trial, and its cost (multiply-adds of one image, forward).

    Repeats count the seed up.
    """
    model, training = plan.trial(point)
    network = specs.from_dict(model)
    best = next((source for source in facts.best_of or () if source.point == point), None)
    starts = plan.starts_from is not None
    pretrained = not starts and model.get("weights") == "imagenet"
    size = sizes.size(network, facts.data.image_shape, len(facts.data.target_names))
    spec = TrialSpec(
        point=point,
        config=config,
        model=model,
        training=training,
        seed=(plan.seed + repeat) % 2**32,
        parameters=size.parameters,
        trainable_parameters=size.trainable,
        starts_from=(facts.starts_from or {}).get(origin(model)) if starts else None,
        weights=(facts.weights or {})[model["backbone"]] if pretrained else None,
        phases=facts.data.phases if specs.physical(network) else None,
        best_of=best and SourceTrial(study=best.study, trial=best.trial, run_id=best.run_id),
        data=facts.data.digest,
        split=facts.data.split,
        identity=identity,
        numerics=NUMERICS_VERSION,
    )
    return spec, size.multiply_adds


def origin(model: Mapping[str, Any]) -> str:
    """What a trial and the one it starts from have in common."""
    return f"{model['backbone']} {model['weights']}"


def provenance(model: Mapping[str, Any]) -> str:
    """Where the weights of a model come from, as every table and description says; empty where nothing else is
    possible."""
    return {"imagenet": "ImageNet", "none": "not pretrained"}.get(model.get("weights", ""), "")


def restore(name: str, canonical: Mapping[str, Any]) -> Study:
    """The study that a canonical spec, as the database keeps it, stands for."""
    space: dict[str, Choices | Interval] = {
        key: Choices(values=tuple(value)) if isinstance(value, list) else Interval(**value)
        for key, value in canonical["space"]
    }
    return Study(
        name=file_name(name),
        overridden="+" in name,
        description="",
        seed=canonical["seed"],
        report_by=tuple(canonical["report_by"]),
        data_path="",
        image_size=canonical["data"]["image_size"],
        model=canonical["model"],
        sampler=canonical["sampler"]["name"],
        trials=canonical["sampler"]["trials"],
        multivariate=canonical["sampler"].get("multivariate", False),
        start=tuple(canonical.get("start", ())),
        space=space,
        training=canonical["training"],
        pruner=canonical.get("pruner", {"name": "none"}),
        repeats=canonical.get("repeats", 1),
        starts_from=_first(canonical, "starts_from"),
        best_of=_first(canonical, "best_of"),
    )


def _first(canonical: Mapping[str, Any], key: str) -> Study | None:
    """The study that this one follows."""
    found = canonical.get(key)
    return restore(found["study"], found["spec"]) if found else None


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
    """The file's name; `-not-pretrained` if no backbone is; `+` and eight hex digits of the spec with any override or
    other data."""
    plain = _with_digits(study, identity)
    return study.name + BARE + plain.removeprefix(study.name) if study.all_at_random else plain


def _with_digits(study: Study, identity: str) -> str:
    return f"{study.name}+{identity[:8]}" if study.overridden else study.name


def alias(name: str) -> str:
    """A study's name as MLflow allows it for an alias, and so a name that no two studies of a database may share."""
    return name.replace(".", "-")


def file_name(name: str) -> str:
    """The file's name, of what `full_name` gives."""
    return name.partition("+")[0].removesuffix(BARE)


def shipped() -> list[str]:
    """Names of the studies that come with the product."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load(name: str, overrides: Sequence[str] = ()) -> Study:
    """A shipped study by name, or a user's by path, with `[STUDY:]KEY=VALUE` overrides. Raises StudyError.

    The study it starts from is loaded with the same overrides, as far as they fit it.
    """
    found = load_all(name, overrides)
    if len(found) != 1:
        raise StudyError(f"{name} is a sequence of studies: name one of {', '.join(study.name for study in found)}.")
    return found[0]


def load_all(name: str, overrides: Sequence[str] = (), *, prerequisites: bool = False) -> list[Study]:
    """The studies of a sequence in their order, or the one study; with `prerequisites` preceded by those they follow.

    An override without a study's name goes to every study of a sequence that has such a key: not `model.weights` to one
    without a backbone, nor `training.learning_rate` to one that searches it. Raises StudyError if none has it.
    """
    _, label, table, folder = _file(name)
    used: set[str] = set()
    if "sequence" in table:
        _check_keys(label, "", table, SEQUENCE_KEYS)
        names = _value(label, "sequence", table["sequence"], list)
        if not names or not all(isinstance(each, str) for each in names):
            raise StudyError(f"{label}: sequence: expected names of studies, found {names!r}.")
        found = [_load(_beside(folder, each), overrides, used, strict=False) for each in names]
    else:
        found = [_load(name, overrides, used, strict=True)]
    for override in overrides:
        if override not in used:
            raise StudyError(f"--set {override}: none of {', '.join(study.name for study in found)} has this key.")
    if prerequisites:
        names = [study.name for study in found]
        found = [
            each
            for study in found
            for each in (study.follows, study)
            if each is not None and (each is study or each.name not in names)
        ]
    return found


def _load(name: str, overrides: Sequence[str], used: set[str], *, strict: bool, first: bool = True) -> Study:
    """One study with those overrides that fit it, which are added to `used`; with `strict` all but other studies'."""
    name, label, table, folder = _file(name)
    if "sequence" in table:
        raise StudyError(f"{label}: a sequence cannot stand where one study is expected.")
    original = json.dumps(table, sort_keys=True, default=str)
    seeded = False
    for override in overrides:
        scope, colon, text = override.partition(":")
        if not colon or "=" in scope:
            scope, text = "", override
        key = text.partition("=")[0].strip()
        if scope == name or (not scope and ((strict and "best_of" not in table) or _fits(table, key))):
            _override(table, text)
            used.add(override)
            seeded = seeded or key == "seed"
    if "best_of" in table:
        _check_keys(label, "", table, BEST_KEYS)
    earlier = None
    for key in ("starts_from", "best_of"):
        if key in table:
            if not first:
                raise StudyError(f"{label}: {key}: another study follows '{name}', so it cannot follow one itself.")
            before = _beside(folder, _value(label, key, table[key], str))
            earlier = _load(before, overrides, used, strict=False, first=False)
    overridden = json.dumps(table, sort_keys=True, default=str) != original
    if "best_of" in table and earlier is not None:
        table = _completed_by(label, table, earlier, _file(before)[2].get("seed", 0), seeded=seeded)
    return _parse(name, label, table, earlier, overridden=overridden or (earlier is not None and earlier.overridden))


def _completed_by(label: str, table: dict[str, Any], earlier: Study, stated: Any, *, seeded: bool) -> dict[str, Any]:
    """The table of a study that trains another's best points: what they are points of is the other's.

    Its seeds are counted from the other's: as far from it as the files say (`stated`: the other's), or the next ones,
    unless an override of its own (`seeded`) sets them. Raises StudyError if one is the other's.
    """
    seed = table.get("seed")
    if seed is None:
        seed = earlier.seed + earlier.repeats
    elif type(seed) is int and not seeded:
        seed = (seed + earlier.seed - stated) % 2**32
    data: dict[str, Any] = {"path": earlier.data_path}
    return {
        **table,
        "seed": seed,
        "data": data if earlier.image_size is None else data | {"image_size": earlier.image_size},
        "model": earlier.model,
        "space": {key: _plain(parameter) for key, parameter in earlier.space.items()},
        "training": {**earlier.training, **_table(label, table, "training")},
    }


def _fits(table: Mapping[str, Any], key: str) -> bool:
    """Whether an override of this key makes sense for a study that it was not meant for alone."""
    where, _, inner = key.partition(".")
    table = {name: each for name, each in table.items() if name not in TABLES or isinstance(each, dict)}
    space, pruner = table.get("space", {}), str(table.get("pruner", {}).get("name", "none"))
    if "best_of" in table:  # the others, and the seed it is counted from, are the earlier study's
        own = inner in table.get("training", {}) if where == "training" else where in BEST_KEYS
        return own and key != "seed"
    if key in ("starts_from", "best_of", "points", "report_by", "start"):
        return key in table
    if key == "repeats":
        return pruner == "none"
    if where == "pruner":
        return inner in ("name", *PRUNERS.get(pruner, ())) and table.get("repeats", 1) == 1
    if where == "sampler":
        return inner == "name" or inner in table.get("sampler", {})
    if where == "space":
        return inner.partition(".")[0] in space
    if where == "model":
        family = table.get("model", {}).get("family")
        known = isinstance(family, str) and family in specs.FAMILIES
        return inner not in space and known and inner in ("family", *specs.model_keys(family))
    return where != "training" or inner not in space


def _beside(folder: Path | None, name: str) -> str:
    """A study's name in a file of `folder`: paths count from there."""
    return str(folder / Path(name).expanduser()) if folder and (name.endswith(".toml") or "/" in name) else name


def _file(name: str) -> tuple[str, str, dict[str, Any], Path | None]:
    """A study's name, what messages call it, its table, and its folder unless it is shipped."""
    path = Path(name)
    folder = None
    if name in shipped():
        label, text = f"study {name}", (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    elif name.endswith(".toml") or "/" in name:
        label, text, folder = name, _read(path), path.parent
        name = path.name.removesuffix(".toml")
        if not name or any(character not in _NAME for character in name):
            raise StudyError(f"{label}: expected a file name of letters, digits, '.', '_' and '-', found '{name}'.")
        if len(name) > LONGEST_NAME:
            raise StudyError(f"{label}: expected a name of at most {LONGEST_NAME} characters, found {len(name)}.")
        if name in shipped():
            raise StudyError(f"{label}: '{name}' is the name of a shipped study: give the file another name.")
        if name.endswith(BARE):
            raise StudyError(f"{label}: '{BARE}' is put behind a study's name by hpo: give the file another name.")
        if RESERVED.fullmatch(name):
            raise StudyError(
                f"{label}: '{name}' means something else to the model registry: give the file another name."
            )
    else:
        raise StudyError(
            f"No study is called '{name}'.{_hint(name, shipped())} There are: {', '.join(shipped())}; or give the path "
            "of a .toml file."
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{label}: not valid TOML: {error}.") from None
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), str) and data["path"] != DEFAULT_DATA:
        data["path"] = str((path.parent / Path(data["path"]).expanduser()).absolute())  # relative to the study file
    return name, label, table, folder


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
    if key == "pruner.name":  # the settings of another one do not fit it
        for setting in set(table) - {"name", *PRUNERS.get(str(parsed), table)}:
            del table[setting]
    table[last] = parsed


def _parse(name: str, label: str, table: dict[str, Any], earlier: Study | None, *, overridden: bool) -> Study:
    _check_keys(label, "", table, KEYS[""])
    data, sampler = _table(label, table, "data"), _table(label, table, "sampler")
    _check_keys(label, "data", data, KEYS["data"])
    _check_keys(label, "sampler", sampler, KEYS["sampler"])
    model, training = _table(label, table, "model"), _table(label, table, "training")
    space = {key: _parameter(label, key, value) for key, value in _table(label, table, "space").items()}
    _check_space(label, model, training, space)

    again = "best_of" in table
    kind = BEST if again else _one_of(label, "sampler.name", sampler.get("name", "grid"), SAMPLERS)
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
        trials=_count(label, "points", table.get("points")) if again else _planned(label, kind, sampler, space),
        multivariate=_multivariate(label, kind, sampler),
        start=_start(label, kind, table, space),
        space=space,
        training=training,
        pruner=_pruner(label, _table(label, table, "pruner")),
        repeats=_value(label, "repeats", table.get("repeats", 1), int),
        starts_from=None if again else earlier,
        best_of=earlier if again else None,
    )
    if again and earlier is not None:
        seeds = range(study.seed, study.seed + study.repeats)
        if taken := [each for each in range(earlier.seed, earlier.seed + earlier.repeats) if each in seeds]:
            raise StudyError(
                f"{label}: seed: best points are trained with other seeds than in {earlier.name}: expected others than "
                f"{taken[0]}, found {study.seed}{f' to {seeds[-1]}' if study.repeats > 1 else ''}."
            )
    if "points" in table and not again:
        raise StudyError(f"{label}: points: they are those of the study that best_of names, and there is none.")
    if not 1 <= study.repeats <= 1000:
        raise StudyError(f"{label}: repeats: expected 1 to 1000, found {study.repeats}.")
    if study.repeats > 1 and study.pruner["name"] != "none":
        raise StudyError(f"{label}: repeats and a pruner do not go together: every repeat of a point counts.")
    if not 0 <= study.seed < 2**32:
        raise StudyError(f"{label}: seed: expected a whole number of 0 to 2^32 - 1, found {study.seed}.")
    if len(study.start) > study.trials:
        raise StudyError(f"{label}: start: expected at most sampler.trials = {study.trials} points, found more.")
    for key in study.report_by:
        if not isinstance(key, str) or key not in space:
            raise StudyError(f"{label}: report_by: expected parameters of [space] ({', '.join(space)}), found {key!r}.")
    try:  # every extreme of the space must be a network and a training that exist
        for point in (*study.corners(), *_seconds(study.space), *study.start):
            study.trial(point)
        completed = _completed(study)
    except specs.SpecError as error:
        raise StudyError(f"{label}: {error}") from None
    if study.starts_from is not None:
        _check_start(label, completed, study.starts_from)
    return completed


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
        if missing := set(study._values(key)) - set(earlier._values(key)):
            raise StudyError(f"{label}: starts_from: {earlier.name} has no {key} {', '.join(sorted(missing))}.")


def _completed(study: Study) -> Study:
    """The same study with every default written out, so that leaving a key away or giving its default is the same."""
    model, training = study.trial(study.corners()[0])
    fixed_model = {key: value for key, value in model.items() if key not in study.space}
    fixed_training = {key: value for key, value in training.items() if key not in study.space}
    return Study(**{**study.__dict__, "model": fixed_model, "training": fixed_training})


def _pruner(label: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The pruner's name with all its settings."""
    _check_keys(label, "pruner", table, KEYS["pruner"])
    name = _one_of(label, "pruner.name", table.get("name", "none"), tuple(PRUNERS))
    settings = {key: value for key, value in table.items() if key != "name"}
    _check_keys(label, "pruner", settings, tuple(PRUNERS[name]))
    for key, value in settings.items():
        if _value(label, f"pruner.{key}", value, int) < (2 if key == "reduction_factor" else 1):
            raise StudyError(f"{label}: pruner.{key}: expected a larger whole number, found {value}.")
        if value > 10**7:
            raise StudyError(f"{label}: pruner.{key}: expected at most {10**7}, found {value}.")
    return {"name": name, **PRUNERS[name], **settings}


def _check_keys(label: str, where: str, table: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in table:
        if key not in valid:
            full = f"{where}.{key}" if where else key
            raise StudyError(
                f"{label}: unknown key '{full}'.{_hint(key, valid)} Valid keys here: {', '.join(valid) or 'none'}."
            )


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
        return _count(label, "sampler.trials", table.get("trials"))
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


def _count(label: str, key: str, value: Any) -> int:
    """How many trials to plan."""
    trials = _value(label, key, value, int)
    if not 1 <= trials <= 100_000:
        raise StudyError(f"{label}: {key}: expected 1 to 100000, found {trials}.")
    return int(trials)


def _multivariate(label: str, sampler: str, table: Mapping[str, Any]) -> bool:
    found = table.get("multivariate", False)
    if not isinstance(found, bool):
        raise StudyError(f"{label}: sampler.multivariate: expected true or false, found {found!r}.")
    if found and sampler != "tpe":
        raise StudyError(f"{label}: sampler.multivariate: only \"tpe\" has it, found sampler.name = '{sampler}'.")
    return found


def _start(
    label: str, sampler: str, table: Mapping[str, Any], space: Mapping[str, Choices | Interval]
) -> tuple[dict[str, Any], ...]:
    """The points to begin with, each with all parameters of the space, in its order."""
    points = _value(label, "start", table.get("start", []), list)
    if points and sampler == "grid":
        raise StudyError(f"{label}: start: a grid trains all its points: remove the key.")
    for number, point in enumerate(points):
        where = f"start[{number}]"
        _check_keys(label, where, _value(label, where, point, dict), tuple(space))
        for key, parameter in space.items():
            if not _within(parameter, point.get(key)):
                found = "nothing" if key not in point else repr(point[key])
                raise StudyError(f"{label}: {where}.{key}: expected {_shown_space(parameter)}, found {found}.")
    return tuple({key: point[key] for key in space} for point in points)


def _within(parameter: Choices | Interval, value: Any) -> bool:
    if isinstance(parameter, Choices):
        return any(type(each) is type(value) and each == value for each in parameter.values)
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
    if isinstance(value, list):
        if not value or not all(isinstance(item, (bool, int, float, str)) for item in value):
            raise StudyError(f"{where}: expected a list of numbers, words or true/false, found {value!r}.")
        if len({(isinstance(each, bool), each) for each in value}) != len(value):  # 0, 0.0 and -0.0 are one number
            raise StudyError(f"{where}: a value stands twice in {value!r}: each would be trained twice. Keep one.")
        return Choices(values=tuple(value))
    if not isinstance(value, dict):
        raise StudyError(f"{where}: expected a list of values or {{low = ..., high = ...}}, found {value!r}.")
    _check_keys(label, f"space.{key}", value, ("low", "high", "log", "step"))
    bounds = [value.get("low"), value.get("high")]
    if not all(map(_is_number, bounds)):
        raise StudyError(f"{where}: expected numbers for low and high, found {value!r}.")
    interval = Interval(**value)
    whole = all(isinstance(bound, int) for bound in bounds)
    if not interval.low < interval.high:
        raise StudyError(f"{where}: expected low < high, found {interval.low} and {interval.high}.")
    if not isinstance(interval.log, bool):
        raise StudyError(f"{where}: log: expected true or false, found {interval.log!r}.")
    if interval.log and (interval.low <= 0 or interval.step is not None):
        raise StudyError(f"{where}: log = true needs low > 0 and no step, found {value!r}.")
    if interval.step is not None and not (_is_number(interval.step, whole=whole) and interval.step > 0):
        kind = "whole " if whole else ""
        raise StudyError(f"{where}: step: expected a positive {kind}number, found {interval.step!r}.")
    return interval


def _is_number(value: Any, *, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _corners(space: Mapping[str, Choices | Interval]) -> list[dict[str, Any]]:
    """Points at the lowest and the highest end of every parameter, one parameter at a time."""
    ends = {key: p.values if isinstance(p, Choices) else (p.low, p.top) for key, p in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    return [first, *({**first, key: value} for key, values in ends.items() for value in values)]


def _seconds(space: Mapping[str, Choices | Interval]) -> list[dict[str, Any]]:
    """Points at the second whole number of a parameter, the others at their lowest end: not each is odd, say."""
    first = _corners(space)[0]
    return [
        {**first, key: p.low + (p.step or 1)}
        for key, p in space.items()
        if isinstance(p, Interval) and all(isinstance(bound, int) for bound in (p.low, p.high))
        if p.low + (p.step or 1) <= p.high
    ]


def _highest(space: Mapping[str, Choices | Interval]) -> dict[str, Any]:
    """The point at the highest number of every parameter; of names the first."""
    ends = {key: p.values if isinstance(p, Choices) else (p.top,) for key, p in space.items()}
    return {key: values[0] if isinstance(values[0], str) else max(values) for key, values in ends.items()}


def _plain(parameter: Choices | Interval) -> Any:
    return list(parameter.values) if isinstance(parameter, Choices) else dict(parameter.__dict__)


def _table(label: str, table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return _value(label, key, table.get(key, {}), dict)


def _one_of(label: str, key: str, value: Any, valid: Sequence[str]) -> str:
    found = str(_value(label, key, value, str))
    if found not in valid:
        near = _hint(found, valid)
        raise StudyError(f"{label}: {key}: expected one of {', '.join(valid)}, found '{found}'.{near}")
    return found


def _hint(word: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, valid, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _value(label: str, key: str, value: Any, kind: type) -> Any:
    names = {str: "text in quotes", int: "a whole number", list: "a list", dict: "a table"}
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "nothing" if value is None else repr(value)
        raise StudyError(f"{label}: {key}: expected {names[kind]}, found {found}.")
    return value
