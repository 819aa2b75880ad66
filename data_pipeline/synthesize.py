"""Draws microstructures, labels them, and writes a folder of the form that `dataset.load` reads.

The folder holds the images `{r}_{morphology}.png`, the table `1-{count}_Cij_pbc.csv`, `dataset.toml` (name, unit,
phases, and how it was made) and the side file `cells.csv`: for each row its image, morphology and volume fraction, all
13 constants in GPa, and the label's uncertainty: the largest relative difference, among the nine components, between
the label (2 x 2 elements a pixel) and the same computed with one element a pixel.

A folder is unfinished until its table is there. Finished cells are kept in `cells.partial.csv`; the same call goes on.
"""

import fcntl
import io
import json
import logging
import os
import re
import signal
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.components import COMPONENTS, COUPLINGS, vector
from data_pipeline.dataset import LARGEST_TOTAL, DatasetError, plain_name, write_atomically
from data_pipeline.homogenize import homogenize
from data_pipeline.images import LARGEST_SIDE, ImageProblem, read_png
from data_pipeline.morphology import SMALLEST_SIDE, draw
from data_pipeline.phase import Phase

RECIPE = 1  # to be raised whenever the same seed gives other pixels or labels
UNIT = "GPa"
MATRIX = Phase(3.5, 0.35)  # epoxy
INCLUSION = Phase(70.0, 0.22)  # glass
LARGEST_CONTRAST = 50  # of Young's moduli: beyond it no pixel grid resolves the fields where features meet

_COLUMNS = ("row", "image", "morphology", "volume_fraction", *COMPONENTS, *COUPLINGS, "label_uncertainty")
_PARTIAL = "cells.partial.csv"
_FACTS = "dataset.toml"
_HALF = re.compile(r"\.(dataset\.toml|cells\.csv|1-\d+_Cij_pbc\.csv|\d+_[a-z]+\.png)\.[0-9a-f]+\.tmp")

_log = logging.getLogger("data_pipeline")


