"""Further labelled images for a model: read as those of training, refused if they are of another kind."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import dataset as data_sets
from data_pipeline.dataset import Dataset
from data_pipeline.dataset_keys import Layout
from data_pipeline.description import UNKNOWN_UNIT
from data_pipeline.errors import DatasetError
from data_pipeline.target_transforms import undo
from hpo.errors import ModelError
from hpo.operations.predict import check_phases, layout_of
from hpo.text import counted, one_line
from hpo.worker.trained_on import TrainedOn

if TYPE_CHECKING:
    from models.bundle import Description

COURSE = Layout(levels="grey", range=(0.0, 255.0))  # how a model of the course's form reads its pixels
DARK = 8.0  # times darker than training: another scale is 255 times off
SLACK = 1e-6  # of pixels and volume fractions, by which they may lie outside of a range


def labelled(spec: "Description", title: str, folder: Path, image_size: int | None) -> Dataset:
    """Return the labelled images of a folder, read as those of training, with the model's targets in its order.

    Raise DatasetError or ModelError if they are of another kind, naming the difference and what the model takes.
    """
    from models import bundle
    from models.specs import SpecError

    layout = layout_of(spec) or COURSE
    originals = undo(np.zeros((1, len(spec.target_names))), spec.target_names, layout.transform or {})[1]
    like = replace(layout, targets=originals, inputs=spec.input_names or None)
    takes = f"{title} takes {_kind(spec, layout, originals)}."
    try:
        data = data_sets.load(folder, image_size=image_size, like=like)
    except DatasetError as error:
        raise DatasetError(f"{error}\n  {takes}") from None
    if missing := [name for name in spec.target_names if name not in data.target_names]:
        raise ModelError(
            f"{folder}: expected the targets {', '.join(spec.target_names)}, found {', '.join(data.target_names)}: "
            f"{', '.join(missing)} missing. {takes} Add the labels, or evaluate a model of these targets."
        )
    columns = [data.target_names.index(name) for name in spec.target_names]
    data = replace(data, targets=data.targets[:, columns], target_names=spec.target_names, symmetries={})
    data = _in_units(data, spec, layout, takes)
    try:
        bundle.check_shape(spec, data.images.shape[1:], where=str(folder))
    except SpecError as error:
        raise ModelError(f"{error} {takes} --image-size resizes to a square.") from None
    highest = float(data.images.max())
    if layout.levels != "phases" and highest < spec.levels[1] / DARK:
        raise ModelError(
            f"{folder}: expected pixels up to about {spec.levels[1]:g} ({layout.pixels()}), as in training, found at "
            f"most {highest:g}. {takes} Write the pixels on that scale; 0 and 1 where 0 and 255 are meant?"
        )
    for name, image in zip(data.names, data.images, strict=True):
        check_phases(spec, f"{folder}: {one_line(name)}", image)
    return data


def _kind(spec: "Description", layout: Layout, targets: tuple[str, ...]) -> str:
    """Return in words what a model is trained on."""
    channels, height, width = spec.image_shape
    units = {name: (layout.units or {}).get(name, spec.unit) for name in targets}
    beside = f" the inputs {', '.join(spec.input_names)} and" if spec.input_names else ""
    labels = ", ".join(f"{name} in {unit}" for name, unit in units.items())
    images = f"images of {height} x {width} pixels, {counted(channels, 'channel')}, {layout.pixels()}"
    return f"{images}, with{beside} the targets {labels}"


def _in_units(data: Dataset, spec: "Description", layout: Layout, takes: str) -> Dataset:
    """Return the data in the units of the model. Raise ModelError if they state others."""
    own = data.description
    stated = replace(own, unit=spec.unit, layout=replace(own.layout, units=layout.units))
    trained = replace(data, description=stated)
    pairs = [(name, trained.units[name], data.units[name]) for name in data.target_names]
    pairs += [(name, unit, data.input_units.get(name, unit)) for name, unit in trained.input_units.items()]
    comparable = [pair for pair in pairs if not any(unit.endswith(UNKNOWN_UNIT) for unit in pair[1:])]
    if wrong := [f"{name} in {expected}, found {unit}" for name, expected, unit in comparable if expected != unit]:
        raise ModelError(
            f"The labels of {data.name} have other units than those the model was trained on: expected "
            f"{'; '.join(wrong)}. {takes} Convert the labels, or correct the unit in the table or dataset.toml."
        )
    return trained if not spec.unit.endswith(UNKNOWN_UNIT) else data


def distance(spec: "Description", facts: TrainedOn | None, data: Dataset) -> list[dict[str, Any]]:
    """Return a record for each property of the images: its range in training (None if unknown) and here, and how many
    images are outside of it."""
    size, here = spec.image_shape[1:], data.images.shape[2:]
    records: list[dict[str, Any]] = [
        {
            "what": "height x width",
            "training": " x ".join(map(str, size)),
            "here": " x ".join(map(str, here)),
            "outside": len(data.images) if size != here else 0,
        }
    ]
    by_image = data.images.reshape(len(data.images), -1)
    records.append(_range("pixels, 0 to 1", spec.levels, by_image.min(axis=1), by_image.max(axis=1)))
    for channel, (name, values) in enumerate(data.fractions().items()):
        records.append(_range(name, facts.fractions[channel] if facts else None, values, values))
    beside = np.zeros((0, 0)) if data.inputs is None else data.inputs
    for name, ends, values in zip(spec.input_names, spec.ranges, beside.T, strict=True):
        records.append(_range(f"input {name}", ends, values, values))
    return records


def _range(what: str, ends: tuple[float, float] | None, lowest: np.ndarray, highest: np.ndarray) -> dict[str, Any]:
    def text(low: float, high: float) -> str:
        return f"{low:.4g} to {high:.4g}"

    here = text(float(lowest.min()), float(highest.max()))
    if ends is None:
        return {"what": what, "training": None, "here": here, "outside": None}
    slack = SLACK * max(1.0, *map(abs, ends))
    outside = (lowest < ends[0] - slack) | (highest > ends[1] + slack)
    return {"what": what, "training": text(*ends), "here": here, "outside": int(outside.sum())}
