"""A folder of images and labels -> Dataset.

A folder of the source study's course is read by `data_pipeline.course`, every other one by
`data_pipeline.understanding`. `dataset.toml` in it says what is not to be guessed, see `data_pipeline.description`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import course, description, understanding
from data_pipeline.components import COMPONENTS, SYMMETRIES
from data_pipeline.dataset_keys import UNSTATED, Layout
from data_pipeline.description import UNKNOWN_UNIT, Description
from data_pipeline.errors import DatasetError
from data_pipeline.findings import listed
from data_pipeline.lineage import Earlier, line, places, relabelled
from data_pipeline.messages import counted
from data_pipeline.parts import SplitProblem, extending
from data_pipeline.phase import Phase
from data_pipeline.png import LARGEST_SIDE
from data_pipeline.sources import Notes
from data_pipeline.split import Split, split
from data_pipeline.target_transforms import scaled_name, undo

DEFAULT = Path(__file__).parent / "default"  # the data set that ships with this package
MOST_PROBLEMS = 20  # of a folder, that an error lists
BLOCK = 256  # images that are converted together
MIXED_UNITS = "their own units"  # of targets that have several


Part = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]  # images, targets, perhaps inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of microstructures and the numbers that belong to them, such as stiffness components."""

    images: np.ndarray  # (n, c, h, w) float32 in 0..1
    targets: np.ndarray  # (n, k) float64 in `unit`; NaN where missing, in no row all
    target_names: tuple[str, ...]  # k
    names: tuple[str, ...]  # of the n image files
    description: Description
    symmetries: Mapping[str, tuple[int, ...]]  # move of the image -> order of the k targets, see symmetry.Order
    given_split: Split | None = None  # None: the source study's
    groups: tuple[str, ...] | None = None  # of each image
    inputs: np.ndarray | None = None  # (n, m) float64, numbers beside the images
    input_names: tuple[str, ...] = ()  # m
    earlier: tuple[Earlier, ...] = ()  # the data sets that it extends, the oldest first, if their labels stay

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.description.name

    @property
    def unit(self) -> str:
        """The unit of the targets; "label unit" if it is unknown, "their own units" if there are several."""
        return self.description.unit

    @property
    def units(self) -> dict[str, str]:
        """The unit of each target, by its name."""
        layout = self.description.layout
        transforms, units = layout.transform or {}, layout.units or {}
        stated = {scaled_name(name, transforms): unit for name, unit in units.items()}
        kinds = {scaled_name(name, transforms): f"{kind} " for name, kind in transforms.items()}
        other = UNKNOWN_UNIT if self.unit == MIXED_UNITS else self.unit
        return {name: kinds.get(name, "") + stated[name] if name in stated else other for name in self.target_names}

    @property
    def missing(self) -> dict[str, int]:
        """How many labels of each target are missing, by its name."""
        return dict(zip(self.target_names, np.isnan(self.targets).sum(axis=0).tolist(), strict=True))

    def in_unit(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return those of the targets (n, k) that have a transform without it, (n,), by their name and unit."""
        transforms, units = self.description.layout.transform or {}, self.description.layout.units or {}
        plain, names = undo(targets, self.target_names, transforms)
        named = {name: f"{name} [{units[name]}]" if name in units else name for name in transforms}
        return {named[name]: values for name, values in zip(names, plain.T, strict=True) if name in transforms}

    def fractions(self, indices: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
        """Return the volume fraction of each phase in these images, (n,), by name; of colours and greys the mean of
        each channel, 0..1."""
        layout, count = self.description.layout, self.images.shape[1]
        if count == 1:
            names = ["volume fraction"]
        elif layout.levels == "phases" and len(layout.colours or ()) == count:
            names = [
                f"volume fraction of phase {colour[0] if len(colour) == 1 else list(colour)}"
                for colour in layout.colours or ()
            ]
        elif layout.levels == "rgb" and count == 3:
            names = [f"mean {colour}" for colour in ("red", "green", "blue")]
        else:
            names = [f"mean of channel {channel + 1}" for channel in range(count)]
        means = self.images[indices].mean(axis=(2, 3), dtype=np.float64)
        return dict(zip(names, means.T, strict=True))

    @property
    def input_units(self) -> dict[str, str]:
        """The unit of each input, by its name; only of those that have one."""
        units = self.description.layout.units or {}
        return {name: units[name] for name in self.input_names if name in units}

    @property
    def is_periodic(self) -> bool:
        """Whether the images wrap around, as the course's do."""
        layout = self.description.layout
        return bool(layout.periodic) or not layout.images

    @cached_property
    def split(self) -> Split:
        """Training, validation and test images. Raise DatasetError if there are fewer than four images."""
        return self.given_split or split(len(self.images))

    def part(self, indices: np.ndarray) -> Part:
        """Return images and targets, and the inputs if there are any, of these images."""
        images, targets = self.images[indices], self.targets[indices]
        return (images, targets) if self.inputs is None else (images, targets, self.inputs[indices])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over shape, names, unit, pixels, targets and inputs; not over file names and bytes."""
        facts: dict[str, Any] = {"shape": self.images.shape, "targets": self.target_names, "unit": self.unit}
        if self.unit == MIXED_UNITS:
            facts["units"] = self.description.layout.units
        if self.description.layout.symmetry:
            facts["symmetries"] = self.symmetries
        if self.inputs is not None:
            facts["inputs"] = self.input_names
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.pixels()).data)
        targets = np.where(np.isnan(self.targets), np.nan, self.targets)  # of the many NaNs, one
        for numbers in (targets, self.inputs):
            digest.update(b"" if numbers is None else np.ascontiguousarray(numbers, dtype="<f8").tobytes())
        return digest.hexdigest()

    @cached_property
    def phases(self) -> dict[str, Phase] | None:
        """The phases of grey value 0, "matrix", and 1, "inclusion"; None if unknown, or if there are other pixels."""
        phases = self.description.phases
        return phases if phases and np.isin(self.pixels(), (0, 255)).all() else None

    def pixels(self) -> np.ndarray:
        """Return the images (n, c, h, w) as uint8, 0..255; as float32 in 0..1 if they have more levels than that."""
        pixels = np.empty(self.images.shape, np.uint8)
        for start in range(0, len(pixels), BLOCK):
            images = self.images[start : start + BLOCK]
            pixels[start : start + BLOCK] = np.rint(images * np.float32(255))
            if not np.array_equal(scaled(pixels[start : start + BLOCK]), images):
                return self.images
        return pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Understanding:
    """What hpo understands of a folder: the data, or the questions and errors that stand in the way."""

    folder: Path
    dataset: Dataset | None  # None if there are questions or errors
    rows: tuple[str, ...] = ()  # where the labels of each image stand
    greys: str = ""  # what the pixels are in the files
    notes: Notes

    @property
    def groups(self) -> tuple[str, ...] | None:
        """The group of each image; None without groups."""
        return None if self.dataset is None else self.dataset.groups

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the same keys whatever was understood."""
        data = self.dataset
        facts: dict[str, Any] = {
            "images": 0,
            "pairs": [],
            "targets": [],
            "inputs": [],
            "units": {},
            "missing": {},
            "channels": 0,
            "size": None,
        }
        facts |= {"groups": None, "split": None, "levels": None, "digest": None}
        facts |= {"name": description.name_of(self.folder)} | self.notes.facts
        if data is not None:
            facts = {
                "name": data.name,
                "images": len(data.images),
                "pairs": [[image, row] for image, row in zip(data.names, self.rows, strict=True)],
                "targets": list(data.target_names),
                "inputs": list(data.input_names),
                "units": data.units | data.input_units,
                "missing": data.missing,
                "channels": data.images.shape[1],
                "size": list(data.images.shape[2:]),
                "levels": self.greys,
                "groups": None if data.groups is None else list(data.groups),
                "split": {name: getattr(data.split, name).tolist() for name in ("train", "validation", "test")}
                if len(data.images) >= 4
                else None,
                "digest": data.digest,
            }
        facts["findings"] = [finding.to_dict() for finding in self.notes.findings]
        return facts | {name: getattr(self.notes, name) for name in ("remarks", "doubts", "questions", "errors")}


def understand(folder: Path, *, image_size: int | None = None, like: Layout | None = None) -> Understanding:
    """Return what hpo understands of a folder.

    With `image_size` (pixels) images of another size are resized to that square, nearest pixel; without it all images
    must have one size. With `like` pixels and targets mean what they mean in another data set's layout, and what the
    folder says of groups and its split is not needed.
    """
    folder, notes = Path(folder), Notes()
    described = description.read(folder, notes.errors)
    if described.layout.set().keys() <= {"extends", "accept"} and course.is_course(folder):
        if like is not None and like.pixels() != UNSTATED.pixels():
            notes.errors.append(f"images: expected {like.pixels()}, found {UNSTATED.pixels()}, the form of the course.")
        understood = _of_course(folder, described, image_size, notes)
        return _extended(understood, image_size) if like is None else understood
    if like is not None:
        described = replace(described, layout=described.layout.like(like, notes.errors))
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        notes.errors.append(f"image_size: expected 1 to {LARGEST_SIDE} pixels, found {image_size}.")
    reading, further = None, like is not None
    try:
        if not notes.errors:
            reading = understanding.read(folder, described.layout, notes, image_size=image_size, further=further)
    except MemoryError:
        notes.errors.append(
            f"{folder}: expected data that fit into the memory here, found more. Write the images as one .npy, which "
            "is read piece by piece, and give an image_size."
        )
    if reading is None:
        return Understanding(folder=folder, dataset=None, notes=notes)
    columns, named = reading.columns, described.unit
    kinds = [name.removesuffix(base) for name, base in zip(columns.names, reading.layout.targets or (), strict=True)]
    units = {f"{kind}{unit or named}" for kind, unit in zip(kinds, columns.units, strict=True)}
    unit = units.pop() if len(units) == 1 else MIXED_UNITS
    names, targets, symmetries = columns.names, columns.targets, reading.symmetries
    if set(names) == set(COMPONENTS):  # the course's under a header
        targets, names = targets[:, [names.index(name) for name in COMPONENTS]], COMPONENTS
        symmetries = SYMMETRIES if described.layout.symmetry is None else symmetries
    layout = replace(reading.layout, targets=names if names == COMPONENTS else reading.layout.targets)
    data = Dataset(
        images=reading.images,
        targets=targets,
        target_names=names,
        names=reading.names,
        description=replace(described, unit=unit, layout=layout),
        symmetries=_of_shape(symmetries, reading.images.shape),
        given_split=reading.split,
        groups=columns.groups,
        inputs=columns.inputs if columns.input_names else None,
        input_names=columns.input_names,
    )
    understood = Understanding(folder=folder, dataset=data, rows=reading.rows, greys=reading.greys, notes=notes)
    return _extended(understood, image_size) if like is None else understood


def _extended(understood: Understanding, image_size: int | None) -> Understanding:
    """Return what is understood, with the split of the data set that it extends, if it extends one."""
    data, notes = understood.dataset, understood.notes
    if data is None or (name := data.description.layout.extends) is None:
        return understood
    folder = understood.folder / name
    try:
        _check_line(understood.folder)
        if data.groups or data.given_split:
            raise SplitProblem("extends: expected neither groups nor a given split beside it.")
        earlier = load(folder, image_size=image_size)
        keys, earlier_keys = (_keys(both) for both in (data, earlier))
        own = set(keys)
        if missing := [index for index, key in enumerate(earlier_keys) if key not in own]:
            raise SplitProblem(
                f"extends: expected all {len(earlier_keys)} images of {folder}, pixel by pixel, found none for "
                f"{listed(earlier.names, missing)}. Copy them here, with their labels."
            )
        parts = extending(keys, earlier_keys, earlier.split)
    except SplitProblem as problem:
        notes.errors.append(str(problem))
        return replace(understood, dataset=None)
    except DatasetError as error:
        notes.errors.append(f"extends: {error}")
        return replace(understood, dataset=None)
    count = len(data.images) - len(earlier.images)
    notes.remarks.append(f"extends {earlier.name}: its split stays, {count} images are new")
    return replace(
        understood,
        dataset=replace(data, given_split=parts, earlier=_line(data, earlier, places(keys, earlier_keys), notes)),
    )


def _line(data: Dataset, earlier: Dataset, images: np.ndarray, notes: Notes) -> tuple[Earlier, ...]:
    """Return the data sets that this one extends, the oldest first; none if models of both cannot be compared.

    `images` (m,): of each image of the earlier one its index here.
    """
    if data.target_names != earlier.target_names:
        other = "it has other targets"
    elif count := relabelled(data.targets[images], earlier.targets, earlier.split):
        other = f"{counted(count, 'image')} outside the test split {'has' if count == 1 else 'have'} other labels there"
    else:
        own = Earlier(name=earlier.name, digest=earlier.digest, split=earlier.split.digest, images=images)
        return line(own, earlier.earlier)
    notes.remarks.append(f"models of {earlier.name} are not compared with those of this data set: {other}")
    return ()


def _check_line(folder: Path) -> None:
    """Raise SplitProblem if a data set extends itself, also through others that it extends."""
    line = [folder.resolve()]
    while name := description.read(line[-1], []).layout.extends:
        if (earlier := (line[-1] / name).resolve()) in line:
            through = f", through {', '.join(map(str, line[1:]))}" if len(line) > 1 else ""
            raise SplitProblem(f"extends: {earlier} extends itself{through}: expected an earlier data set.")
        line.append(earlier)


def _keys(data: Dataset) -> list[bytes]:
    """Return what tells an image, with its inputs, from the others."""
    beside = np.zeros((len(data.images), 0)) if data.inputs is None else data.inputs
    return [image.tobytes() + numbers.tobytes() for image, numbers in zip(data.images, beside, strict=True)]


def _of_course(folder: Path, described: Description, image_size: int | None, notes: Notes) -> Understanding:
    content = course.read(folder, image_size, notes.errors, notes.findings)
    if content is None:
        return Understanding(folder=folder, dataset=None, notes=notes)
    pixels, targets, names = content
    data = Dataset(
        images=scaled(pixels),
        targets=targets,
        target_names=COMPONENTS,
        names=names,
        description=described,
        symmetries=_of_shape(SYMMETRIES, pixels.shape),
    )
    rows = tuple(f"row {row}" for row in range(len(names)))
    levels = np.unique(pixels)
    greys = f"{len(levels)} values, {levels[0]} to {levels[-1]}"
    notes.remarks.append("the form of the course: no header, row r belongs to the image r_*.png")
    return Understanding(folder=folder, dataset=data, rows=rows, greys=greys, notes=notes)


def _of_shape(symmetries: Mapping[str, tuple[int, ...]], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    turns = ("transpose", "quarter_turn")  # these keep the shape of squares only
    return {name: order for name, order in symmetries.items() if shape[-2] == shape[-1] or name not in turns}


def load(folder: Path, *, image_size: int | None = None, like: Layout | None = None) -> Dataset:
    """Return the data set of a folder. Raise DatasetError with its first twenty problems and their count.

    `image_size` and `like` as in `understand`.
    """
    return the_dataset(understand(folder, image_size=image_size, like=like))


def the_dataset(understood: Understanding) -> Dataset:
    """Return the data set of a folder. Raise DatasetError with its first twenty problems and their count."""
    if understood.dataset is not None:
        return understood.dataset
    notes = understood.notes
    said = [*notes.questions, *notes.errors, *(finding.text for finding in notes.findings)]
    problems = list(dict.fromkeys(said))
    head = f"The data set in {understood.folder} has {counted(len(problems), 'problem')}:"
    more = [f"... and {len(problems) - MOST_PROBLEMS} more."] if len(problems) > MOST_PROBLEMS else []
    raise DatasetError("\n  ".join([head, *problems[:MOST_PROBLEMS], *more]))


def check(folder: Path, *, image_size: int | None = None) -> list[str]:
    """Return all problems of a folder, each with its file and line; an empty list if `load` would succeed."""
    understood = understand(folder, image_size=image_size)
    return [*understood.notes.questions, *understood.notes.errors]


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Return pixels 0..255 as float32 in 0..1."""
    images = pixels.astype(np.float32)
    images /= np.float32(255)  # in place: half the memory
    return images
