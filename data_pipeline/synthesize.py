"""Draws microstructures, labels them, and writes a folder of the form that `dataset.load` reads.

The folder holds the images `{r}_{morphology}.png`, the table `1-{count}_Cij_pbc.csv`, `dataset.toml` (name, unit,
phases, and how it was made) and the side file `cells.csv`: for each row its image, morphology and volume fraction, all
13 constants in GPa, and the label's uncertainty: the largest relative difference, among the nine components, between
the label (2 x 2 elements a pixel) and the same computed with one element a pixel.

A folder is unfinished until its table is there. Finished cells are kept in `cells.partial.csv`; the same call goes on.
"""

import fcntl
import io
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline import description
from data_pipeline.components import COMPONENTS, COUPLINGS, vector
from data_pipeline.cores import cores
from data_pipeline.description import Description
from data_pipeline.errors import DatasetError
from data_pipeline.files import write_atomically
from data_pipeline.homogenize import homogenize
from data_pipeline.morphology import SMALLEST_SIDE, draw
from data_pipeline.phase import Phase
from data_pipeline.pixels import LARGEST_TOTAL
from data_pipeline.png import LARGEST_SIDE, ImageProblem, read_png

RECIPE = 1  # raise it whenever the same seed gives other pixels or labels
UNIT = "GPa"
MATRIX = Phase(3.5, 0.35)  # epoxy
INCLUSION = Phase(70.0, 0.22)  # glass
LARGEST_CONTRAST = 50  # of Young's moduli: beyond it no pixel grid resolves the fields where features meet

_COLUMNS = ("row", "image", "morphology", "volume_fraction", *COMPONENTS, *COUPLINGS, "label_uncertainty")
_PARTIAL = "cells.partial.csv"
_UNFINISHED = re.compile(r"\.(dataset\.toml|cells\.csv|1-\d+_Cij_pbc\.csv|\d+_[a-z]+\.png)\.[0-9a-f]+\.tmp")

