"""Names of studies, and what the weights of a network are called."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.study.specification import Study

RESERVED = re.compile(r"champion|latest|v?[0-9]+", re.IGNORECASE)  # a study's name is an alias of its model, too


AUTO = "auto"  # the shipped sequence whose sizes hpo chooses by the clock


BARE = "-not-pretrained"  # behind a study's name


LONGEST_NAME = 200  # characters; names of files and aliases, which have more behind it, may have 255


def full_name(study: "Study", identity: str) -> str:
    """The file's name; `-not-pretrained` if no backbone is; `+` and eight hex digits of the spec with any override or
    other data."""
    plain = with_digits(study, identity)
    return study.name + BARE + plain.removeprefix(study.name) if study.all_at_random else plain


def with_digits(study: "Study", identity: str) -> str:
    return f"{study.name}+{identity[:8]}" if study.overridden else study.name


def alias(name: str) -> str:
    """A study's name as MLflow allows it for an alias, and so a name that no two studies of a database may share."""
    return name.replace(".", "-")


def file_name(name: str) -> str:
    """The file's name, of what `full_name` gives."""
    return name.partition("+")[0].removesuffix(BARE)


def origin(model: Mapping[str, Any]) -> str:
    """What a trial and the one it starts from have in common."""
    return f"{model['backbone']} {model['weights']}"


def provenance(model: Mapping[str, Any]) -> str:
    """Where the weights of a model come from, as every table and description says; empty where nothing else is
    possible."""
    weights = model.get("weights", "")
    return {"": "", "imagenet": "ImageNet", "none": "not pretrained"}.get(weights, f"pretrained: {weights}")


def weights_key(model: Mapping[str, Any]) -> str:
    """What the file of a model's weights goes by in a study: the backbone for torchvision's, the name of a file of the
    user's; empty if it has none."""
    weights = str(model.get("weights", "none"))
    return {"imagenet": str(model.get("backbone")), "none": ""}.get(weights, weights)
