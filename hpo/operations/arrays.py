"""Arrays and frames of a notebook as files, which all of hpo reads: a folder of data, or images to predict."""

import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_pipeline import dataset, dataset_keys, description
from data_pipeline.description import FILE, Description
from data_pipeline.errors import DatasetError
from data_pipeline.files import write_atomically
from data_pipeline.formats.limits import FormatProblem
from data_pipeline.formats.pictures import picture
from data_pipeline.messages import near_miss
from data_pipeline.phase import Phase
from hpo.errors import ModelError, UserError
from hpo.operations.predict import predict

if TYPE_CHECKING:
    import pandas

IMAGES, TABLE = "images.npy", "table.csv"
NAMES = "image"  # the column of the images' names or numbers
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
    `group` and `split`. Row i belongs to image i; an index that numbers the rows in another order is refused. `unit`:
    of all targets; a column may name its own, as "E [GPa]". `phases`: "matrix" and "inclusion". `keys`: those of
    dataset.toml, such as `levels`, `symmetry` or `group`.

    A folder that holds the same already stays as it is. Raise DatasetError if the arguments do not fit together, if the
    folder holds something else, or if hpo does not understand what was written: then nothing stays behind.
    """
    folder, pixels = Path(folder), stack(images)
    pixels = pixels.astype(np.uint8) if pixels.dtype == bool else pixels
    table, names, beside = _table(len(pixels), targets, inputs, columns)
    content = {"images": IMAGES, "table": TABLE, "match": "row", "targets": names}
    content |= {"axes": "nhwc"[: pixels.ndim]} | ({"inputs": beside} if beside else {}) | _checked(keys)
    problems: list[str] = []
    layout = dataset_keys.parse(content, "dataset", problems)
    if problems:
        raise DatasetError(problems[0])
    if phases and not (
        phases.keys() == {"matrix", "inclusion"} and all(isinstance(phases[key], Phase) for key in phases)
    ):
        raise DatasetError(f"phases: expected a Phase each for matrix and inclusion, found {dict(phases)!r:.80}.")
    if unit is not None and not isinstance(unit, str):
        raise DatasetError(f'unit: expected one text, such as "GPa", found {unit!r:.80}. For several: units = {{…}}.')
    said = Description(
        name=name or description.name_of(folder),
        unit=unit or description.UNKNOWN_UNIT,
        phases=dict(phases) if phases else None,
        layout=layout,
    )
    files = {IMAGES: _bytes(pixels), TABLE: as_csv(table, range(len(table))), FILE: said.to_toml().encode()}
    _write(folder, files)
    return folder


def _table(count: int, targets: Any, inputs: Any, columns: Any) -> "tuple[pandas.DataFrame, list[str], list[str]]":
    """Return all columns, with `count` rows, and the names of the targets and inputs."""
    given = {"targets": targets, "inputs": inputs, "columns": columns}
    parts = {what: frame(values, what) for what, values in given.items() if values is not None or what == "targets"}
    table, names = parts["targets"].iloc[:, :0], {what: list(map(str, rows)) for what, rows in parts.items()}
    for what, rows in parts.items():
        if len(rows) != count:
            raise DatasetError(f"{what}: expected a row for each of the {count} images, found {len(rows)} rows.")
        if what != "columns" and (texts := [name for name in rows if rows[name].dtype.kind not in "uif"]):
            raise DatasetError(f"{what}: {texts[0]}: expected numbers, found {rows[texts[0]].iloc[0]!r}.")
        if both := [name for name in rows if name in table]:
            raise DatasetError(f"{both[0]} is there twice: give one of the columns another name.")
        table = table.join(rows)
    return table, names["targets"], names.get("inputs", [])


def _checked(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of dataset.toml. Raise DatasetError for one that is none, or that follows from other arguments."""
    valid = [key for key in dataset_keys.KEYS if key not in OWN]
    for key in keys:
        if key not in valid:
            raise DatasetError(f"No key of data is called {key}. There are: {', '.join(valid)}.{near_miss(key, valid)}")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def stack(images: Any) -> np.ndarray:
    """Return images as one array (n, h, w) or (n, h, w, c); pictures as files are read: without transparency.

    Raise DatasetError if they differ in size or type.
    """
    if not isinstance(images, np.ndarray):
        try:
            parts = [_pixels(image) for image in images]
        except TypeError:
            raise DatasetError(
                f"images: expected an array, or several images, found {type(images).__name__}."
            ) from None
        if len({part.ndim for part in parts}) == 2:  # grey pictures among coloured ones
            parts = [np.repeat(part[..., None], 3, axis=2) if part.ndim == 2 else part for part in parts]
        for number, part in enumerate(parts):
            if part.shape != parts[0].shape:
                raise DatasetError(f"Image {number} is of the shape {part.shape}, the first one of {parts[0].shape}.")
            if part.dtype != parts[0].dtype and {part.dtype.kind, parts[0].dtype.kind} != {"f"}:
                raise DatasetError(
                    f"Image {number} has numbers of {part.dtype}, the first one of {parts[0].dtype}: give all in one "
                    "type, on one scale."
                )
        images = np.stack(parts) if parts else np.empty(0)
    if images.ndim not in (3, 4) or images.dtype.kind not in "buif":
        raise DatasetError(
            f"images: expected numbers of the shape (n, h, w) or (n, h, w, c), found {images.dtype} of {images.shape}."
        )
    return images


def _pixels(image: Any) -> np.ndarray:
    if not isinstance(image, Image.Image):
        return np.asarray(image)
    try:
        still = picture(image.copy())
    except FormatProblem as problem:
        raise DatasetError(f"images: {problem}") from None
    return still.pixels.astype(bool) if still.is_bilevel else still.pixels


