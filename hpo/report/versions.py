"""What is said of models that were trained on different versions of a data set."""

from hpo.queue.closing_result import ClosingResult, ScoredVersion
from hpo.report import tables
from hpo.report.tables import Table
from hpo.study.records import NEW, OLD
from hpo.text import score_text

SCORES = {"nmse": "NMSE", "r2": "R²"}  # that stand in the table
NOTE = (
    "Old test images: those of the data set that the first of these models was trained on; the others are new in this "
    "one. NMSE by the variance of the training labels of this one. No election looks at these scores."
)


def sentences(ended: ClosingResult) -> list[str]:
    """Return sentences on the champion beside the best version of each other data set of the line."""
    election, sentences = ended.election, []
    for other in (election.compared if election else None) or ():
        what = f"the best version trained on {other.data} (version {other.version}, study {other.study})"
        if other.on is None:
            sentences.append(f"@champion is not compared with {what}: it has no score on images of both data sets.")
        else:
            sentences.append(
                f"On the validation images of {other.on}, which both data sets have, @champion has the NMSE "
                f"{score_text(other.champion_nmse)}, and {what} {score_text(other.nmse)}."
            )
    return sentences + [
        f"{_title(tested)}, could not be scored on the test images of this data set: {tested.fault}"
        for tested in ended.tested or ()
        if tested.fault
    ]


def of_test(ended: ClosingResult, *, name: str = "versions-test") -> list[Table]:
    """Return the scores of the best version of an earlier data set beside those of the winners, on the test images that
    are old and those that are new; no table without such a version."""
    if ended.tested is None:
        return []
    records = [
        {"model": _title(tested), "trained on": tested.data}
        | {
            f"{head}, {part}": getattr(tested.tests[part], score) if tested.tests and part in tested.tests else None
            for part in (OLD, NEW)
            for score, head in SCORES.items()
        }
        for tested in ended.tested
    ]
    return [tables.of_records(records, name=name, title="Test images, old and new", note=NOTE, left=("trained on",))]


def _title(tested: ScoredVersion) -> str:
    before = f", version {tested.version}, the best on earlier data" if tested.version is not None else ""
    return f"{tested.study}{before}"
