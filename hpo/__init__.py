"""Hyperparameter optimisation, tracked with MLflow, of networks that predict a material's properties from an image.

In a notebook or a program, `import hpo` gives what `hpo.notebook` describes. Each name is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.notebook import (
        Model,
        Study,
        UserError,
        compare,
        dataset,
        down,
        evaluate,
        load,
        run,
        studies,
        up,
    )

__all__ = [
    "Model",
    "Study",
    "UserError",
    "compare",
    "dataset",
    "down",
    "evaluate",
    "load",
    "run",
    "studies",
    "up",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    return getattr(import_module("hpo.notebook"), name)


def __dir__() -> list[str]:
    return __all__
