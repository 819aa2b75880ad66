"""The saved view of MLflow's web page that our links open: which columns, in which order, and which charts.

MLflow keeps a view that was shared as JSON in a tag of the experiment, plain or as "deflate;" + base64. Its fields were
read off the page of MLflow 3.17 (ExperimentPageUIState, ExperimentPageSearchFacetsState, RunsChartsCardConfig).
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

SHARE_KEY = "hpo"
CHARTS_KEY = "hpo-charts"
SORT_KEY = "best_val_nmse"
OTHERS = ("best_val_r2", "best_val_mse", "best_val_nrmse", "train_seconds")
CURVES = ("val/nmse", "train/nmse")
SECTION = "hpo-comparison"
NAME, CREATED, MODELS = "attributes.`Run Name`", "runDateAndNestInfo", "attributes.`Models`"
# Widths in pixels
NUMBER = 162  # of a number with its sign and all its digits: the page rounds none
LETTER, MARGIN = 6, 28  # of a heading


def state(params: Sequence[str], *, trials_only: bool = False) -> str:
    """The tag's value for a study over `params`: those and the summary scores as columns, best first, with charts.

    The score that sorts and the parameters come first: they can be seen without scrolling on a laptop, even beside
    the panel that MLflow opens on a first visit. The charts show the first ten runs of the list: with `trials_only`
    the best ten trials.
    """
    columns = {f"metrics.`{SORT_KEY}`": NUMBER - LETTER}  # no sign
    columns |= {f"params.`{name}`": max(len(name), 6) * LETTER + MARGIN for name in params}
    columns |= {"metrics.`best_epoch`": 10 * LETTER + MARGIN}
    columns |= {f"metrics.`{name}`": NUMBER for name in OTHERS}
    text = json.dumps(
        {
            # The study's own run has no scores. The trivial predictors stay in a list, where every score is to be seen
            # beside theirs; they have no curves.
            "searchFilter": "tags.`hpo.kind` = 'trial'" if trials_only else "tags.`hpo.kind` != 'study'",
            "orderByKey": f"metrics.`{SORT_KEY}`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": [*columns, MODELS],
            "columnOrder": [NAME, CREATED, *columns, MODELS],
            "columnWidths": {NAME: 200, CREATED: 132, MODELS: 160} | columns,
            "runsHiddenMode": "FIRST_10_RUNS",
            "compareRunCharts": _charts(params),
            "compareRunSections": [
                {"uuid": SECTION, "name": "Comparison", "columns": 2, "cardHeight": 360}
                | {"display": True, "isReordered": True, "deleted": False}
            ],
            "isAccordionReordered": True,
            "hideEmptyCharts": True,
            "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        },
        separators=(",", ":"),
    )
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _charts(params: Sequence[str]) -> list[dict[str, Any]]:
    """Curves on a logarithmic axis, the scatter of both best scores and epochs, and the parallel coordinates."""
    # The page would smooth a curve that does not say how: what is seen must be what was measured.
    line = {"scaleType": "log", "lineSmoothness": 0, "useGlobalLineSmoothing": True, "useGlobalXaxisKey": True}
    curves = [_chart("LINE", key, metricKey=key, selectedMetricKeys=[key], **line) for key in CURVES]
    axes = ({"key": "best_epoch", "type": "METRIC"}, {"key": SORT_KEY, "type": "METRIC"})
    scatter = _chart("SCATTER", SORT_KEY, xaxis=axes[0], yaxis=axes[1])
    searched = [name for name in params if name != "config"]  # which is the number of the point
    parallel = _chart("PARALLEL", SORT_KEY, selectedParams=searched, selectedMetrics=[SORT_KEY], showAllRuns=True)
    return [*curves, parallel, scatter, _chart("BAR", SORT_KEY, metricKey=SORT_KEY)]


def _chart(kind: str, of: str, **fields: Any) -> dict[str, Any]:
    common = {"uuid": f"hpo-{kind.lower()}-{of}", "type": kind, "metricSectionId": SECTION}
    return common | {"deleted": False, "isGenerated": False} | fields
