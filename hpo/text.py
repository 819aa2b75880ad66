"""Numbers, names and messages as people read them, safe for terminal, Markdown, CSV and database."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_pipeline.messages import counted as counted
from data_pipeline.messages import near_miss as near_miss

if TYPE_CHECKING:
    import pandas


def visible(text: str) -> str:
    """The text with all that a terminal would obey, or not show, spelled as Python spells it: `\\x1b`, `\\u202e`, and
    `\\udce9` for a byte of a file's name that is no UTF-8. Line ends, tabs, spaces of any script and what joins letters
    stay."""
    if text.isprintable():
        return text
    return "".join(
        character if _shows(character) else character.encode("unicode_escape").decode() for character in text
    )


def _shows(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t\u200c\u200d" or unicodedata.category(letter) == "Zs"


def one_line(text: str) -> str:
    """`visible` of a name within a message: it ends no line there."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def squared(unit: str) -> str:
    """Return the square of a unit, with parentheses around a compound one: (W/(m K))², (log10 S/m)²."""
    return f"({unit})²" if re.search(r"[/*·^²³⁻]|^(?:log10|log|sqrt) ", unit) else f"{unit}²"


def for_markdown(text: str) -> str:
    """Text on one line of a Markdown page, or in a cell of a table, that reads there as it is."""
    line = visible(text).replace("\n", " ")
    return _MARKUP.sub(lambda match: f"\\{match[0]}", _NUMBERED.sub(r"\1\\\2", line))


_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s)")
_MARKUP = re.compile(
    r"[`*<>|~$]"
    r"|\\(?![.)])"  # but for the one that _NUMBERED made
    r"|(?<!\w)_|_(?!\w)"  # within a word it is no markup
    r"|(?<=\])[(\[:]"  # brackets are markup only before these
    r"|&(?=[#\w]+;)"
    r"|(?<!\S)@(?=[A-Za-z\d])"  # MLflow's page makes a link to a stranger on GitHub of it
    r"|^[-+#=](?=[-+#=\s]|$)"  # a list, a heading, a line
)


def for_csv(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """The frame with an apostrophe before each text that a spreadsheet would run as a formula, or that has apostrophes
    before such a one: to read it back, take one away. Numbers stay, and so do texts that are numbers."""
    safe = frame.rename(columns=_cell)
    for index, kind in enumerate(frame.dtypes):
        if kind.kind not in "biuf":
            safe.isetitem(index, [_cell(value) for value in frame.iloc[:, index]])
    return safe


_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = utf8(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def utf8(text: str) -> str:
    """The text with bytes of a file's name that are no UTF-8, and NUL, spelled as `visible` does: files, tables and the
    database take it."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


SHORT = {"filters": "f", "kernel_size": "k", "dropout": "d", "learning_rate": "lr", "backbone": ""}


def point_text(point: Mapping[str, Any]) -> str:
    """A point in few letters, such as `f32 k5 d0.2 lr1e-3`."""
    return " ".join(SHORT.get(name, f"{name}=") + number_text(value) for name, value in point.items())


def number_text(value: Any) -> str:
    """A number as people write it: 32, 0.2, 1e-3; anything else as it is."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def toml_text(value: Any) -> str:
    """Return a value as a study file has it; numbers and arrays of NumPy as well."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_text, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def score_text(value: float | None, places: str = ".4g") -> str:
    """A score with so many digits; - if it is undefined."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{places}}"


def in_unit_text(in_unit: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the scores of targets in their unit, as `k [m²]: R² 0.93, RMSE 1.2e-13, NRMSE 0.2`; of the first five."""
    texts = [
        f"{name}: R² {score_text(of['r2'])}, RMSE {score_text(of['rmse'])}, NRMSE {score_text(of['nrmse'])}"
        for name, of in in_unit.items()
    ]
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


def duration(seconds: float) -> str:
    """Return seconds as people say them, such as `1 h 05 min`, `12 min`, `40 s`."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def cut(text: str, limit: int) -> str:
    """Return the text, or its beginning with an ellipsis as the last of `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def cut_table(table: str, limit: int) -> str:
    """Return a Markdown table, or as many of its first rows as fit with a line that says how many are left out."""
    if len(table) <= limit:
        return table
    heading, rows = table.split("\n")[:2], table.split("\n")[2:]
    for kept in reversed(range(len(rows))):
        text = "\n".join([*heading, *rows[:kept]]) + f"\n\n… and {len(rows) - kept} more."
        if len(text) <= limit:
            return text
    return ""


def in_brackets(*parts: str) -> str:
    """Return the parts that are not empty as ` (one, two)`, to follow a name; nothing if all are empty."""
    text = ", ".join(filter(None, parts))
    return f" ({text})" if text else ""
