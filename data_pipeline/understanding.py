"""A folder of images and labels of any form -> what hpo understands of it, with all that is doubtful or wrong."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline import columns, pairing, parts, pixels, sources, target_moves, target_transforms
from data_pipeline.columns import Columns
from data_pipeline.dataset_keys import Layout
from data_pipeline.findings import in_alpha, resizing
from data_pipeline.formats import arrays, tables
from data_pipeline.formats.limits import FormatProblem
from data_pipeline.formats.pictures import KINDS, read_picture, resized
from data_pipeline.formats.tables import Table
from data_pipeline.image_checks import copies
from data_pipeline.messages import printable
from data_pipeline.pixels import PixelProblem
from data_pipeline.sources import Notes
from data_pipeline.split import Split

PICTURES, ARRAYS = (", ".join(suffix[1:] for suffix in kinds) for kinds in (KINDS, arrays.READERS))  # their suffixes
SLACK = 0.25  # of the range, by which pixels of further images may lie beyond that of the data set

_INDEXED = re.compile(r"(.*)\[([0-9]{1,9})\]")  # an image of an array, as the data set names it


@dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """The data of a folder, an entry for every image, and the layout with everything that was found out."""

    layout: Layout
    names: tuple[str, ...]  # n
    rows: tuple[str, ...]  # n, where its labels stand
    images: np.ndarray  # (n, c, h, w) float32 in 0..1
    greys: str  # what the pixels are in the files
    columns: Columns  # of n rows
    split: Split | None  # None: the source's rule
    symmetries: Mapping[str, tuple[int, ...]]


def read(
    folder: Path, stated: Layout, notes: Notes, *, image_size: int | None = None, further: bool = False
) -> Reading | None:
    """Return the data of a folder; None, with questions or errors in `notes`, if it cannot be used as it is.

    `further` images are read like those of another data set: their pixels may lie a little beyond its range, and they
    are not split."""
    files = sources.files_of(folder)
    image_candidates, table_candidates = sources.guess(folder, files, notes) if _must_guess(stated) else ({}, {})
    references = stated.images or sources.choose(image_candidates, "images", notes)
    if not references and not notes.questions:
        kinds = ", ".join(sorted({Path(file).suffix for file in files})[:10]) or "nothing"
        notes.errors.append(f"{folder}: expected images ({PICTURES}, {ARRAYS}) and a table, found {kinds}.")
    chosen = sources.expand(references, files)
    if references and not chosen:
        notes.errors.append(f"images: expected files such as {references[0]}, found none.")
    labels = _tables(folder, files, stated, table_candidates, notes)
    if not chosen or not labels or notes.errors or notes.questions:
        return None
    source = _Images(folder, chosen, stated, image_size)
    table = _table(folder, labels, stated, source, notes)
    if table is None or not source.count(notes, {len(table.cells)}):
        return None
    notes.facts["images"] = len(source.names)
    stated = replace(stated, images=tuple(references), table=labels)
    return _paired(source, table, labels, stated, notes, further=further)


def read_like(path: Path, layout: Layout) -> list[tuple[str, np.ndarray]]:
    """Return the images of a file, or of an array in it (FILE:KEY), each (channels, height, width) with its name, read
    as those of the layout. A number behind it, as in x.npy[3], chooses one. Raise FormatProblem or PixelProblem."""
    one = _INDEXED.fullmatch(str(path))
    path = Path(one[1]) if one else path
    file, key = arrays.parted(str(path))
    if path.suffix.lower() in KINDS:
        picture = read_picture(path)
        raw = picture.pixels[np.newaxis]
        if picture.is_bilevel and 255 in (layout.range or ()) + sum(layout.colours or (), ()):
            raw = raw * np.uint8(255)
    elif Path(file).suffix.lower() in arrays.READERS:
        array = arrays.read(Path(file).parent, f"{Path(file).name}:{key}" if key else Path(file).name)
        raw = _stack(array, layout)
    else:
        raise FormatProblem(f"expected an image ({PICTURES}) or an array ({ARRAYS}).")
    if one:
        index = int(one[2])
        if index >= len(raw):
            raise FormatProblem(f"expected a number below {len(raw)}, the images in it, found {index}.")
        return [(one[0], pixels.converted(raw[index : index + 1], layout, slack=SLACK)[0])]
    images = pixels.converted(raw, layout, slack=SLACK)
    return [(str(path) if len(images) == 1 else f"{path}[{index}]", image) for index, image in enumerate(images)]


def _stack(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the images of an array as (n, h, w) or (n, h, w, c); it is one image, or images along its first axis."""
    axes = layout.axes or ("np" if layout.shape else "")
    if array.ndim != len(axes):
        has_colours = array.ndim > 2 and array.shape[-1] in (1, 3)
        axes = {2: "hw", 3: "hwc" if has_colours else "nhw", 4: "nhwc" if has_colours else "nchw"}.get(array.ndim, "")
    if not axes or 0 in array.shape:
        raise FormatProblem(
            f"expected an image (height, width), or images (n, height, width), found an array of the shape "
            f"{array.shape}."
        )
    return pixels.stacked(array, axes, layout.shape) if "n" in axes else array[np.newaxis]


