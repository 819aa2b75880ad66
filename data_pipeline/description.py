"""dataset.toml: what a folder of images says about itself. The file, and every key of it, is optional.

`name`; `unit` (of all targets); the keys of `data_pipeline.dataset_keys`; `[phases.matrix]` (pixel 0) and
`[phases.inclusion]` (pixel 255) with
`young_modulus` (in that unit) and `poisson_ratio`; `[made]`, with which `data_pipeline.synthesize` finds its own folder
again.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import dataset_keys
from data_pipeline.dataset_keys import UNSTATED, Layout
from data_pipeline.files import not_a_file
from data_pipeline.messages import near_miss, printable
from data_pipeline.phase import Phase

FILE = "dataset.toml"
UNKNOWN_UNIT = "label unit"
LARGEST_TOML = 2**14  # bytes; reading a key of n parts takes n² time and memory: 1 s and 300 MB at this size

_PHASES = ("matrix", "inclusion")
_CONSTANTS = ("young_modulus", "poisson_ratio")
_NOT_IN_NAMES = re.compile(r"[^\w .+-]")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a data set besides its images and labels."""

    name: str
    unit: str = UNKNOWN_UNIT  # of the labels
    phases: dict[str, Phase] | None = None  # "matrix" and "inclusion"
    recipe: Mapping[str, int] | None = None  # of a synthetic data set; "made" in files
    layout: Layout = UNSTATED  # how images and labels lie in the folder

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the unit."""
        phases = {"phases": {name: asdict(phase) for name, phase in self.phases.items()}} if self.phases else {}
        layout = {"layout": self.layout.to_dict()} if self.layout.set() else {}
        return {"name": self.name} | phases | ({"made": dict(self.recipe)} if self.recipe else {}) | layout

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, unit: str) -> "Description":
        """Return the description in JSON form. Raise ValueError, TypeError or AttributeError if it has another form."""
        if not isinstance(values.get("name"), str):
            raise ValueError("metadata without a name")
        phases = {name: Phase(**constants) for name, constants in values.get("phases", {}).items()}
        problems: list[str] = []
        lies = dataset_keys.parse(values.get("layout", {}), "metadata", problems)
        if problems:
            raise ValueError(problems[0])
        return cls(name=values["name"], unit=unit, phases=phases or None, recipe=values.get("made"), layout=lies)

    def to_toml(self) -> str:
        """Return the content of dataset.toml."""
        lines = [f"name = {json.dumps(self.name, ensure_ascii=False)}"]
        of_targets = set(self.layout.units or ()) - set(self.layout.inputs or ())
        lines += [f"unit = {json.dumps(self.unit, ensure_ascii=False)}"] if not of_targets else []
        lines += self.layout.to_toml()
        tables: dict[str, Mapping[str, float]] = {}
        tables |= {f"phases.{name}": asdict(phase) for name, phase in (self.phases or {}).items()}
        tables |= {"made": self.recipe} if self.recipe else {}
        for title, values in tables.items():
            lines += ["", f"[{title}]", *(f"{key} = {value!r}" for key, value in values.items())]
        return "\n".join(lines) + "\n"


def name_of(folder: Path) -> str:
    """Return the name of a data set that has none of its own: its folder's, with - for characters that are invalid."""
    return _NOT_IN_NAMES.sub("-", folder.resolve().name).strip()[:60] or "data"


def read(folder: Path, problems: list[str]) -> Description:
    """Return the description in a folder, without its invalid parts. Add what is wrong with them to `problems`."""
    unnamed = Description(name=name_of(folder))
    path = folder / FILE
    if not path.exists() and not path.is_symlink():
        return unnamed
    if reason := not_a_file(path):
        problems.append(f"{FILE}: {reason}")
        return unnamed
    file = f"{FILE}: expected a TOML file in UTF-8, but it"
    try:
        with path.open("rb") as opened:
            text = opened.read(LARGEST_TOML + 1)
        if len(text) > LARGEST_TOML:
            problems.append(f"{file} is larger than {LARGEST_TOML // 2**10} KiB. Keep what is needed.")
            return unnamed
        return _parse(tomllib.loads(text.decode("utf-8-sig")), unnamed.name, problems)
    except RecursionError:  # in parsing a value, or in printing it
        problems.append(f"{file} is nested too deeply. Keep what is needed.")
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        problems.append(f"{file} cannot be read: {error}")
    return unnamed


def _parse(content: dict[str, Any], folder_name: str, problems: list[str]) -> Description:
    _check_keys(content, ("name", "unit", *dataset_keys.KEYS, "phases", "made"), "", problems)
    texts = {"name": folder_name, "unit": UNKNOWN_UNIT}
    for key in texts:
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not 1 <= len(value.strip()) <= 60 or not value.isprintable():
            problems.append(f"{FILE}: {key}: expected a text of 1 to 60 characters, found {value!r:.60}.")
        elif key == "name" and _NOT_IN_NAMES.search(value):
            problems.append(f"{FILE}: name: expected letters, digits, spaces and . _ + -, found {value!r}.")
        else:
            texts[key] = value.strip()
    phases = _parse_phases(content["phases"], problems) if "phases" in content else None
    recipe = content.get("made", {})
    if not isinstance(recipe, dict) or not all(type(n) is int and 0 <= n < 2**63 for n in recipe.values()):
        problems.append(f"{FILE}: made: expected the table that `make` wrote. Remove the key.")
        recipe = {}
    lies = dataset_keys.parse(content, FILE, problems)
    return Description(**texts, phases=phases, recipe=recipe or None, layout=lies)


def _parse_phases(content: Any, problems: list[str]) -> dict[str, Phase] | None:
    if not isinstance(content, dict) or set(content) != set(_PHASES):
        keys = ", ".join(map(printable, content)) if isinstance(content, dict) else repr(content)
        problems.append(f"{FILE}: phases: expected the tables matrix and inclusion, found {keys or 'none'}.")
        return None
    phases = {}
    for name in _PHASES:
        phase, where = content[name], f"{FILE}: phases.{name}"
        if not isinstance(phase, dict):
            problems.append(f"{where}: expected a table with {' and '.join(_CONSTANTS)}, found {phase!r}.")
            continue
        _check_keys(phase, _CONSTANTS, f"phases.{name}.", problems)
        if missing := [key for key in _CONSTANTS if key not in phase]:
            problems.append(f"{where}: {' and '.join(missing)} missing.")
            continue
        try:
            valid = Phase(phase["young_modulus"], phase["poisson_ratio"])
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        phases[name] = Phase(float(valid.young_modulus), float(valid.poisson_ratio))
    return phases if len(phases) == len(_PHASES) else None


def _check_keys(table: dict[str, Any], valid: tuple[str, ...], prefix: str, problems: list[str]) -> None:
    for key in table:
        if key not in valid:
            near = near_miss(key, valid)
            problems.append(f"{FILE}: no key is called {printable(prefix + key)}. There are: {', '.join(valid)}.{near}")
