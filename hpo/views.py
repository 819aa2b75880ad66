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
SORT_KEY = "best_val_nmse"
SUMMARY = (SORT_KEY, "best_val_mse", "best_val_r2", "best_val_nrmse", "best_epoch", "train_seconds")
CURVES = ("val/nmse", "train/nmse")
SECTION = "hpo-comparison"
WIDTH = 100  # pixels of a column


def state(params: Sequence[str]) -> str:
    """The tag's value for a study over `params`: those and the summary scores as columns, best first, with charts."""
    columns = [*(f"metrics.`{name}`" for name in SUMMARY), *(f"params.`{name}`" for name in params)]
    text = json.dumps(
        {
            # The study's own run has no scores. The trivial predictors stay: every score is to be seen beside theirs.
            "searchFilter": "tags.`hpo.kind` != 'study'",
            "orderByKey": f"metrics.`{SORT_KEY}`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": [*columns, "attributes.`Models`"],
            "columnOrder": ["attributes.`Run Name`", *columns, "attributes.`Created`", "attributes.`Models`"],
            "columnWidths": {"attributes.`Run Name`": 220, "attributes.`Created`": 120} | dict.fromkeys(columns, WIDTH),
            "runsHiddenMode": "FIRST_10_RUNS",
            "compareRunCharts": _charts(params),
            "compareRunSections": [
                {"uuid": SECTION, "name": "Comparison", "display": True, "isReordered": True, "deleted": False}
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
    curves = [_chart("LINE", key, metricKey=key, selectedMetricKeys=[key], scaleType="log") for key in CURVES]
    axes = ({"key": "best_epoch", "type": "METRIC"}, {"key": SORT_KEY, "type": "METRIC"})
    scatter = _chart("SCATTER", SORT_KEY, xaxis=axes[0], yaxis=axes[1])
    parallel = _chart("PARALLEL", SORT_KEY, selectedParams=list(params), selectedMetrics=[SORT_KEY], showAllRuns=True)
    return [*curves, parallel, scatter, _chart("BAR", SORT_KEY, metricKey=SORT_KEY)]


def _chart(kind: str, of: str, **fields: Any) -> dict[str, Any]:
    common = {"uuid": f"hpo-{kind.lower()}-{of}", "type": kind, "metricSectionId": SECTION}
    return common | {"deleted": False, "isGenerated": False} | fields
