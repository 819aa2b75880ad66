"""Predictions for image files by a downloaded model, from weights.safetensors and spec.json alone: no pickle."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from data_pipeline.dataset_keys import Layout, parse
from data_pipeline.formats.limits import FormatProblem
from data_pipeline.inputs import read_inputs
from data_pipeline.pixels import PixelProblem
from data_pipeline.png import LARGEST_FILE, ImageProblem, read_png
from data_pipeline.target_transforms import undo
from data_pipeline.understanding import read_like
from hpo.errors import ModelError
from hpo.operations.trust import trusting
from hpo.text import utf8

if TYPE_CHECKING:
    from models.bundle import Description
    from models.regressor import Regressor


def predict(
    folder: Path, image_paths: Sequence[Path], inputs: Path | None = None, *, trust_code: Sequence[str] = ()
) -> pd.DataFrame:
    """One row an image: `image` (its path), then one column per target; their unit is in `frame.attrs["unit"]`,
    and that of each in `frame.attrs["units"]`.

    The images are read as those in training: by the same range, levels and colours. A path may name an array of many
    images, as `test.npz:images`. `inputs` is a table with the numbers that the model takes beside an image: a column
    names the images, others have the names of the inputs. `trust_code`: SHA-256 of code of the model's author that may
    run.

    Raises ModelError: the folder holds no usable model; an image cannot be read, has the wrong size, or has other grey
    values than 0 and 255 where the model knows the mechanics of two phases; an input is missing or far from training.
    """
    with trusting(trust_code):
        return _predict(folder, image_paths, inputs)


def _predict(folder: Path, image_paths: Sequence[Path], inputs: Path | None) -> pd.DataFrame:
    from models import bundle  # torch: 4 s, so not for those who only ask for help
    from models.specs import SpecError

    try:
        model, spec = bundle.load(folder)
    except SpecError as error:
        raise ModelError(str(error)) from error
    if "image" in spec.target_names:
        raise ModelError(
            f"{folder}: a target is called image, as the column of the images' paths. Train it again with another name."
        )
    layout = layout_of(spec)
    named = [pair for path in image_paths for pair in _images(Path(path), spec, layout)]
    names, images = [name for name, _ in named], [image for _, image in named]
    numbers = _inputs(inputs, names, spec, (layout.units if layout else None) or {})
    rows = np.zeros((len(images), len(spec.target_names)))
    for shape in {image.shape for image in images}:
        alike = [number for number, image in enumerate(images) if image.shape == shape]
        stack, beside = np.stack([images[number] for number in alike]), None if numbers is None else numbers[alike]
        rows[alike] = predicted(model, stack, beside, [names[number] for number in alike])
    rows, targets = undo(rows, spec.target_names, (layout.transform if layout else None) or {})
    frame = pd.DataFrame(rows, columns=list(targets))
    frame.insert(0, "image", [utf8(name) for name in names])
    units = (layout.units if layout else None) or {}
    shared = {units.get(name, spec.unit) for name in targets}
    frame.attrs["units"] = {name: units.get(name, spec.unit) for name in targets}
    stated = {name: unit for name, unit in units.items() if name in targets}
    frame.attrs["unit"] = shared.pop() if len(shared) == 1 else ", ".join(map(": ".join, stated.items()))
    return frame


def predicted(model: "Regressor", images: np.ndarray, numbers: np.ndarray | None, names: Sequence[str]) -> np.ndarray:
    """Return the targets (n, k). Raise ModelError, naming the image, if the model refuses one or its inputs."""
    from models import user
    from models.levels import GreyValueError
    from models.regressor import predict
    from models.scalars import InputError

    try:
        return predict(model, images, numbers)
    except (GreyValueError, InputError) as error:
        for index, name in enumerate(names if len(names) > 1 else []):
            one = slice(index, index + 1)
            predicted(model, images[one], None if numbers is None else numbers[one], [name])
        raise ModelError(f"{names[0]}: {error}") from None
    except Exception as error:
        if fault := user.fault(error):
            raise ModelError(f"The model's own code fails: {fault}") from None
        raise


def layout_of(spec: "Description") -> Layout | None:
    """Return how the images that the model was trained on were read; None for PNGs of the course's form."""
    facts = spec.extra.get("data")
    content = facts.get("layout") if isinstance(facts, dict) else None
    problems: list[str] = []
    layout = parse(content, "spec.json", problems) if isinstance(content, dict) else None
    if problems:
        raise ModelError(problems[0])
    return layout


def _inputs(
    path: Path | None, images: Sequence[str], spec: "Description", units: Mapping[str, str]
) -> np.ndarray | None:
    """Return the inputs (n, m) of n images; None if the model takes none. Raise ModelError if they are missing."""
    if path is None and spec.input_names:
        raise ModelError(
            f"This model takes {', '.join(spec.input_names)} beside each image: give a table with a column that names "
            f"the images, and {'columns' if len(spec.input_names) > 1 else 'a column'} of that name (--inputs FILE)."
        )
    if path is None:
        return None
    if not spec.input_names:
        raise ModelError(f"{path}: this model takes images alone. Leave the table of inputs out.")
    try:
        return read_inputs(Path(path), images, spec.input_names, units)
    except FormatProblem as problem:
        raise ModelError(f"{path}: {problem}") from None


def _images(path: Path, spec: "Description", layout: Layout | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the images of a file, or of an array in it (FILE:KEY), as (channels, height, width), with their names."""
    from models import bundle
    from models.specs import SpecError

    if layout is None:
        named = [(str(path), _read_png(path, spec))]
    else:
        try:
            named = read_like(path, layout)
        except (FormatProblem, PixelProblem) as problem:
            raise ModelError(f"{path}: {problem}") from None
    for name, image in named:
        try:
            bundle.check_shape(spec, image.shape, where=name)
        except SpecError as error:
            raise ModelError(str(error)) from None
        check_phases(spec, name, image)
        yield name, image


def check_phases(spec: "Description", name: str, image: np.ndarray) -> None:
    """Raise ModelError if a model that knows the mechanics of two phases cannot take the image."""
    from models import specs

    if specs.physical(spec.model) and (between := ~np.isin(image, (0, 1))).any():
        raise ModelError(
            f"{name}: expected pixels of 0 and 255 alone, found {between.sum()} of {image.size} in between. The "
            "model's last layer takes the mean grey value for the volume fraction of two phases: threshold the "
            "image first."
        )


def _read_png(path: Path, spec: "Description") -> np.ndarray:
    """Grey values 0..1, (1, height, width). The size is checked before the pixels are decoded."""
    from models import bundle
    from models.specs import SpecError

    if path.exists() and not path.is_file():  # a pipe would block, a device never end
        raise ModelError(f"{path}: expected a PNG file, found a folder, pipe or device.")
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ImageProblem(f"expected at most {LARGEST_FILE // 2**20} MiB, found {size / 2**20:.0f} MiB.")
        with Image.open(path, formats=["PNG"]) as image:  # as for training; other decoders can start other programs
            bundle.check_shape(spec, (1, image.height, image.width), where=str(path))
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise ModelError(f"{path}: expected 8 bits a channel, found mode {image.mode}. Convert it to 8 bits.")
        grey, _, _ = read_png(path)  # Pillow alone leaves pixels black when a small file ends early
    except ModelError:
        raise
    except SpecError as error:
        raise ModelError(str(error)) from None
    except ImageProblem as problem:
        raise ModelError(f"{path}: {problem}") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise ModelError(f"{path}: cannot be read as an image ({error}).") from error
    return grey.astype(np.float32)[None] / 255