def frame(values: Any, what: str) -> "pandas.DataFrame":
    """Return a frame with a row for each image, a truth value as 0 or 1."""
    import pandas

    try:
        if isinstance(values, pandas.Series):
            values = values.to_frame(values.name or what.removesuffix("s"))
        rows = pandas.DataFrame(values)
    except ValueError as error:
        raise DatasetError(f"{what}: expected a frame, or numbers by name, all of one length: {error}") from None
    if odd := [name for name in rows.columns if not isinstance(name, str)]:
        raise DatasetError(f"{what}: expected columns with names, as in {{'E': [210.0, …]}}, found {odd[0]!r}.")
    if not rows.columns.is_unique:
        twice = rows.columns[rows.columns.duplicated()][0]
        raise DatasetError(f"{what}: {twice} is there twice: give one of the columns another name.")
    numbers = pandas.RangeIndex(len(rows))
    if not rows.index.equals(numbers) and rows.index.sort_values().equals(numbers):
        raise DatasetError(
            f"{what}: row i belongs to image i, but the index numbers the rows in another order, from "
            f"{rows.index[0]}. Sort them by .sort_index(), or keep them by .reset_index(drop=True)."
        )
    rows = rows.reset_index(drop=True)
    return rows.astype({name: np.uint8 for name in rows if rows[name].dtype == bool})


def as_csv(rows: "pandas.DataFrame", images: Iterable[object]) -> bytes:
    """Return a table; its first column names the images, so that commas separate columns also if there is one alone."""
    rows = rows.copy()
    if NAMES not in rows:
        rows.insert(0, NAMES, list(images))
    return rows.to_csv(index=False, na_rep="NaN").encode()


def _bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, dataset.toml last, unless they are there already. Raise DatasetError; then no file stays."""
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise DatasetError(f"{folder}: expected a folder, or none of this name, found a file on the way.")
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
    """Write grey images (n, h, w) of truth values or whole numbers 0..255 as PNG files. Raise ModelError for others."""
    if images.dtype == bool:
        images = images * np.uint8(255)
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


def as_trained(images: np.ndarray, layout: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return images (n, h, w) or (n, h, w, c), which may lie as in the training already, as those lay.

    A truth value is as black and white there. `size` is (h, w) of the training.
    """
    if images.dtype == bool:
        numbers = {number for colour in layout.get("colours") or () for number in np.atleast_1d(colour).tolist()}
        images = images * np.uint8(255 if 255 in {*(layout.get("range") or ()), *numbers} else 1)
    axes = layout.get("axes") or ""
    lies_so = axes == "nchw" and images.shape[2:] == size != images.shape[1:3]
    if set(axes) == set("nhwc"[: images.ndim]) and not lies_so:
        images = images.transpose(["nhwc".index(letter) for letter in axes])
    return images


def predict_arrays(
    folder: Path, images: Any, inputs: Any = None, *, trust_code: Sequence[str] = ()
) -> "pandas.DataFrame":
    """Return a row for each image and a column for each target; units are in `attrs["units"]`.

    `folder` of a model. `images`: an array (h, w), (n, h, w) or (n, h, w, c) with pixels as in training, PIL images, or
    paths. `inputs`: a frame, or numbers by name, with a row for each image in their order; of paths the path of a
    table. Raise ModelError as `predict`.
    """
    if isinstance(images, Image.Image):
        images = [images]
    elif isinstance(images, Iterable) and not isinstance(images, (str, np.ndarray)):
        images = list(images)
    if (paths := _paths(images)) is not None:
        if inputs is not None and not isinstance(inputs, (str, Path)):
            raise UserError("inputs: expected the path of a table, as images are given by paths. Or give arrays.")
        return predict(folder, paths, None if inputs is None else Path(inputs), trust_code=trust_code)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            paths, table = _write_images(Path(temporary), images, inputs, folder)
            rows = predict(folder, paths, table, trust_code=trust_code)
        except ModelError as error:  # its files are temporary
            raise ModelError(str(error).replace(f"{temporary}/", "")) from None
    rows["image"] = range(len(rows))
    return rows


def _paths(images: Any) -> list[Path] | None:
    """Return one path or several as a list; None if these are no paths."""
    if isinstance(images, (str, Path)):
        return [Path(images)]
    if isinstance(images, list) and images and all(isinstance(image, (str, Path)) for image in images):
        return [Path(image) for image in images]
    return None


def _write_images(folder: Path, images: Any, inputs: Any, model: Path) -> tuple[list[Path], Path | None]:
    """Write images and inputs as files that `predict` reads as those of the model's training."""
    pixels = stack([images] if getattr(images, "ndim", 0) == 2 else images)
    spec = json.loads((model / "spec.json").read_text(encoding="utf-8"))
    layout = data.get("layout") if isinstance(data := spec.get("data"), dict) else None
    if isinstance(layout, dict):
        paths = [folder / IMAGES]
        pixels = as_trained(pixels, layout, tuple(spec["image_shape"][1:]))
        np.save(paths[0], pixels, allow_pickle=False)
        names = [str(paths[0])] if len(pixels) == 1 else [f"{paths[0]}[{index}]" for index in range(len(pixels))]
    else:
        paths = write_pictures(folder, pixels)
        names = list(map(str, paths))
    if inputs is None:
        return paths, None
    rows = frame(inputs, "inputs")
    if len(rows) != len(names):
        raise UserError(f"inputs: expected a row for each of the {len(names)} images, found {len(rows)} rows.")
    table = folder / TABLE
    table.write_bytes(as_csv(rows.drop(columns=NAMES, errors="ignore"), names))
    return paths, table