def _must_guess(stated: Layout) -> bool:
    return not (stated.images and stated.table)


def _tables(
    folder: Path, files: list[str], stated: Layout, candidates: dict[str, list[str]], notes: Notes
) -> tuple[str, ...]:
    """Return the files or arrays of the labels; a real table is preferred to arrays."""
    if stated.table:
        chosen = tuple(sources.expand(stated.table, files))
        if not chosen:
            notes.errors.append(f"table: expected the file {stated.table[0]}, found none.")
        return chosen
    used = set(stated.images or ())
    left = {key: list_ for key, list_ in candidates.items() if not used & set(list_)}
    real = {key: list_ for key, list_ in left.items() if Path(arrays.parted(list_[0])[0]).suffix in tables.SUFFIXES}
    if not left and not notes.errors:
        notes.errors.append(
            f"{folder}: expected a table of labels (csv, tsv, txt, xlsx, parquet, npy, npz, h5, mat), found none."
        )
    return sources.choose(real or left, "table", notes)


@dataclass
class _Images:
    """The images of a folder before they are read: picture files, files of one array each, or arrays of many."""

    folder: Path
    references: list[str]
    stated: Layout
    image_size: int | None
    names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()  # of the split, by the files' or groups' names; "" for none
    axes: str = ""

    @property
    def are_files(self) -> bool:
        """Return whether each reference is one image."""
        return (len(self.references) > 1 and not any(map(sources.part_of, self.references))) or all(
            Path(reference).suffix.lower() in KINDS for reference in self.references
        )

    def lengths(self) -> set[int]:
        """Return the lengths of all axes that may count images: of all arrays together."""
        if self.are_files:
            return {len(self.references)}
        shapes = [arrays.members(self.folder, arrays.parted(name)[0])[name] for name in self.references]
        return {sum(shape[place] for shape in shapes) for place in (0, -1)}

    def count(self, notes: Notes, lengths: set[int]) -> bool:
        """Name the images; return whether it is clear how many there are."""
        if self.are_files:
            self.names = tuple(self.references)
            by_folder = [sources.part_of(str(Path(name).parent)) for name in self.references]
            self.parts = tuple(by_folder) if len(set(by_folder)) > 1 and all(by_folder) else ()
            return True
        shapes = [arrays.members(self.folder, arrays.parted(name)[0])[name] for name in self.references]
        total = tuple(map(sum, zip(*shapes, strict=True))) if len({len(shape) for shape in shapes}) == 1 else ()
        self.axes = self.stated.axes or pixels.axes_of([*_sides(shapes, total)], lengths, notes)
        if not self.axes:
            return False
        counts = [shape[self.axes.index("n")] for shape in shapes]
        pairs = list(zip(self.references, counts, strict=True))
        self.names = tuple(f"{name}[{index}]" for name, count in pairs for index in range(count))
        named = [sources.part_of(name) for name in self.references]
        if len(set(named)) > 1 and all(named):
            self.parts = tuple(part for part, count in zip(named, counts, strict=True) for _ in range(count))
        return True

    def read(self, notes: Notes, names: Sequence[str]) -> np.ndarray | None:
        """Return the raw pixels of some images (n, h, w) or (n, h, w, c); None, with errors, if that fails."""
        size = (self.image_size, self.image_size) if self.image_size else None
        if self.are_files:
            seen: dict[str, list[str]] = {}
            hidden: list[str] = []
            bits: list[str] = []
            changed: list[str] = []
            reader = partial(self._read_one, size=size, seen=seen, bits=bits, hidden=hidden, changed=changed)
            raw = pixels.read_all(names, reader, notes)
            if raw is not None and raw.dtype == np.uint8 and 0 < len(bits) < len(names):
                is_bits = np.isin(names, bits)
                if raw[~is_bits].max() > 1:
                    raw[is_bits] *= np.uint8(255)
                    seen["one bit a pixel, read as 0 and 255"] = bits
            where, places = list(map(printable, names)), {name: place for place, name in enumerate(names)}
            if hidden:
                notes.findings.append(in_alpha(where, [places[name] for name in hidden]))
            if size is not None and changed:
                notes.findings.append(resizing(where, [places[name] for name in changed], size))
            notes.remarks += [f"{len(of)} images: {note}, such as {printable(of[0])}" for note, of in seen.items()]
            return raw
        stacks = []
        for reference in self.references:
            array = pixels.stacked(arrays.read(self.folder, reference), self.axes, self.stated.shape)
            stacks.append(array)
        raw = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
        if size is None or raw.shape[1:3] == size:
            return raw
        notes.findings.append(resizing(list(map(printable, names)), range(len(raw)), size))
        return np.stack([resized(image, size) for image in raw])

    def _read_one(
        self,
        name: str,
        *,
        size: tuple[int, int] | None,
        seen: dict[str, list[str]],
        bits: list[str],
        hidden: list[str],
        changed: list[str],
    ) -> np.ndarray:
        try:
            if Path(name).suffix.lower() in KINDS:
                picture = read_picture(self.folder / name, size)
                if picture.note:
                    seen.setdefault(picture.note, []).append(name)
                if picture.is_bilevel:
                    bits.append(name)
                if picture.is_hidden:
                    hidden.append(name)
                if picture.is_resized:
                    changed.append(name)
                return picture.pixels
            image = arrays.read(self.folder, name)
        except FormatProblem as problem:
            raise PixelProblem(str(problem)) from None
        if image.ndim not in (2, 3):
            raise PixelProblem(f"expected one image (height, width), found an array of the shape {image.shape}.")
        if size is not None and image.shape[:2] != size:
            changed.append(name)
        return resized(image, size)


