"""Study files: where they are, what a command line replaces in them, and what follows from an earlier study."""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from hpo.errors import StudyError
from hpo.study import claims, code, weights_paths
from hpo.study.names import BARE, LONGEST_NAME, RESERVED
from hpo.study.parsing import (
    BEST_KEYS,
    BEST_SPACE,
    PRUNERS,
    SEQUENCE_KEYS,
    TABLES,
    check_keys,
    checked_value,
    parse,
    subtable,
)
from hpo.study.space import as_json
from hpo.study.specification import DEFAULT_DATA, Study
from hpo.text import near_miss
from models import specs


def shipped() -> list[str]:
    """Return the names of the studies that come with the product."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def is_file(name: str) -> bool:
    """Return whether a name is that of a shipped study, or has the form of a path."""
    return name in shipped() or name.endswith(".toml") or "/" in name


def load(name: str, overrides: Sequence[str] = ()) -> Study:
    """Return a shipped study by name, or a user's by path, with `[STUDY:]KEY=VALUE` overrides. Raise StudyError.

    The study it starts from is loaded with the same overrides, as far as they fit it.
    """
    studies = load_all(name, overrides)
    if len(studies) != 1:
        raise StudyError(f"{name} is a sequence of studies: name one of {', '.join(study.name for study in studies)}.")
    return studies[0]


def load_all(name: str, overrides: Sequence[str] = (), *, prerequisites: bool = False) -> list[Study]:
    """Return the studies of a sequence in order, or the one study; with `prerequisites` after those that they follow.

    An override without a study's name goes to every study of a sequence that has such a key: not `model.weights` to one
    without a backbone, nor `training.learning_rate` to one that searches it. Raises StudyError if none has it.
    """
    _, label, table, folder = _file(name)
    used: set[str] = set()
    if "sequence" in table:
        check_keys(label, "", table, SEQUENCE_KEYS)
        names = checked_value(label, "sequence", table["sequence"], list)
        if not names or not all(isinstance(part, str) for part in names):
            raise StudyError(f"{label}: sequence: expected names of studies, found {names!r}.")
        asked = claims.parse(label, table.get("claims", []))
        studies = [_load(_beside(folder, part), overrides, used, strict=False) for part in names]
        studies = [replace(study, claims=(*asked, *study.claims)) for study in studies]
    else:
        studies = [_load(name, overrides, used, strict=True)]
    for override in overrides:
        if override not in used:
            raise StudyError(f"--set {override}: none of {', '.join(study.name for study in studies)} has this key.")
    if not prerequisites:
        return studies
    names = [study.name for study in studies]
    earlier = {study.name: [study.follows] for study in studies if study.follows and study.follows.name not in names}
    return [part for study in studies for part in (*earlier.get(study.name, ()), study)]


def _load(name: str, overrides: Sequence[str], used: set[str], *, strict: bool, first: bool = True) -> Study:
    """Return one study with the overrides that fit it, or with `strict` all but those of other studies.

    Add them to `used`.
    """
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
        check_keys(label, "", table, BEST_KEYS)
        check_keys(label, "space", subtable(label, table, "space"), BEST_SPACE)
    earlier = None
    for key in ("starts_from", "best_of"):
        if key in table:
            if not first:
                raise StudyError(f"{label}: {key}: another study follows '{name}', so it cannot follow one itself.")
            before = _beside(folder, checked_value(label, key, table[key], str))
            earlier = _load(before, overrides, used, strict=False, first=False)
    overridden = json.dumps(table, sort_keys=True, default=str) != original
    sources = code.take(label, table, folder or Path()) | ({} if earlier is None else earlier.sources)
    if "best_of" in table and earlier is not None:
        table = _completed_by(label, table, earlier, _file(before)[2].get("seed", 0), seeded=seeded)
        files = earlier.weights_files
    else:
        files = weights_paths.take(label, table, {} if earlier is None else earlier.weights_files)
    study = parse(name, label, table, earlier, overridden=overridden or (earlier is not None and earlier.overridden))
    path = name if folder is None else os.path.abspath(label)
    return replace(study, file=path, weights_files=files, sources=sources)


def _completed_by(label: str, table: dict[str, Any], earlier: Study, stated: Any, *, seeded: bool) -> dict[str, Any]:
    """Return the table of a study that trains another's best configurations: data, model and space are the other's.

    Its seeds are counted from the other's: as far from it as the files say (`stated`: the other's), or the next ones,
    unless an override of its own (`seeded`) sets them. Raises StudyError if one is the other's.
    """
    seed = table.get("seed")
    if seed is None:
        seed = earlier.seed + earlier.repeats
    elif type(seed) is int and not seeded:
        seed = (seed + earlier.seed - stated) % 2**32
    data = {"path": earlier.data_path, "image_size": earlier.image_size, "folds": earlier.folds}
    return {
        **table,
        "seed": seed,
        "data": {key: value for key, value in data.items() if value is not None},
        "model": earlier.model,
        "space": {key: as_json(parameter) for key, parameter in earlier.space.items()}
        | subtable(label, table, "space"),
        "training": {**earlier.training, **subtable(label, table, "training")},
    }


def _fits(table: Mapping[str, Any], key: str) -> bool:
    """Return whether an override of this key makes sense for a study that it was not meant for alone."""
    where, _, inner = key.partition(".")
    table = {name: value for name, value in table.items() if name not in TABLES or isinstance(value, dict)}
    space, pruner = table.get("space", {}), str(table.get("pruner", {}).get("name", "none"))
    if "best_of" in table:  # the others, and the seed it is counted from, are the earlier study's
        tables, inner = ("training", "space"), inner.partition(".")[0]
        own = inner in table.get(where, {}) if where in tables else where in BEST_KEYS
        return own and key != "seed"
    if key in ("starts_from", "best_of", "points", "report_by", "start", "learn_from", "objectives"):
        return key in table
    if where == "bounds":
        return bool(space)
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
        is_family = isinstance(family, str) and family in specs.FAMILIES
        keys = ("family", *specs.model_keys(family)) if is_family else ()
        return inner not in space and (inner in keys or family == specs.PYTHON)
    return where != "training" or inner not in space


def _beside(folder: Path | None, name: str) -> str:
    """Return a study's name in a file of `folder`: paths count from there."""
    return str(folder / Path(name).expanduser()) if folder and (name.endswith(".toml") or "/" in name) else name


