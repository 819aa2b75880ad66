"""Predictions for image files by a downloaded model, from weights.safetensors and spec.json alone: no pickle."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from data_pipeline.images import LARGEST_FILE, ImageProblem, read_png
from hpo.errors import ModelError
from hpo.text import utf8

if TYPE_CHECKING:
    from models.bundle import Description


def predict(folder: Path, image_paths: Sequence[Path]) -> pd.DataFrame:
    """One row an image: `image` (its path), then one column per target; the unit is in `frame.attrs["unit"]`.

    Raises ModelError: the folder holds no usable model; an image cannot be read, has the wrong size, or has other grey
    values than 0 and 255 where the model knows the mechanics of two phases.
    """
    from models import bundle, regressor  # torch: 4 s, so not for those who only ask for help
    from models.levels import GreyValueError
    from models.specs import SpecError

    try:
        model, spec = bundle.load(folder)
    except SpecError as error:
        raise ModelError(str(error)) from error
    channels = spec.image_shape[0]
    if channels != 1:
        raise ModelError(f"{folder}: expected a model of images with one grey channel, found {channels} channels.")
    if "image" in spec.target_names:
        raise ModelError(f"{folder}: a target is called image, as the column of the images' paths. Train it anew.")
    images = [_read(Path(path), spec) for path in image_paths]
    rows = np.zeros((len(images), len(spec.target_names)))
    for shape in {image.shape for image in images}:
        alike = [number for number, image in enumerate(images) if image.shape == shape]
        try:
            rows[alike] = regressor.predict(model, np.stack([images[number][None] for number in alike]))
        except GreyValueError as error:
            raise ModelError(f"{', '.join(str(image_paths[number]) for number in alike[:3])}: {error}") from None
    frame = pd.DataFrame(rows, columns=list(spec.target_names))
    frame.insert(0, "image", [utf8(str(path)) for path in image_paths])
    frame.attrs["unit"] = spec.unit
    return frame


def _read(path: Path, spec: "Description") -> np.ndarray:
    """Grey values 0..1, (height, width). The size is checked before the pixels are decoded."""
    from models import bundle, specs
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
    if specs.physical(spec.model) and (between := ~np.isin(grey, (0, 255))).any():
        raise ModelError(
            f"{path}: expected pixels of 0 and 255 alone, found {between.sum()} of {grey.size} in between. The model's "
            "last layer takes the mean grey value for the volume fraction of two phases: threshold the image first."
        )
    return grey.astype(np.float32) / 255
