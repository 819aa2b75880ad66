"""The page on images and labels of a data set: of `hpo data check -o`, and at the run of each study.

Its size is bounded, however many images there are: it shows some, and says of how many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas

from data_pipeline.dataset import Dataset
from data_pipeline.findings import Finding
from data_pipeline.image_checks import copies
from data_pipeline.split import SMALLEST
from hpo.report import figures, tables
from hpo.report.document import Document, Gallery, Picture, Section, Tile, html
from hpo.report.figures import MOST_PANELS
from hpo.report.tables import Table
from hpo.report.thumbnails import thumbnail
from hpo.text import counted, one_line

MOST_FINDINGS = 20  # that are shown with images and rows
OF_SPLIT, OF_FINDING = 24, 8  # images, or pairs of them, that are shown
MOST_ROWS = 100  # of a table
MOST_POINTS = 2000  # images whose pixels are counted, or that are dots of a figure
MOST_CORRELATED = 25  # columns of the correlations
IN_LINES = 3  # targets below an image
ELSEWHERE = ": `hpo data check DIR --json` lists all"


def page(data: Dataset, rows: Sequence[str], findings: Sequence[Finding]) -> str:
    """Return the page as HTML. `rows` says where the labels of each image stand."""
    return html(document(data, rows, findings))


def document(data: Dataset, rows: Sequence[str], findings: Sequence[Finding]) -> Document:
    """Return the page. `rows` says where the labels of each image stand."""
    looked = _Looked(data=data, rows=rows)
    height, width = data.images.shape[2:]
    layout, kinds = data.description.layout, [finding.kind for finding in findings]
    summary = [
        f"{counted(len(data.images), 'image')} of {width} x {height} pixels, "
        f"{counted(data.images.shape[1], 'channel')} ({layout.levels or 'grey'}); "
        f"{counted(len(data.target_names), 'target')}: {', '.join(map(looked.head, data.target_names))}. "
        f"Digest {data.digest[:8]}.",
        "The check of the content found "
        + (" and ".join(counted(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)) or "nothing to doubt")
        + ".",
    ]
    errors = dict.fromkeys(finding.name for finding in findings if finding.kind == "error")
    sections = [
        *of_findings(data, rows, findings),
        _images(looked),
        _targets(looked),
        _pixels(looked),
        _correlations(looked),
        _copies(looked),
    ]
    return Document(
        title=f"Images and labels of {data.name}",
        summary=summary,
        alarms=[f"No new study is planned on these data: {', '.join(errors)}."] if errors else [],
        answers=[],
        sections=sections,
    )


def of_findings(data: Dataset, rows: Sequence[str], findings: Sequence[Finding]) -> list[Section]:
    """Return what was found, each with its images and rows; of very many the last ones in words alone."""
    looked, further = _Looked(data=data, rows=rows), findings[MOST_FINDINGS:]
    sections = [_of_finding(looked, finding) for finding in findings[:MOST_FINDINGS]]
    if further:
        sections.append(Section(title="Further findings", text=[finding.text for finding in further]))
    return sections


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """A data set as the sections look at it."""

    data: Dataset
    rows: Sequence[str]

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """The images of each part of the split, by its name; of too few for a split all of them."""
        if len(self.data.images) < SMALLEST:
            return {"all": np.arange(len(self.data.images))}
        split = self.data.split
        return {"training": split.train, "validation": split.validation, "test": split.test}

    @cached_property
    def sides(self) -> list[str]:
        """The part of each image."""
        sides = [""] * len(self.data.images)
        for part, indices in self.parts.items():
            for index in indices.tolist():
                sides[index] = part
        return sides

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Targets, inputs and fractions of the phases, (n,), by name and unit."""
        columns = {self.head(name): own for name, own in zip(self.data.target_names, self.data.targets.T, strict=True)}
        if self.data.inputs is not None:
            columns |= {
                self.head(name): own for name, own in zip(self.data.input_names, self.data.inputs.T, strict=True)
            }
        return columns | {name: own for name, own in self.fractions.items() if name not in columns}

    @cached_property
    def fractions(self) -> dict[str, np.ndarray]:
        """The fraction of each phase, (n,), by name."""
        return self.data.fractions()

    def head(self, name: str) -> str:
        """Return a target or input with its unit."""
        unit = (self.data.units | self.data.input_units).get(name)
        return f"{name} [{unit}]" if unit else name

    def tile(self, images: Sequence[int], names: Sequence[str] = ()) -> Tile:
        """Return images to be compared, with their names, rows, parts, and the labels of these targets or the first."""
        names = names or self.data.target_names[:IN_LINES]
        lines = []
        for index in images:
            lines += [one_line(self.data.names[index]), f"{self.rows[index]}, {self.sides[index]}".removesuffix(", ")]
            labels = {name: self.data.targets[index, self.data.target_names.index(name)] for name in names}
            lines += [f"{name} {_number(value)} {self.data.units[name]}" for name, value in labels.items()]
        return Tile(uris=[thumbnail(self.data, index) for index in images], lines=lines)

    def gallery(self, title: str, images: Sequence[Sequence[int]], most: int, names: Sequence[str] = ()) -> Gallery:
        """Return the first `most` images, or pairs of them."""
        return Gallery(title=title, tiles=[self.tile(some, names) for some in images[:most]])

    def table(self, title: str, images: Sequence[int], others: Sequence[int] = ()) -> Table:
        """Return a row for each image: where it stands, the one that it equals, and its first labels."""
        records = []
        for place, index in enumerate(images[:MOST_ROWS]):
            record = {"image": one_line(self.data.names[index]), "row": self.rows[index], "split": self.sides[index]}
            if others:
                other = others[place]
                record |= {"equals": one_line(self.data.names[other]), "its row": self.rows[other]}
                record["its split"] = self.sides[other]
            labels = zip(self.data.target_names, self.data.targets[index], strict=True)
            records.append(record | {self.head(name): _number(value) for name, value in list(labels)[:MOST_PANELS]})
        words = ("row", "split", "equals", "its row", "its split")
        return _table(records, title=title, count=len(images), left=words)


