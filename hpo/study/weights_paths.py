"""Files of pretrained weights in a study's table: paths there, and names in the study, which may move to elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpo.errors import StudyError

SUFFIXES = (".pth", ".pth.tar", ".pt", ".safetensors")


def absolute(value: Any, folder: Path) -> Any:
    """Return `weights` of a model or a space with absolute paths, which count from `folder`."""
    if isinstance(value, list):
        return [absolute(item, folder) for item in value]
    return str((folder / Path(value).expanduser()).absolute()) if _is_path(value) else value


def take(label: str, table: dict[str, Any], earlier: Mapping[str, str]) -> dict[str, str]:
    """Replace each path in a study's table by the file's name. Return the paths by these names.

    `earlier` are those of the study that it starts from. Raise StudyError if two files have one name.
    """
    paths = dict(earlier)

    def name(value: Any) -> Any:
        if not _is_path(value):
            return value
        file = Path(value).name
        if paths.setdefault(file, value) != value:
            raise StudyError(
                f"{label}: weights: expected files of different names, found {paths[file]} and {value}: rename one."
            )
        return file

    for part in (table.get("model"), table.get("space")):
        if isinstance(part, dict) and "weights" in part:
            weights = part["weights"]
            part["weights"] = [name(item) for item in weights] if isinstance(weights, list) else name(weights)
    return paths


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(SUFFIXES)
