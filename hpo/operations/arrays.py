"""Arrays and frames of a notebook as a folder of data, which all of hpo reads."""

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import dataset, dataset_keys, description
from data_pipeline.description import FILE, Description
from data_pipeline.errors import DatasetError
from data_pipeline.files import write_atomically
from data_pipeline.messages import near_miss
from data_pipeline.phase import Phase
from hpo.errors import ModelError

if TYPE_CHECKING:
    import pandas

IMAGES, TABLE = "images.npy", "table.csv"
OWN = ("images", "table", "match", "targets", "inputs", "decimal", "shape")  # keys that follow from the arguments


def write_data(
    folder: str | Path,
    images: Any,
    targets: Any,
    *,
    inputs: Any = None,
    columns: Any = None,
    name: str | None = None,
    unit: str | None = None,
    phases: Mapping[str, Phase] | None = None,
    **keys: Any,
) -> Path:
    """Write images and labels as a folder of data, and return it.

    `images`: an array (n, h, w) or (n, h, w, c), or n images as arrays or PIL images of one size. `targets`: n rows, as
    a frame, or numbers by name; `inputs` likewise, the numbers beside each image; `columns` likewise, for the keys
    `group` and `split`. `unit`: of all targets. `phases`: "matrix" and "inclusion". `keys`: those of dataset.toml, such
    as `levels`, `symmetry` or `group`.

    A folder that holds the same already stays as it is. Raise DatasetError if the arguments do not fit together, if the
    folder holds something else, or if hpo does not understand what was written: then nothing stays behind.
    """
    folder, pixels = Path(folder), stack(images)
    table, beside = _table(len(pixels), targets, inputs, columns)
    content = {"images": IMAGES, "table": TABLE, "match": "row", "targets": list(frame(targets, "targets"))}
    content |= {"axes": "nhwc"[: pixels.ndim]} | ({"inputs": beside} if beside else {}) | _checked(keys)
    problems: list[str] = []
    layout = dataset_keys.parse(content, "dataset", problems)
    if problems:
        raise DatasetError(problems[0])
    said = Description(
        name=name or description.name_of(folder),
        unit=unit or description.UNKNOWN_UNIT,
        phases=dict(phases) if phases else None,
        layout=layout,
    )
    files = {IMAGES: _bytes(pixels), TABLE: table.to_csv(index=False).encode(), FILE: said.to_toml().encode()}
    _write(folder, files)
    return folder


def _table(count: int, targets: Any, inputs: Any, columns: Any) -> "tuple[pandas.DataFrame, list[str]]":
    """Return all columns, with `count` rows, and the names of the inputs."""
    table, beside = frame(targets, "targets"), [] if inputs is None else list(map(str, frame(inputs, "inputs")))
    for what, values in (("targets", targets), ("inputs", inputs), ("columns", columns)):
        rows = table.iloc[:, :0] if values is None else frame(values, what)
        if len(rows) != count:
            raise DatasetError(f"{what}: expected a row for each of the {count} images, found {len(rows)} rows.")
        if what != "columns" and (texts := [name for name in rows if rows[name].dtype.kind not in "buif"]):
            raise DatasetError(f"{what}: {texts[0]}: expected numbers, found {rows[texts[0]].iloc[0]!r}.")
        if what != "targets" and (both := [name for name in rows if name in table]):
            raise DatasetError(f"{both[0]} is there twice: give one of the columns another name.")
        table = table if what == "targets" else table.join(rows)
    return table, beside


def _checked(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of dataset.toml. Raise DatasetError for one that is none, or that follows from other arguments."""
    valid = [key for key in dataset_keys.KEYS if key not in OWN]
    for key in keys:
        if key not in valid:
            raise DatasetError(f"No key of data is called {key}. There are: {', '.join(valid)}.{near_miss(key, valid)}")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def stack(images: Any) -> np.ndarray:
    """Return images as one array, a truth value as 0 or 1. Raise DatasetError if they differ in size."""
    if not isinstance(images, np.ndarray):
        parts = [np.asarray(image) for image in images]
        for number, part in enumerate(parts):
            if part.shape != parts[0].shape:
                raise DatasetError(f"Image {number} is of the shape {part.shape}, the first one of {parts[0].shape}.")
        images = np.stack(parts) if parts else np.empty(0)
    if images.ndim not in (3, 4) or images.dtype.kind not in "buif":
        raise DatasetError(
            f"images: expected numbers of the shape (n, h, w) or (n, h, w, c), found {images.dtype} of {images.shape}."
        )
    return images.astype(np.uint8) if images.dtype.kind == "b" else images


def frame(values: Any, what: str) -> "pandas.DataFrame":
    """Return a frame of numbers with a row for each image."""
    import pandas

    try:
        if isinstance(values, pandas.Series):
            values = values.to_frame(values.name or what.removesuffix("s"))
        rows = pandas.DataFrame(values).reset_index(drop=True)
    except ValueError as error:
        raise DatasetError(f"{what}: expected a frame, or numbers by name, all of one length: {error}") from None
    if not all(isinstance(name, str) for name in rows.columns):
        raise DatasetError(f"{what}: expected columns with names, as in {{'E': [210.0, …]}}, found an array.")
    return rows


def _bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, dataset.toml last, unless they are there already. Raise DatasetError; then no file stays."""
    if (folder / FILE).exists() or _strangers(folder, files):
        if all(
            (folder / file).is_file() and (folder / file).read_bytes() == content for file, content in files.items()
        ):
            return
        raise DatasetError(f"{folder} holds something else already. Give another folder, or remove this one.")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_atomically(folder / file, content)
        dataset.the_dataset(dataset.understand(folder))
    except BaseException:
        for file in files:
            (folder / file).unlink(missing_ok=True)
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _strangers(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Return whether a folder holds what `_write` did not write: a call that was killed leaves its own files."""
    return folder.exists() and any(path.name not in files for path in folder.iterdir())


def write_pictures(folder: Path, images: np.ndarray) -> list[Path]:
    """Write grey images (n, h, w) of whole numbers 0..255 as PNG files. Raise ModelError for others."""
    from PIL import Image

    if images.ndim != 3 or images.dtype.kind not in "ui" or images.min(initial=0) < 0 or images.max(initial=0) > 255:
        low, high = (images.min(), images.max()) if images.size else (0, 0)
        raise ModelError(
            "images: expected grey values of the shape (n, h, w), whole numbers 0..255 as in the PNG files that the "
            f"model was trained on, found {images.dtype} of {images.shape} from {low} to {high}."
        )
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.astype(np.uint8)).save(path)
    return paths
