"""Plain functions from numbers to matplotlib figures. Without state and without a display: any thread may draw.

Importing this module takes half a second: import it where a figure is drawn.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hpo.scores.learning_curve import Errors
from models import metrics

Curve = Sequence[tuple[int, Mapping[str, float]]]  # (epoch, metrics), by epoch

DPI = 100  # dots an inch of a saved picture
PANEL = 2.6  # inches, the edge of one target's panel
MOST_PANELS = 12  # of a figure: targets that are plotted
STYLES = {"train": (0, (3, 1.5)), "val": "solid"}  # of a split's curve
WIDTH = 7.0  # inches
SPLITS = {"train": "training", "val": "validation"}


def svg(figure: Figure) -> str:
    """Return the figure as an SVG element, the same text for the same figure."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hpo"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def loss_curves(curves: Mapping[str, Curve], keys: Sequence[str] = ("train/nmse", "val/nmse")) -> Figure:
    """Return the metrics `keys`, such as `val/nmse`, of each labelled curve over the epochs, on a logarithmic axis.

    NMSE (MSE / variance of the training split) has no unit. A single curve has a colour for each split, several curves
    have one colour each, with the training split dashed.
    """
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for place, (label, curve) in enumerate(curves.items()):
        for index, key in enumerate(keys):
            split = key.partition("/")[0]
            words = [label] if len(curves) > 1 else []
            words += [SPLITS.get(split, split)] if len(keys) > 1 else []
            axes.plot(
                [epoch for epoch, _ in curve],
                [values.get(key, math.nan) for _, values in curve],
                color=f"C{place if len(curves) > 1 else index}",
                linestyle=STYLES.get(split, "solid"),
                linewidth=1.2,
                label=_words(", ".join(words) or label),
            )
    axes.set(yscale="log", xlabel="epoch", ylabel=" and ".join(dict.fromkeys(_metric(key) for key in keys)))
    if len(curves) == 1:
        axes.set_title(_words(next(iter(curves))), fontsize="medium")
    axes.grid(which="both", alpha=0.25)
    if curves:
        axes.legend(fontsize="small")
    return figure