def _of_finding(looked: _Looked, finding: Finding) -> Section:
    """Return what was found, with the images and rows that it concerns."""
    words = {"error": "Error", "doubt": "Doubt", "accepted": "Accepted"}
    title = f"{words[finding.kind]}: {finding.name}{', ' if finding.target else ''}{finding.target}"
    if not finding.images:
        return Section(title=title, text=[finding.text])
    pairs = list(zip(finding.others, finding.images, strict=True)) if finding.others else [(i,) for i in finding.images]
    what = "pair" if finding.others else "image"
    names = [finding.target] if finding.target in looked.data.target_names else []
    return Section(
        title=title,
        text=[finding.text],
        galleries=[looked.gallery(_some(len(pairs), OF_FINDING, what), pairs, OF_FINDING, names)],
        tables=[looked.table("Rows", finding.images, finding.others)],
    )


def _images(looked: _Looked) -> Section:
    """Return images of each part of the split, and those with the lowest and the highest label of each target."""
    data, galleries = looked.data, []
    first = data.targets[:, 0]
    for part, indices in looked.parts.items():
        ordered = indices[np.argsort(first[indices], kind="stable")]
        places = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), OF_SPLIT)).round().astype(np.int64))
        chosen = [(index,) for index in ordered[places].tolist()]
        title = f"{part.capitalize()}: {_some(len(indices), OF_SPLIT, 'image')}"
        galleries.append(looked.gallery(title, chosen, OF_SPLIT))
    labels = list(zip(data.target_names, data.targets.T, strict=True))
    ends = [looked.tile((int(np.nanargmin(own)), int(np.nanargmax(own))), [name]) for name, own in labels[:MOST_PANELS]]
    title = f"Lowest and highest label of {_some(len(labels), MOST_PANELS, 'target')}"
    galleries.append(Gallery(title=title, tiles=ends))
    text = f"The images of each part are chosen evenly from the lowest to the highest {data.target_names[0]}."
    return Section(title="Images by split", text=[text], galleries=galleries)


def _targets(looked: _Looked) -> Section:
    """Return numbers and histograms of targets and inputs."""
    data, records = looked.data, []
    columns = dict(list(looked.columns.items())[: len(data.target_names) + len(data.input_names)])
    for values, name in zip(columns.values(), (*data.target_names, *data.input_names), strict=True):
        there = values[np.isfinite(values)]
        numbers = {"mean": there.mean(), "spread": there.std(), "lowest": there.min(), "highest": there.max()}
        means = {
            f"mean, {part}": np.nanmean(values[indices]) if np.isfinite(values[indices]).any() else np.nan
            for part, indices in looked.parts.items()
        }
        unit = (data.units | data.input_units).get(name, "")
        record = {"column": name, "unit": unit, "what": "target" if name in data.target_names else "input"}
        record["numbers"] = str(len(there))
        records.append(record | {key: _number(value) for key, value in (numbers | means).items()})
    table = _table(records, title="Numbers", count=len(records), left=("unit", "what"))
    drawn = {"Histograms": figures.histograms(columns, looked.parts, what="images")}
    return Section(title="Targets", text=[_first(len(columns))], tables=[table], pictures=_pictures("targets", drawn))


