"""How long a text may be that MLflow keeps, in characters, and how a longer one is cut.

Read off MLflow 3.17: the columns of its tables on Postgres, and what its own checks refuse; tests/test_lengths.py holds
each number against a real server. What is cut is whole elsewhere: in our rows, or in the files of the study's run.
"""

from collections.abc import Sequence

EXPERIMENT_NAME = 256
EXPERIMENT_TAG = 20_000  # a tag's value
RUN_NAME = 250
RUN_TAG = 8000
PARAM = 6000  # a param's value
DATASET_NAME = 500
DATASET_DIGEST = 36
MODEL_NAME = 256  # of a registered model
MODEL_TAG = 5000
VERSION_TAG = 100_000
DESCRIPTION = 5000  # of a registered model, or of a version of it
ALIAS = 255
TAG_KEY = 250  # of any tag

# Of a study with all that stands behind its name. It is the name of an experiment, which gets " (deleted 123)" behind
# it, an alias, and the beginning of each run's name, where a trial's number and some of its point shall be seen, too.
STUDY_NAME = 210


def cut(text: str, limit: int) -> str:
    """The text, or its beginning with an ellipsis as the last of `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def cut_table(table: str, limit: int) -> str:
    """A Markdown table, or as many of its first rows as fit with a line that says how many are left out."""
    if len(table) <= limit:
        return table
    heading, rows = table.split("\n")[:2], table.split("\n")[2:]
    for shown in reversed(range(len(rows))):
        text = _with_rest([*heading, *rows[:shown]], len(rows) - shown)
        if len(text) <= limit:
            return text
    return ""


def _with_rest(lines: Sequence[str], left_out: int) -> str:
    return "\n".join(lines) + f"\n\n… and {left_out} more."
