"""The identity of a study: the hash of its canonical specification."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hpo.errors import StudyConflict


def digest(canonical: Mapping[str, Any]) -> str:
    """SHA-256 of a canonical spec, 64 hex digits."""
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def conflict(name: str, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> StudyConflict:
    """The error that a name stands for another canonical spec already; it says where the two differ."""
    ours, theirs = _flat(recorded), _flat(present)
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
            flat |= {f"{key}.{name}": part for name, part in value.items()}
        else:
            flat[key] = value
    return flat


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text[:8] if len(text) == 64 and not set(text) - set("0123456789abcdef") else text  # a digest