def _pixels(looked: _Looked) -> Section:
    """Return histograms of pixels and of the phases' fractions."""
    data, random = looked.data, np.random.default_rng(0)
    drawn = {}
    if data.description.layout.levels != "phases":
        some = {
            part: random.choice(indices, min(len(indices), max(1, MOST_POINTS // len(looked.parts))), replace=False)
            for part, indices in looked.parts.items()
        }
        chosen = np.concatenate(list(some.values()))
        sizes = np.array([len(indices) for indices in some.values()]) * int(data.images[0].size)
        ends = np.cumsum(sizes)
        places = {part: np.arange(end - size, end) for part, size, end in zip(some, sizes, ends, strict=True)}
        title = f"Grey levels, {_some(len(data.images), len(chosen), 'image')}"
        pixels = {"pixel, 0 to 1": data.images[chosen].ravel()}
        drawn[title] = figures.histograms(pixels, places, what="pixels")
    drawn["Mean of each image, by phase or channel"] = figures.histograms(looked.fractions, looked.parts, what="images")
    low, high = data.description.layout.range or (0, 255)
    text = f"Networks see pixels of 0 to 1; these are {low:g} to {high:g} in the files."
    if data.description.layout.levels == "phases":
        text = "Each phase is a channel; two phases share one."
    return Section(title="Grey levels and phases", text=[text], pictures=_pictures("pixels", drawn))


def _correlations(looked: _Looked) -> Section:
    """Return the correlations of targets, inputs and phases, and the targets over the fraction of the first phase."""
    columns, data = dict(list(looked.columns.items())[:MOST_CORRELATED]), looked.data
    columns |= {name: looked.columns[name] for name in list(looked.fractions)[:3]}
    matrix = pandas.DataFrame(columns).corr().to_numpy()
    upper = [(one, other) for one in range(len(matrix)) for other in range(one)]
    upper = sorted((pair for pair in upper if np.isfinite(matrix[pair])), key=lambda pair: -abs(matrix[pair]))
    names = list(columns)
    records = [{"one": names[b], "other": names[a], "correlation": f"{matrix[a, b]:.3f}"} for a, b in upper]
    table = _table(records[:MOST_PANELS], title="The strongest", count=min(len(records), MOST_PANELS), left=("other",))
    fractions = looked.fractions
    name = max(fractions, key=lambda name: float(fractions[name].std()))
    some = np.sort(np.random.default_rng(0).permutation(len(data.images))[:MOST_POINTS])
    targets = {looked.head(target): own[some] for target, own in zip(data.target_names, data.targets.T, strict=True)}
    drawn = {
        "Correlations": figures.correlations(matrix, names),
        f"Targets over the {name}, {_some(len(data.images), len(some), 'image')}": figures.clouds(
            fractions[name][some], name, targets
        ),
    }
    text = ["Pearson's, over the images that have both numbers; 1 and -1 are straight lines.", _first(len(targets))]
    if len(looked.columns) > len(columns):
        text.append(f"Of {len(looked.columns)} columns {len(columns)} are compared.")
    return Section(title="Correlations", text=text, tables=[table], pictures=_pictures("correlations", drawn))


def _copies(looked: _Looked) -> Section:
    """Return the images that are equal to others."""
    same = copies(looked.data.images, looked.data.inputs)
    doubled = np.flatnonzero(same != np.arange(len(same))).tolist()
    if not doubled:
        return Section(title="Equal images", text=["No two images are equal."])
    text = f"{counted(len(doubled), 'image')} of {len(same)} equal an earlier one, with equal inputs."
    others = same[doubled].tolist()
    pairs = list(zip(others, doubled, strict=True))
    return Section(
        title="Equal images",
        text=[text],
        galleries=[looked.gallery(_some(len(pairs), OF_FINDING, "pair"), pairs, OF_FINDING)],
        tables=[looked.table("All pairs", doubled, others)],
    )


def _pictures(name: str, drawn: Mapping[str, figures.Figure]) -> list[Picture]:
    return [
        Picture(name=f"{name}-{number}", title=title, svg=figures.svg(figure))
        for number, (title, figure) in enumerate(drawn.items())
    ]


def _table(records: Sequence[Mapping[str, str]], *, title: str, count: int, left: Sequence[str]) -> Table:
    """Return the first rows of a table that has `count` of them."""
    table = tables.of_records(records[:MOST_ROWS], title=title, left=left, limit=MOST_ROWS)
    note = f"The first {MOST_ROWS} of {count}{ELSEWHERE}." if count > MOST_ROWS else ""
    return replace(table, note=note)


def _some(count: int, most: int, what: str) -> str:
    """Return how many of the images or pairs are shown."""
    return counted(count, what) if count <= most else f"{most} of {counted(count, what)}"


def _first(count: int) -> str:
    return f"The figure has the first {MOST_PANELS} of {count}." if count > MOST_PANELS else ""


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else tables.NONE
