"""Code of the user's in a study's table: functions there, and beside them the digest of their source."""

import re
from pathlib import Path
from typing import Any

from hpo.errors import StudyError
from models import user
from models.specs import FUNCTION, SpecError

Sources = dict[str, user.Source]  # by digest

KEYS = {"model": ("build", "code"), "training": ("loss", "loss_code")}  # of each table: the function, and the digest


def take(label: str, table: dict[str, Any], folder: Path) -> Sources:
    """Write the digest of the source beside each function that a study's table names; return the sources.

    They lie in `folder`. Raise StudyError if there is no such source, or functions for one key are of several.
    """
    sources: Sources = {}
    space = table.get("space")
    for part, (key, digest_key) in KEYS.items():
        settings = table.get(part)
        searched = space.get(key) if isinstance(space, dict) else None
        values = [settings.get(key)] if isinstance(settings, dict) and key in settings else []
        values += searched if isinstance(searched, list) else []
        functions = [value for value in values if isinstance(value, str) and re.fullmatch(FUNCTION.pattern, value)]
        if isinstance(settings, dict) and digest_key in settings:
            raise StudyError(f"{label}: {part}.{digest_key}: hpo computes it from the source: remove the key.")
        if not functions:
            continue
        try:
            gathered = [user.gather(folder, function) for function in functions]
        except SpecError as error:
            raise StudyError(f"{label}: {part}.{key}: {error}") from None
        if any(source != gathered[0] for source in gathered):
            raise StudyError(
                f"{label}: space.{key}: expected functions of one package, found {', '.join(functions)}: put them "
                "into one package beside the study file."
            )
        digest = user.digest_of(gathered[0])
        table.setdefault(part, {})[digest_key] = digest
        sources[digest] = gathered[0]
    return sources
