"""Plain functions from numbers to matplotlib figures. Without state and without a display: any thread may draw.

Importing this module takes half a second: import it where a figure is drawn.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from models import metrics

Curve = Sequence[tuple[int, Mapping[str, float]]]  # (epoch, metrics), by epoch

DPI = 100  # dots an inch of a saved picture
PANEL = 2.6  # inches, the edge of one target's panel
STYLES = {"train": (0, (3, 1.5)), "val": "solid"}  # of a split's curve
SPLITS = {"train": "training", "val": "validation"}


def loss_curves(curves: Mapping[str, Curve], keys: Sequence[str] = ("train/nmse", "val/nmse")) -> Figure:
    """The metrics `keys`, such as `val/nmse`, of each labelled curve over the epochs, on a logarithmic axis.

    NMSE (MSE / variance of the training split) has no unit. One curve is told by the colour of its splits, several
    by one colour each, with the training split dashed.
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
                label=", ".join(words) or label,
            )
    axes.set(yscale="log", xlabel="epoch", ylabel=" and ".join(dict.fromkeys(_metric(key) for key in keys)))
    if len(curves) == 1:
        axes.set_title(next(iter(curves)), fontsize="medium")
    axes.grid(which="both", alpha=0.25)
    if curves:
        axes.legend(fontsize="small")
    return figure


def parity(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str], unit: str) -> Figure:
    """Predicted over true values, both (n, k) in `unit`: a panel a target, with the diagonal and R² of these n."""
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    r2 = metrics.scores(predicted, truth, train_variance=truth.var(axis=0))["per_target"]["r2"]
    columns = math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    width, height = PANEL * columns, PANEL * rows
    figure = Figure(figsize=(width, height), dpi=DPI)  # a layout that is computed would take as long as the drawing
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.4, hspace=0.4
    )
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1, box_aspect=1)
        ends = [np.nanmin([truth[:, index], predicted[:, index]]), np.nanmax([truth[:, index], predicted[:, index]])]
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
        axes.scatter(truth[:, index], predicted[:, index], s=8, linewidths=0, alpha=0.7, zorder=2)
        score = f"{r2[index]:.3f}" if math.isfinite(r2[index]) else "-"
        axes.set_title(f"{name}   R² {score}", fontsize="medium")
        axes.set_xlabel(f"true ({unit})", fontsize="small")
        axes.set_ylabel(f"predicted ({unit})", fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.locator_params(nbins=5)
    return figure


def _metric(key: str) -> str:
    """What an axis says of `val/nmse`."""
    name = key.rpartition("/")[2]
    return "NMSE (MSE / variance of the training split)" if name == "nmse" else name
