"""Records: frozen values that are stored as JSON, and read again though an earlier version stored them."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Self, Union, cast, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A frozen record with a JSON form.

    A field that defaults to None stands in the JSON only when it has a value, so that what an earlier version stored
    keeps its form. Keys that this version does not know are left out.
    """

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record of a JSON object. Raise TypeError, naming the keys, if one that is needed is missing."""
        hints = _hints(cast(type, cls))  # as Hashable, which it is
        return cls(**{name: decoded(hints[name], value) for name, value in values.items() if name in hints})

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object: dictionaries, lists, numbers, texts and None."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            name: _encoded(value)
            for name, (value, default) in values.items()
            if value is not None or default is MISSING
        }


@cache
def _hints(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if name in {field.name for field in fields(kind)}}


def decoded(hint: Any, value: Any) -> Any:
    """Return a JSON value as what the type hint of its field says."""
    if value is None or _stays(hint):
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return decoded(arguments[0], value)
    if origin is tuple:
        return tuple(decoded(arguments[0], item) for item in value)
    if origin in (dict, Mapping):
        return {key: decoded(arguments[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value)
    return hint.from_dict(value) if hasattr(hint, "from_dict") else value


@cache
def _stays(hint: Any) -> bool:
    """Return whether a JSON value is already what the hint says: no record or tuple is in it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _stays(arguments[0])
    if origin in (dict, Mapping):
        return _stays(arguments[1])
    is_record = isinstance(hint, type) and issubclass(hint, Record)
    return origin is not tuple and not is_record and not hasattr(hint, "from_dict")


def _encoded(value: Any) -> Any:
    """Return the JSON form of a field's value."""
    if isinstance(value, Record):
        return value.to_json()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, (list, tuple)) else value