def _file(name: str) -> tuple[str, str, dict[str, Any], Path | None]:
    """Return a study's name, what messages call it, its table, and its folder unless it is shipped."""
    path = Path(name)
    folder = None
    if name in shipped():
        label, text = f"study {name}", (_folder() / f"{name}.toml").read_text(encoding="utf-8")
    elif is_file(name):
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
            f"No study is called '{name}'.{near_miss(name, shipped())} There are: {', '.join(shipped())}; "
            "or give the path of a .toml file."
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{label}: not valid TOML: {error}.") from None
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), str) and data["path"] != DEFAULT_DATA:
        data["path"] = str((path.parent / Path(data["path"]).expanduser()).absolute())  # relative to the study file
    training = table.get("training")
    if isinstance(training, dict) and isinstance(training.get("start_from"), str):
        training["start_from"] = _model(training["start_from"], path.parent)
    for part in (table.get("model"), table.get("space")):
        if isinstance(part, dict) and "weights" in part:
            part["weights"] = weights_paths.absolute(part["weights"], path.parent)
    return name, label, table, folder


def _model(name: str, folder: Path) -> str:
    """Return the name of a model to start from, absolute if it is that of a folder, which counts from `folder`."""
    path = folder / Path(name).expanduser()
    return str(path.absolute()) if name and path.is_dir() else name


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
    if key.partition(".")[0] == "claims":
        raise StudyError(f"--set {text}: expected claims in the study file only: they are no setting of a study.")
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
    if key in ("model.weights", "space.weights"):
        parsed = weights_paths.absolute(parsed, Path())
    if key == "training.start_from" and isinstance(parsed, str):
        parsed = _model(parsed, Path())
    if key == "pruner.name":  # the settings of another one do not fit it
        for setting in set(table) - {"name", *PRUNERS.get(str(parsed), table)}:
            del table[setting]
    table[last] = parsed