def _sides(shapes: list[tuple[int, ...]], total: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of all arrays together: an axis on which they differ, or the first or last, counts images."""
    if len(shapes) == 1 or not total:
        return shapes[0]
    differ = [place for place in range(len(total)) if len({shape[place] for shape in shapes}) > 1] or [0]
    return tuple(total[place] if place in differ else side for place, side in enumerate(shapes[0]))


def _table(folder: Path, labels: tuple[str, ...], stated: Layout, source: _Images, notes: Notes) -> Table | None:
    """Return the rows of all files or arrays of labels; None, with errors, if they cannot be read."""
    loaded = []
    try:
        for reference in labels:
            suffix = Path(arrays.parted(reference)[0]).suffix.lower()
            if suffix in tables.SUFFIXES:
                loaded.append(tables.read_table(folder, reference, decimal=stated.decimal or ""))
            else:
                array = arrays.read(folder, reference)
                lengths = source.lengths() if len(labels) == 1 else {array.shape[0]}
                count = array.shape[-1] if array.shape[-1] in lengths and array.shape[0] not in lengths else len(array)
                loaded.append(columns.of_array(reference, array, count))
        table = tables.joined(loaded)
    except FormatProblem as problem:
        notes.errors.append(f"{printable(reference)}: {problem}")
        return None
    if table.ambiguous:
        notes.ask(
            f"{labels[0]}: are the commas in numbers such as {table.ambiguous} decimal commas, or between thousands?",
            'decimal = ","',
            'decimal = "."',
        )
        return None
    notes.remarks += [f"{labels[0]}: {', '.join(table.remarks)}"] if table.remarks else []
    return table


def _paired(
    source: _Images, table: Table, labels: tuple[str, ...], stated: Layout, notes: Notes, *, further: bool
) -> Reading | None:
    pairs = pairing.pair(source.names, table, stated.match, notes, are_files=source.are_files)
    # What is said of the columns waits for the column that names the images.
    used, waiting = (pairs.match[1], notes) if pairs else ("", Notes())
    meaning = columns.understand(table, stated, used, waiting, further=further)
    if meaning is not None:
        units = {name: unit for name, unit in zip(meaning.names, meaning.units, strict=True) if unit}
        notes.facts |= {"targets": list(meaning.names), "units": units}
    if pairs is None:
        return None
    rows_of = zip(source.names, pairs.rows.tolist(), strict=True)
    notes.facts["pairs"] = [[name, table.lines[row]] for name, row in rows_of if row >= 0]
    pairing.check(pairs, source.names, table, notes, has_inputs=bool(stated.inputs))
    if meaning is None or notes.errors or notes.questions:
        return None
    names, rows, chosen = source.names, pairs.rows, np.arange(len(source.names))
    kept = _kept(meaning, rows, table, stated.missing, notes)
    if kept is None:
        return None
    chosen, rows = chosen[kept], rows[kept]
    try:
        raw = source.read(notes, names)
        if raw is None:
            return None
        notes.facts["size"] = list(raw.shape[1:3])
        images = pixels.understand(
            raw[chosen] if len(chosen) < len(raw) else raw, stated, notes, slack=SLACK if further else 0.0
        )
        meaning = _of_rows(meaning, rows)
        notes.facts |= {"channels": images.images.shape[1], "levels": images.greys, "groups": meaning.groups}
        turned = target_moves.orders(stated.symmetry or {}, meaning.names, meaning.input_names)
        scaled, scaled_names = target_transforms.apply(meaning.targets, meaning.names, stated.transform or {})
        target_moves.check_scales(turned, scaled_names, meaning.names)
        by_source = [source.parts[index] for index in chosen] if source.parts else None
        same = None if further or stated.extends else copies(images.images, meaning.inputs)
        sides = None if further else _sides_of_split(meaning, by_source, same)
    except (PixelProblem, FormatProblem) as problem:
        notes.errors.append(f"images: {problem}")
        return None
    except (parts.SplitProblem, target_moves.SymmetryProblem, target_transforms.TransformProblem) as problem:
        notes.errors.append(str(problem))
        return None
    return Reading(
        layout=_found_out(images.layout, source.axes, raw.shape, pairs.match, meaning),
        names=tuple(names[index] for index in chosen),
        rows=tuple(table.lines[row] for row in rows),
        images=images.images,
        greys=images.greys,
        columns=replace(meaning, targets=scaled, names=scaled_names),
        split=sides,
        symmetries=turned,
    )


def _found_out(layout: Layout, axes: str, shape: tuple[int, ...], match: tuple[str, str], meaning: Columns) -> Layout:
    """Return the layout with what was found out: the axes of arrays, the pairing, the columns and their units."""
    return replace(
        layout,
        axes=axes if axes not in ("", "np") else None,
        shape=shape[1:3] if axes == "np" else None,
        match=match,
        targets=meaning.names,
        inputs=meaning.input_names or None,
        units=_stated_units(meaning),
    )


def _kept(meaning: Columns, rows: np.ndarray, table: Table, missing: str | None, notes: Notes) -> np.ndarray | None:
    """Return which of the rows have the targets they need, (n,); None, with a question or an error, if not clear."""
    there = np.isfinite(meaning.targets[rows])
    kept: np.ndarray = there.any(axis=1) if missing == "mask" else there.all(axis=1)
    if not kept.all() and not missing:
        lines = [table.lines[rows[index]] for index in np.flatnonzero(~kept)[:5]]
        more = ", …" if (~kept).sum() > len(lines) else ""
        question = f"Targets are missing in {(~kept).sum()} rows: {', '.join(lines)}{more}."
        notes.ask(question, 'missing = "mask"', 'missing = "drop"')
        return None
    if empty := [name for name, any_ in zip(meaning.names, there[kept].any(axis=0), strict=True) if not any_]:
        notes.errors.append(f"targets: {', '.join(empty)} has no number in any row. Leave it out of targets.")
        return None
    if not kept.all():
        what = "any target" if missing == "mask" else "all targets"
        notes.remarks.append(f"{(~kept).sum()} rows without {what} are left out")
    return kept


def _stated_units(meaning: Columns) -> dict[str, str] | None:
    names, units = (*meaning.names, *meaning.input_names), (*meaning.units, *meaning.input_units)
    return {name: unit for name, unit in zip(names, units, strict=True) if unit} or None


def _of_rows(meaning: Columns, rows: np.ndarray) -> Columns:
    return replace(
        meaning,
        targets=meaning.targets[rows],
        inputs=meaning.inputs[rows],
        groups=tuple(meaning.groups[row] for row in rows) if meaning.groups else None,
        parts=tuple(meaning.parts[row] for row in rows) if meaning.parts else None,
    )


def _sides_of_split(meaning: Columns, by_source: Sequence[str] | None, same: np.ndarray | None) -> Split | None:
    """Return the split that a column or the files' names give, or the one by group; None for the source's rule.

    `same` is for each image the first that is equal, (n,): equal images are a group.
    """
    if words := meaning.parts or by_source:
        return parts.given(words, meaning.groups, same)
    groups = parts.joined(meaning.groups, same) if same is not None else meaning.groups
    return parts.by_group(groups) if groups else None
