"""The identity of a study: the hash of its canonical specification."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hpo.errors import StudyConflict

TRIALS = "sampler.trials"  # what `hpo run --trials` raises without another identity


def digest(canonical: Mapping[str, Any]) -> str:
    """SHA-256 of a canonical spec, 64 hex digits."""
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def conflict(name: str, recorded: Mapping[str, Any], present: Mapping[str, Any]) -> StudyConflict:
    """The error that a name stands for another canonical spec already; it says where the two differ."""
    differing = differences(recorded, present)
    texts = [
        f"{key}: expected {_shown(ours)} as recorded, found {_shown(theirs)}"
        for key, (ours, theirs) in differing.items()
    ]
    more = f"Or raise its number of trials alone: `hpo run --study {name} --trials N`. " * (list(differing) == [TRIALS])
    return StudyConflict(
        f"Refusing to go on with the study '{name}', which is recorded with another specification. "
        f"{'; '.join(texts)}. Nothing was touched. {more}Either give the changed study another name, or remove the "
        f"recorded one with `hpo delete --study {name}`."
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two specs that are not the same, by their keys, in alphabetical order."""
    first, second = _flat(one), _flat(other)
    pairs = {key: (first.get(key), second.get(key)) for key in sorted(first.keys() | second.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


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