def make(
    folder: Path,
    *,
    count: int = 520,
    size: int = 64,
    seed: int = 0,
    matrix: Phase = MATRIX,
    inclusion: Phase = INCLUSION,
    processes: int | None = None,
) -> Iterator[int]:
    """Write a labelled data set into a folder; yield how many of its cells are finished, first those found finished.

    Cell r depends on seed, r, size (pixels) and phases only; pixels are the same everywhere, labels to rounding. Uses
    `processes` processes (all cores by default). After an interruption the same call goes on. DatasetError when the
    folder holds something else, cannot be written, or another process is making it.
    """
    folder = Path(folder)
    for what, value, low, high in (
        ("count", count, 1, 100_000),
        ("size", size, SMALLEST_SIDE, LARGEST_SIDE // 2),
        ("seed", seed, 0, 2**63 - 1),
        ("processes", processes or 1, 1, 1024),
    ):
        if not low <= value <= high:
            raise DatasetError(f"{what}: expected {low} to {high}, found {value}.")
    if count * size**2 > LARGEST_TOTAL:
        raise DatasetError(f"{count} cells of {size} x {size} pixels are more than can be loaded again. Make fewer.")
    moduli = sorted((matrix.young_modulus, inclusion.young_modulus))
    if moduli[1] > LARGEST_CONTRAST * moduli[0]:
        _log.warning(
            "The phases' Young's moduli differ by a factor of %.3g; above %d labels on a pixel grid are not reliable: "
            "see label_uncertainty in cells.csv",
            moduli[1] / moduli[0],
            LARGEST_CONTRAST,
        )
    if matrix.poisson_ratio == inclusion.poisson_ratio == 0:
        _log.warning(
            "Both phases have the Poisson's ratio 0, so C13 and C23 are 0 in every cell: no study can be trained on it"
        )
    recipe = {
        "phases": {"matrix": asdict(matrix), "inclusion": asdict(inclusion)},
        "made": {"recipe": RECIPE, "seed": seed, "count": count, "size": size},
    }
    return _make(folder, recipe, matrix, inclusion, processes or _cores())


def _make(folder: Path, recipe: dict[str, Any], matrix: Phase, inclusion: Phase, processes: int) -> Iterator[int]:
    seed, count, size = (recipe["made"][key] for key in ("seed", "count", "size"))
    table = folder / f"1-{count}_Cij_pbc.csv"
    try:
        with _claimed(folder, recipe):
            rows = _finished(folder, table, count, size)
            yield len(rows)
            todo = [index for index in range(count) if index not in rows]
            if todo:
                jobs = [(folder, seed, index, size, matrix, inclusion) for index in todo]
                with (folder / _PARTIAL).open("w", encoding="utf-8") as partial:
                    partial.writelines(rows.values())
                    partial.flush()
                    for index, row in _computed(jobs, min(processes, len(jobs))):
                        rows[index] = row
                        partial.write(row)  # after the image is there
                        partial.flush()
                        yield len(rows)
            if todo or not table.exists():
                _finish(folder, table, [rows[index] for index in range(count)])
    except OSError as error:
        raise DatasetError(
            f"{error.filename or folder}: cannot be written ({error.strerror}). "
            "Check permissions and free space; the same command then goes on."
        ) from None
    except BrokenProcessPool:
        raise DatasetError(
            f"A process computing cells for {folder} was killed (out of memory?). "
            "The same command goes on; with fewer processes it needs less memory."
        ) from None


# --- the folder ---


@contextmanager
def _claimed(folder: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for this process, and make sure that it is empty or of this recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise DatasetError(f"{folder}: another process is making this data set. Wait for it, or end it.") from None
        path = folder / _FACTS
        # of a process that was killed while it wrote
        half = {each for each in folder.iterdir() if _HALF.fullmatch(each.name) and not each.is_dir()}
        if path.exists():
            found = _recipe(path)
            if found != recipe:
                raise DatasetError(
                    f"{folder}: expected an empty folder or one made with {_told(recipe)}, "
                    f"found one made with {_told(found)}. Choose another folder."
                )
        elif set(folder.iterdir()) - {each for each in half if each.name.startswith(f".{_FACTS}.")}:
            raise DatasetError(f"{folder}: expected an empty folder, found other files in it. Choose another folder.")
        else:
            write_atomically(path, _toml(plain_name(folder), recipe).encode())
        for each in half:
            each.unlink()
        yield
    finally:
        os.close(descriptor)


def _toml(name: str, recipe: dict[str, Any]) -> str:
    lines = [f"name = {json.dumps(name, ensure_ascii=False)}", f'unit = "{UNIT}"']
    tables = {f"phases.{phase}": values for phase, values in recipe["phases"].items()} | {"made": recipe["made"]}
    for title, values in tables.items():
        lines += ["", f"[{title}]", *(f"{key} = {value!r}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _recipe(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = {}
    return {key: content.get(key) for key in ("phases", "made")}


def _told(recipe: dict[str, Any]) -> str:
    made = recipe["made"]
    if not isinstance(made, dict):
        return "something else"
    return f"{made}, phases {recipe['phases']}"


def _finished(folder: Path, table: Path, count: int, size: int) -> dict[int, str]:
    """The rows, as lines, of the cells that are in the folder with their image."""
    rows: dict[int, str] = {}
    for name in (_PARTIAL, "cells.csv"):
        path = folder / name
        # A line without its end was being written when the process was killed.
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            fields = line.split(",")
            if line.endswith("\n") and len(fields) == len(_COLUMNS) and fields[0].isdigit():
                index = int(fields[0])
                name = f"{index}_{fields[2]}.png"
                if index < count and fields[1] == name and _is_image(folder / name, fields[3], size):
                    rows[index] = line
    if len(rows) < count:
        table.unlink(missing_ok=True)  # the table is what says that a folder is finished
    return rows


def _is_image(path: Path, fraction: str, size: int) -> bool:
    """Whether the file is an image of that size and volume fraction, not something of its name."""
    try:
        pixels, mode, found = read_png(path)
        return mode == "L" and found == (size, size) and repr(float((pixels == 255).mean())) == fraction
    except (ImageProblem, OSError):
        return False


def _finish(folder: Path, table: Path, rows: list[str]) -> None:
    write_atomically(folder / "cells.csv", (",".join(_COLUMNS) + "\n" + "".join(rows)).encode())
    first = _COLUMNS.index(COMPONENTS[0])
    labels = [row.split(",")[first : first + len(COMPONENTS)] for row in rows]
    lines = [",".join([str(number), *label]) + "\n" for number, label in enumerate(labels, start=1)]
    write_atomically(table, "".join(lines).encode())
    (folder / _PARTIAL).unlink(missing_ok=True)


# --- one cell, and the processes ---


def _cell(folder: Path, seed: int, index: int, size: int, matrix: Phase, inclusion: Phase) -> tuple[int, str]:
    """Write the image of a cell; return its index and its row of cells.csv."""
    cell = draw(seed, index, size=size)
    fine = homogenize(cell.image, matrix=matrix, inclusion=inclusion, subdivisions=2)
    coarse = homogenize(cell.image, matrix=matrix, inclusion=inclusion, subdivisions=1)
    label = vector(fine)
    difference = np.abs(vector(coarse) - label)
    uncertainty = np.max(np.divide(difference, np.abs(label), out=np.zeros_like(label), where=label != 0))
    png = io.BytesIO()
    Image.fromarray(cell.image.astype(np.uint8) * np.uint8(255)).save(png, format="PNG", optimize=True)
    name = f"{index}_{cell.morphology}.png"
    write_atomically(folder / name, png.getvalue())
    numbers = [cell.image.mean(), *label, *vector(fine, COUPLINGS)]
    row = [str(index), name, cell.morphology, *(repr(float(number)) for number in numbers), f"{uncertainty:.3e}"]
    return index, ",".join(row) + "\n"


def _computed(jobs: list[tuple[Any, ...]], processes: int) -> Iterator[tuple[int, str]]:
    """The cells as they are finished, in any order."""
    if processes == 1:
        for job in jobs:
            yield _cell(*job)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_watch_parent)
    try:
        # The terminal sends Ctrl-C to all processes; only this one acts on it. The others inherit the mask of now.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_cell, *job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: waits for the cells under way, a second or two


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
