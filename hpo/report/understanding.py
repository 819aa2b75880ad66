"""The text of `hpo data check`."""

import textwrap

import numpy as np

from data_pipeline.dataset import Dataset, Understanding
from data_pipeline.split import SMALLEST
from hpo.text import counted, utf8

WIDTH = 80  # columns
PAIRS = 5  # that are printed


def show(understood: Understanding) -> None:
    """Print what was understood, what is doubtful, and why nothing can be trained on it although it can be read."""
    if understood.dataset is not None:
        _show(understood, understood.dataset)
    for note in understood.notes.doubts:
        _print(f"Note: {note}")
    for error in understood.notes.errors if understood.dataset is not None else []:
        _print(error)


def _show(understood: Understanding, data: Dataset) -> None:
    height, width = data.images.shape[2:]
    layout, count = data.description.layout, len(data.images)
    state = "read, with errors below" if understood.notes.errors or understood.notes.questions else "good"
    _print(
        f"{understood.folder}: {state}. {counted(count, 'image')} of {width} x {height} pixels, digest "
        f"{data.digest[:8]}."
    )
    pattern = ", ".join(layout.images or ("r_*.png",))
    channels = counted(data.images.shape[1], "channel")
    _line("images", f"{pattern}; {channels}, {layout.levels or 'grey'}; pixels: {understood.greys}")
    if layout.table:
        _line("table", ", ".join(layout.table))
    for remark in understood.notes.remarks:
        _line("", remark)
    pairs = list(zip(data.names, understood.rows, strict=True))[:PAIRS]
    for label, (image, row) in zip(["pairs"] + [""] * PAIRS, pairs, strict=False):
        _line(label, f"{utf8(image)} - {row}")
    print(f"  targets  {'':18} {'':10} {'mean':>9} {'spread':>9} {'lowest':>9} {'highest':>9}")
    for name, column in zip(data.target_names, data.targets.T, strict=True):
        _column(name, data.units[name], column)
    if missing := [f"{name} {count}" for name, count in data.missing.items() if count]:
        _line("missing", f"{', '.join(missing)} of {count} labels; they count in no loss and no score")
    if data.inputs is not None:
        _line("inputs", "numbers that the networks see beside the image")
        for name, column in zip(data.input_names, data.inputs.T, strict=True):
            _column(name, data.input_units.get(name, ""), column)
    if data.groups:
        _line("groups", f"{len(set(data.groups))}, of which none is on two sides of the split")
    if count >= SMALLEST:
        parts = data.split
        _line("split", f"{len(parts.train)} training, {len(parts.validation)} validation, {len(parts.test)} test")


def _column(name: str, unit: str, column: np.ndarray) -> None:
    numbers = [np.nanmean(column), np.nanstd(column), np.nanmin(column), np.nanmax(column)]
    print(f"{'':10} {name:18.18} {unit:10.10}" + "".join(f" {number:9.4g}" for number in numbers))


def _line(label: str, text: str) -> None:
    _print(text, initial_indent=f"  {label:8} ", subsequent_indent=" " * 11)


def _print(text: str, initial_indent: str = "", subsequent_indent: str = "") -> None:
    """Print a text in lines of at most WIDTH columns; a word of its own that is longer stays whole."""
    print(
        textwrap.fill(
            text,
            WIDTH,
            break_long_words=False,
            break_on_hyphens=False,
            initial_indent=initial_indent,
            subsequent_indent=subsequent_indent,
        )
    )