_log = logging.getLogger("data_pipeline")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What determines the cells of a data set."""

    count: int  # cells
    size: int  # pixels a side
    seed: int
    phases: dict[str, Phase]  # "matrix" and "inclusion"

    def to_dict(self) -> dict[str, int]:
        """Return what dataset.toml says of it besides the phases."""
        return {"recipe": RECIPE, "seed": self.seed, "count": self.count, "size": self.size}

    @property
    def table(self) -> str:
        """The name of the label table."""
        return f"1-{self.count}_Cij_pbc.csv"


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
    """Write a labelled data set into a folder; yield how many of its cells are finished, also before the first new one.

    Cell r depends on seed, r, size (pixels) and phases only; pixels are the same on every machine, labels except for
    rounding. Use `processes` processes (default: all cores). After an interruption the same call goes on. Raise
    DatasetError if the folder holds something else, cannot be written, or another process is making it.
    """
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
    recipe = Recipe(count=count, size=size, seed=seed, phases={"matrix": matrix, "inclusion": inclusion})
    return _make(Path(folder), recipe, processes or cores())


def _make(folder: Path, recipe: Recipe, processes: int) -> Iterator[int]:
    try:
        with _claimed(folder, recipe):
            rows = _finished(folder, recipe)
            yield len(rows)
            missing = [index for index in range(recipe.count) if index not in rows]
            if missing:
                with (folder / _PARTIAL).open("w", encoding="utf-8") as partial:
                    partial.writelines(rows.values())
                    partial.flush()
                    for index, row in _computed(folder, recipe, missing, min(processes, len(missing))):
                        rows[index] = row
                        partial.write(row)  # after the image is written
                        partial.flush()
                        yield len(rows)
            if missing or not (folder / recipe.table).exists():
                _finish(folder, recipe, [rows[index] for index in range(recipe.count)])
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
def _claimed(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the folder for this process, and make sure that it is empty or of this recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends in any way
        except BlockingIOError:
            raise DatasetError(f"{folder}: another process is making this data set. Wait for it, or end it.") from None
        path = folder / description.FILE
        # left by a process that was killed while it wrote
        unfinished = {entry for entry in folder.iterdir() if _UNFINISHED.fullmatch(entry.name) and not entry.is_dir()}
        if path.exists():
            _check_recipe(folder, recipe)
        elif set(folder.iterdir()) - {entry for entry in unfinished if entry.name.startswith(f".{path.name}.")}:
            raise DatasetError(f"{folder}: expected an empty folder, found other files in it. Choose another folder.")
        else:
            name = description.name_of(folder)
            content = Description(name=name, unit=UNIT, phases=recipe.phases, recipe=recipe.to_dict()).to_toml()
            write_atomically(path, content.encode())
        for entry in unfinished:
            entry.unlink()
        yield
    finally:
        os.close(descriptor)


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    stored = description.read(folder, [])
    if (stored.recipe, stored.phases) != (recipe.to_dict(), recipe.phases):
        other = f"one made with {stored.recipe}, phases {stored.phases}" if stored.recipe else "something else"
        raise DatasetError(
            f"{folder}: expected an empty folder or one made with {recipe.to_dict()}, phases {recipe.phases}, "
            f"found {other}. Choose another folder."
        )


def _finished(folder: Path, recipe: Recipe) -> dict[int, str]:
    """Return the rows, as lines, of the cells that are in the folder with their image."""
    rows: dict[int, str] = {}
    for name in (_PARTIAL, "cells.csv"):
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            fields = line.split(",")
            # A line without its end was being written when the process was killed.
            if line.endswith("\n") and len(fields) == len(_COLUMNS) and fields[0].isdigit():
                index = int(fields[0])
                image = f"{index}_{fields[2]}.png"
                if index < recipe.count and fields[1] == image and _is_image(folder / image, fields[3], recipe.size):
                    rows[index] = line
    if len(rows) < recipe.count:
        (folder / recipe.table).unlink(missing_ok=True)  # the table says that a folder is finished
    return rows


def _is_image(path: Path, fraction: str, size: int) -> bool:
    """Return whether the file is an image of that size and volume fraction."""
    try:
        pixels, mode, actual = read_png(path)
        return mode == "L" and actual == (size, size) and repr(float((pixels == 255).mean())) == fraction
    except (ImageProblem, OSError):
        return False


def _finish(folder: Path, recipe: Recipe, rows: list[str]) -> None:
    write_atomically(folder / "cells.csv", (",".join(_COLUMNS) + "\n" + "".join(rows)).encode())
    first = _COLUMNS.index(COMPONENTS[0])
    labels = [row.split(",")[first : first + len(COMPONENTS)] for row in rows]
    lines = [",".join([str(number), *label]) + "\n" for number, label in enumerate(labels, start=1)]
    write_atomically(folder / recipe.table, "".join(lines).encode())
    (folder / _PARTIAL).unlink(missing_ok=True)


# --- one cell, and the processes ---


def _cell(folder: Path, recipe: Recipe, index: int) -> tuple[int, str]:
    """Write the image of a cell; return its index and its row of cells.csv."""
    cell = draw(recipe.seed, index, size=recipe.size)
    fine = homogenize(cell.image, **recipe.phases, subdivisions=2)
    coarse = homogenize(cell.image, **recipe.phases, subdivisions=1)
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


def _computed(folder: Path, recipe: Recipe, indices: list[int], processes: int) -> Iterator[tuple[int, str]]:
    """Yield the cells when they are finished, in any order."""
    if processes == 1:
        yield from (_cell(folder, recipe, index) for index in indices)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_watch_parent)
    try:
        # The terminal sends Ctrl-C to all processes; only this one acts on it. The others inherit this mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_cell, folder, recipe, index) for index in indices]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C: waits for the cells being computed, a second or two


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
