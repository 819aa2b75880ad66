"""What a study is: its file, its specification, its identity and its names.

Nothing here touches a database, a server or torch.
"""

from hpo.study.file import is_file, load, load_all, shipped
from hpo.study.identity import conflict, differences, digest
from hpo.study.names import AUTO, alias, file_name, full_name, origin, provenance
from hpo.study.objectives import NMSE, SIZES, violations
from hpo.study.parsing import KEYS, PRUNERS, within
from hpo.study.space import Choices, Interval, has_place, pruned
from hpo.study.specification import (
    BEST,
    DEFAULT_DATA,
    LEARNING,
    MOST_TRIALS,
    NUMERICS_VERSION,
    Study,
    restore,
    trial_spec,
)

__all__ = [
    "AUTO",
    "BEST",
    "DEFAULT_DATA",
    "KEYS",
    "LEARNING",
    "MOST_TRIALS",
    "NMSE",
    "NUMERICS_VERSION",
    "PRUNERS",
    "SIZES",
    "Choices",
    "Interval",
    "Study",
    "alias",
    "conflict",
    "differences",
    "digest",
    "file_name",
    "full_name",
    "has_place",
    "is_file",
    "load",
    "load_all",
    "origin",
    "provenance",
    "pruned",
    "restore",
    "shipped",
    "trial_spec",
    "violations",
    "within",
]