def parity(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], unit: str) -> Figure:
    """Return predicted over true values, (n, k) in `unit`: a panel for each of the first twelve targets, with the
    diagonal and R² of these n. Tables have the others."""
    names = names[:MOST_PANELS]
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    r2 = metrics.scores(predicted, truth, train_variance=metrics.moments(truth)[1]).per_target["r2"]
    predicted = np.where(np.isnan(truth), np.nan, predicted)
    columns = math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    width, height = PANEL * columns, PANEL * rows
    figure = Figure(figsize=(width, height), dpi=DPI)  # a layout that is computed would take as long as the drawing
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.4, hspace=0.4
    )
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1, box_aspect=1)
        both = np.concatenate([truth[:, index], predicted[:, index]])
        ends = [end(both[np.isfinite(both)], initial=np.nan) for end in (np.fmin.reduce, np.fmax.reduce)]
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
        axes.scatter(truth[:, index], predicted[:, index], s=8, linewidths=0, alpha=0.7, zorder=2)
        score = "-" if r2[index] is None else f"{r2[index]:.3f}"
        count = np.isfinite(truth[:, index]).sum()
        labels = f"   n = {count}" if count < len(truth) else ""
        axes.set_title(_words(f"{name}   R² {score}{labels}"), fontsize="medium")
        axes.set_xlabel(_words(f"true ({unit})"), fontsize="small")
        axes.set_ylabel(_words(f"predicted ({unit})"), fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.locator_params(nbins=5)
    return figure


def main_effects(effects: Sequence[tuple[str, Any, float, int]], text: Callable[[Any], str]) -> Figure:
    """Return a panel for each parameter: mean score of all configurations with each value, which `text` writes."""
    names = list(dict.fromkeys(name for name, *_ in effects))
    figure, panels = _figure(len(names), columns=min(4, len(names)), height=2.4, sharey=True)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        means = {text(value): mean for parameter, value, mean, _ in effects if parameter == name}
        axes.plot(list(means), list(means.values()), "o-", color=_colour(0), ms=4)
        axes.set(xlabel=name, ylabel="mean validation NMSE" if index == 0 else "", yscale="log")
        axes.margins(x=0.2)
        _small(axes)
    return figure


def capacity(sizes: Sequence[int], scores: Sequence[float], lines: Mapping[str, float]) -> Figure:
    """Return the validation NMSE of all configurations over their number of parameters, and horizontal `lines`."""
    figure, (axes,) = _figure(1, height=3.0)
    axes.plot(sizes, scores, "o", ms=4, color=_colour(0), alpha=0.7)
    for index, (name, value) in enumerate(lines.items()):
        axes.axhline(value, color="0.4", lw=0.8, ls=("--", ":")[index % 2], label=name)
    axes.set(xlabel="parameters", ylabel="validation NMSE", xscale="log", yscale="log")
    axes.legend(fontsize=7)
    return figure


def pareto(
    sizes: Mapping[str, Sequence[float]], scores: Sequence[float], on_front: Sequence[bool], lines: Mapping[str, float]
) -> Figure:
    """Return a panel for each titled size: the validation NMSE of all configurations over it, those on the Pareto front
    marked, and horizontal `lines`. With one size the front is joined by steps."""
    figure, panels = _figure(len(sizes), columns=len(sizes), height=3.0, sharey=True)
    chosen, front = np.array(scores), np.array(on_front)
    for place, (axes, (title, values)) in enumerate(zip(panels, sizes.items(), strict=True)):
        x = np.array(values)
        axes.plot(x[~front], chosen[~front], "o", ms=4, color="0.6", alpha=0.7, label="dominated")
        order = np.argsort(x[front], kind="stable")
        style = {"drawstyle": "steps-post", "ls": "-"} if len(sizes) == 1 else {"ls": "none"}
        axes.plot(x[front][order], chosen[front][order], marker="o", ms=5, color=_colour(1), label="front", **style)
        for index, (name, value) in enumerate(lines.items()):
            axes.axhline(value, color="0.4", lw=0.8, ls=("--", ":", "-.")[index % 3], label=name)
        axes.set(xlabel=title, ylabel="validation NMSE" if place == 0 else "", xscale="log", yscale="log")
    panels[0].legend(fontsize=7)
    return figure


def learning_curve(images: Sequence[int], errors: Mapping[str, Errors]) -> Figure:
    """Return a panel for each of the first twelve titled errors: those of all trainings over their numbers of images,
    the power law up to twice as many (where it fits), and the baseline predictors."""
    titled = list(errors.items())[:MOST_PANELS]
    figure, panels = _figure(len(titled), columns=min(3, len(titled)), height=2.2)
    ratios = np.geomspace(min(images) / max(images), 2, 50)
    for axes, (title, one) in zip(panels, titled, strict=True):
        axes.plot(images, one.values, "o", ms=3, color=_colour(0), alpha=0.7)
        if one.law is not None and not one.law.is_poor:
            axes.plot(max(images) * ratios, one.law.now * ratios**-one.law.exponent, color=_colour(0), lw=1)
            axes.vlines(2 * max(images), *one.law.twice_interval, color=_colour(1), lw=1.5)
        for index, value in enumerate(one.baselines.values()):
            if value:
                axes.axhline(value, color="0.4", lw=0.8, ls=("--", ":")[index % 2])
        axes.set_title(_words(title), fontsize=7)
        axes.set(xlabel="training images", xscale="log", yscale="log")
        _small(axes)
    return figure


def errors(fractions: Mapping[str, np.ndarray], nrmse: np.ndarray, kinds: Sequence[str] | None) -> Figure:
    """Return the NRMSE (n,) of each cell over its volume fractions (n,): a panel for each phase, a colour for each kind
    of microstructure."""
    columns = min(2, len(fractions))
    figure, panels = _figure(len(fractions), columns=columns, height=3.0 if columns == 1 else 2.2, sharey=True)
    kind = np.array(kinds if kinds is not None else [""] * len(nrmse))
    for place, (axes, (phase, values)) in enumerate(zip(panels, fractions.items(), strict=True)):
        for index, name in enumerate(sorted(set(kind))):
            dots = values[kind == name], nrmse[kind == name]
            axes.plot(*dots, "o", ms=3.5, color=_colour(index), label=_words(name) or None)
        label = "NRMSE of the cell" if place % columns == 0 else ""
        axes.set(xlabel=f"{phase} (mean grey value)" if columns == 1 else phase, ylabel=label, ylim=(0, None))
    if kinds is not None:
        panels[0].legend(fontsize=7)
    return figure


def cells(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """Return images (n, h, w) in 0..1 side by side, with a title above each."""
    figure, panels = _figure(len(images), columns=min(5, len(images)), height=1.75)
    for axes, image, title in zip(panels, images, titles, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(_words(title), fontsize=7)
        axes.set(xticks=[], yticks=[])
    return figure


def histograms(columns: Mapping[str, np.ndarray], parts: Mapping[str, np.ndarray], *, what: str) -> Figure:
    """Return a panel for each of the first twelve columns (n,): how its numbers are distributed, as shares of each part
    of `what`, whose places in the columns are given."""
    names = list(columns)[:MOST_PANELS]
    figure, panels = _figure(len(names), columns=min(3, len(names)), height=1.9)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        values = columns[name]
        finite = values[np.isfinite(values)]
        edges = np.histogram_bin_edges(finite, bins=min(30, max(5, round(len(finite) ** 0.5))))
        for place, (part, indices) in enumerate(parts.items()):
            inside = values[indices]
            inside = inside[np.isfinite(inside)]
            weights = np.full(len(inside), 1 / max(1, len(inside)))
            axes.hist(inside, edges, weights=weights, histtype="step", color=_colour(place), label=part)
        axes.set(xlabel=_words(name), ylabel=f"share of the {what}" if index % 3 == 0 else "")
        axes.locator_params(axis="x", nbins=5)
        _small(axes)
    if names and len(parts) > 1:
        panels[0].legend(fontsize=6, frameon=False)
    return figure


def clouds(x: np.ndarray, label: str, columns: Mapping[str, np.ndarray]) -> Figure:
    """Return a panel for each of the first twelve columns (n,), over x (n,), whose axis has this label."""
    names = list(columns)[:MOST_PANELS]
    figure, panels = _figure(len(names), columns=min(3, len(names)), height=1.9)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        axes.plot(x, columns[name], ".", ms=2.5, color=_colour(0), alpha=0.6, rasterized=True)
        axes.set(ylabel=_words(name), xlabel=_words(label) if index >= len(names) - 3 else "")
        axes.locator_params(nbins=5)
        _small(axes)
    return figure


def correlations(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Return correlations (k, k), NaN where undefined, as colours, with their numbers if there are few."""
    size = max(2.6, min(WIDTH, 1.6 + 0.5 * len(names)))
    figure = Figure(figsize=(size, 0.85 * size), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    places, labels = range(len(names)), [_words(name) for name in names]
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    _small(axes)
    for row, column in np.argwhere(np.isfinite(matrix)) if len(names) <= MOST_PANELS else ():
        value = matrix[row, column]
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", color=colour, fontsize=6, ha="center", va="center")
    figure.colorbar(drawn, ax=axes, shrink=0.7).ax.tick_params(labelsize=7)
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
    """Return a colour that a colour-blind reader can tell from the others (Okabe and Ito 2008)."""
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B7500")
    return palette[index % len(palette)]


def _words(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar sign begins no formula, an underscore hides no curve."""
    return text.replace("$", r"\$").lstrip("_")


def _metric(key: str) -> str:
    """What an axis says of `val/nmse`."""
    name = key.rpartition("/")[2]
    return "NMSE (MSE / variance of the training split)" if name == "nmse" else name
