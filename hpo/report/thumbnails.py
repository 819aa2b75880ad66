"""Images of a data set for people: as greys or colours, and small enough for a page."""

import base64
import io

import numpy as np
from PIL import Image

from data_pipeline.dataset import Dataset

EDGE = 96  # pixels, the longer one of a thumbnail


def grey(data: Dataset, indices: np.ndarray) -> np.ndarray:
    """Return images (n, h, w) to look at, 0..1; the phases of one that has several are greys from black to white."""
    images = data.images[indices]
    if data.description.layout.levels != "phases" or images.shape[1] == 1:
        return np.asarray(images.mean(axis=1))
    return np.tensordot(images, np.linspace(0, 1, images.shape[1]), axes=([1], [0]))


def thumbnail(data: Dataset, index: int) -> str:
    """Return an image as a data URI: its colours, if it has three, else as `grey` returns it."""
    if data.description.layout.levels == "rgb" and data.images.shape[1] == 3:
        pixels = data.images[index].transpose(1, 2, 0)
    else:
        pixels = grey(data, np.array([index]))[0]
    picture = Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
    picture.thumbnail((EDGE, EDGE), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
