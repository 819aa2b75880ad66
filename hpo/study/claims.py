"""Claims of a study file: questions that the report decides. They are no part of a study's identity."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, Self

from hpo.errors import StudyError
from hpo.text import near_miss

KINDS = {  # kind -> its terms; those with a star are required
    "parameter effect": ("parameter*", "better", "worse", "family", "yes", "no"),
    "model comparison": ("models", "against", "each", "yes", "no"),
    "convergence": ("models*", "epochs", "each"),
    "capacity": ("family", "yes", "no"),
}
Value = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim or question; its kind says which of the terms it has."""

    text: str  # "{backbone}" in it stands for a value of `each`, if that is "backbone"
    kind: str
    parameter: str = ""  # of [space]
    better: Value | None = None  # its value that is claimed to be better; None: the highest
    worse: Value | None = None  # None: the lowest
    family: str = ""  # of networks; empty: of every family
    models: tuple[str, ...] = ()  # roles or studies; empty: all
    against: tuple[str, ...] = ()  # those that `models` are compared with
    each: str = ""  # a key of [model]: its values are compared, or compared with `against` one by one
    epochs: tuple[int, int] | None = None  # from, to
    yes: str = "confirmed"  # the answer if it holds
    no: str = "refuted"  # the answer if the opposite holds

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the claim that `to_dict` gave; keys that this version does not know are left out."""
        terms: dict[str, Any] = {term.name: values[term.name] for term in fields(cls) if term.name in values}
        return cls(**terms | {name: tuple(value) for name, value in terms.items() if isinstance(value, list)})

    def to_dict(self) -> dict[str, Any]:
        """Return the claim as JSON has it, without the terms that it leaves open."""
        terms = {term.name: value for term in fields(self) if (value := getattr(self, term.name)) != term.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in terms.items()}


def parse(label: str, tables: Any) -> tuple[Claim, ...]:
    """Return the claims of a study file. Raise StudyError, with `label` for the file."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise StudyError(f"{label}: claims: expected tables [[claims]], found {tables!r}.")
    return tuple(_claim(f"{label}: claims: number {index}", table) for index, table in enumerate(tables, start=1))


def shipped() -> tuple[Claim, ...]:
    """Return the claims of the source study."""
    text = (resources.files("hpo") / "studies" / "protocol.toml").read_text(encoding="utf-8")
    return parse("study protocol", tomllib.loads(text)["claims"])


def _claim(where: str, table: Mapping[str, Any]) -> Claim:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise StudyError(
            f"{where}: kind: expected one of {', '.join(KINDS)}, found {kind!r}.{near_miss(str(kind), KINDS)}"
        )
    terms = ["text*", "kind", *KINDS[kind]]
    valid = [term.removesuffix("*") for term in terms]
    for key in table:
        if key not in valid:
            hint = near_miss(key, valid)
            raise StudyError(f"{where}: unknown key '{key}'.{hint} Valid keys of a {kind}: {', '.join(valid)}.")
    for term in terms:
        if term.endswith("*") and term[:-1] not in table:
            raise StudyError(f"{where}: expected the key '{term[:-1]}' of a {kind}, found none.")
    values = {key: _value(f"{where}: {key}", key, value) for key, value in table.items()}
    if ("better" in values) != ("worse" in values) or values.get("better", 1) == values.get("worse", 0):
        raise StudyError(f"{where}: expected two values, better and worse, or neither (the highest and the lowest).")
    if kind == "convergence" and ("epochs" in values) == ("each" in values):
        raise StudyError(f"{where}: expected either epochs (a range) or each (who is fastest), found both or none.")
    return Claim(**values)


def _value(where: str, key: str, value: Any) -> Any:
    """Return a term with its type. Raise StudyError for another one."""
    if key in ("models", "against"):
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise StudyError(f"{where}: expected a role or study, or a list of them, found {value!r}.")
        return tuple(words)
    if key == "epochs":
        whole = isinstance(value, list) and [type(bound) for bound in value] == [int, int]
        if not whole or not 1 <= value[0] <= value[1]:
            raise StudyError(f"{where}: expected two whole numbers, from and to, such as [10, 20], found {value!r}.")
        return tuple(value)
    if key in ("better", "worse"):
        if not isinstance(value, (str, int, float)):
            raise StudyError(f"{where}: expected a value of the parameter, found {value!r}.")
        return value
    if not isinstance(value, str) or not value.strip():
        raise StudyError(f"{where}: expected text in quotes, found {value!r}.")
    return value
