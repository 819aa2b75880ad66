"""Pictures of results with matplotlib: plain arrays in, a figure out. They need no display and no global state."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, Mapping[int, float]]]  # label -> score -> epoch -> value
NMSE = "NMSE (MSE / variance of the training labels)"
PARTS = {"train/nmse": "training", "val/nmse": "validation"}
STYLES = {"train/nmse": ":", "val/nmse": "-"}
WIDTH = 7.0  # inches, of a page's column


def svg(figure: Figure) -> str:
    """The figure as an SVG element, the same text for the same figure."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hpo"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def loss_curves(curves: Curves, *, scores: Sequence[str] = ("train/nmse", "val/nmse"), legend: bool = True) -> Figure:
    """Loss by epoch on a logarithmic axis; one colour a label, dotted for training."""
    figure, (axes,) = _figure(1, height=3.6)
    for index, (label, found) in enumerate(curves.items()):
        for score in scores:
            name = label if len(scores) == 1 else f"{label}, {PARTS[score]}" if len(curves) > 1 else PARTS[score]
            steps = sorted(found[score])
            values = [found[score][step] for step in steps]
            axes.plot(
                steps, values, STYLES[score] if len(scores) > 1 else "-", color=_colour(index), lw=1.2, label=name
            )
    axes.set(xlabel="epoch", ylabel=NMSE, yscale="log")
    axes.yaxis.label.set_size(8)
    if legend:
        axes.legend(fontsize=7, ncols=2 if len(curves) > 3 else 1)
    return figure


def parity(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], unit: str) -> Figure:
    """Predictions (n, k) over labels (n, k), both in `unit`; one panel a target, with its R²."""
    columns = min(3, len(names))
    figure, panels = _figure(len(names), columns=columns, height=2.3)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        x, y = truth[:, index], predicted[:, index]
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        variance = x.var()
        r2 = f"R² {1 - ((y - x) ** 2).mean() / variance:.4f}" if variance > 0 else "R² undefined"
        axes.plot(ends, ends, color="0.6", lw=0.8)
        axes.plot(x, y, ".", ms=3, color=_colour(0))
        axes.set_title(f"{name}: {r2}", fontsize=8)
        axes.set(xlabel=f"label, {unit}", ylabel=f"prediction, {unit}")
        _small(axes)
    return figure


def main_effects(effects: Sequence[tuple[str, Any, float, int]], text: Any) -> Figure:
    """Mean score of all points with each value of each parameter; `text` writes a value."""
    names = list(dict.fromkeys(name for name, *_ in effects))
    figure, panels = _figure(len(names), columns=min(4, len(names)), height=2.4, sharey=True)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        found = [(text(value), mean) for parameter, value, mean, _ in effects if parameter == name]
        axes.plot([value for value, _ in found], [mean for _, mean in found], "o-", color=_colour(0), ms=4)
        axes.set(xlabel=name, ylabel="mean validation NMSE" if index == 0 else "", yscale="log")
        axes.margins(x=0.2)
        _small(axes)
    return figure


def capacity(sizes: Sequence[int], scores: Sequence[float], lines: Mapping[str, float]) -> Figure:
    """Validation NMSE of all points over their number of parameters, with `lines` of the trivial predictors."""
    figure, (axes,) = _figure(1, height=3.0)
    axes.plot(sizes, scores, "o", ms=4, color=_colour(0), alpha=0.7)
    for index, (name, value) in enumerate(lines.items()):
        axes.axhline(value, color="0.4", lw=0.8, ls=("--", ":")[index % 2], label=name)
    axes.set(xlabel="parameters", ylabel="validation NMSE", xscale="log", yscale="log")
    axes.legend(fontsize=7)
    return figure


def errors(fractions: np.ndarray, found: np.ndarray, kinds: Sequence[str] | None) -> Figure:
    """Error of each cell over its volume fraction, one colour a kind of microstructure."""
    figure, (axes,) = _figure(1, height=3.0)
    kind = np.array(kinds if kinds is not None else [""] * len(found))
    for index, name in enumerate(sorted(set(kind))):
        axes.plot(fractions[kind == name], found[kind == name], "o", ms=3.5, color=_colour(index), label=name or None)
    axes.set(xlabel="volume fraction (mean grey value)", ylabel="NRMSE of the cell", ylim=(0, None))
    if kinds is not None:
        axes.legend(fontsize=7)
    return figure


def cells(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """Images (n, h, w) in 0..1 side by side."""
    figure, panels = _figure(len(images), columns=min(5, len(images)), height=1.75)
    for axes, image, title in zip(panels, images, titles, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=7)
        axes.set(xticks=[], yticks=[])
    return figure


def _figure(count: int, *, columns: int = 1, height: float, sharey: bool = False) -> tuple[Figure, list[Any]]:
    """A figure of the column's width with `count` panels, each `height` inches high."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[:count])


def _small(axes: Any) -> None:
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_size(7)
    axes.yaxis.label.set_size(7)


def _colour(index: int) -> str:
    """Colours that a colour-blind reader tells apart (Okabe and Ito 2008)."""
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B7500")
    return palette[index % len(palette)]
