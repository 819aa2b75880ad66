"""MLflow's pages about a study, and how long the name may be that they bear. Nothing here imports MLflow."""

from hpo.study.records import StudyFacts
from hpo.tracking import foreign

# Of a study with all that stands behind its name. It is the name of an experiment, which gets " (deleted 123)" behind
# it, an alias, and the beginning of each run's name, where a trial's number and some parameters must fit as well.
LONGEST_STUDY_NAME = 210
LIST_VIEW, CHARTS_VIEW = "hpo", "hpo-charts"  # keys of the saved views


def trials(uri: str, experiment_id: str) -> str:
    """Return the page that lists the study's trials, the best first."""
    return foreign.runs_link(uri, experiment_id, view=LIST_VIEW)


def charts(uri: str, experiment_id: str) -> str:
    """Return the page with charts of the study's best ten trials."""
    return foreign.runs_link(uri, experiment_id, view=CHARTS_VIEW, charts=True)


def data_page(facts: StudyFacts) -> str:
    """Return a link, in Markdown, to the page on images and labels at the study's run; nothing if there is none."""
    if facts.page is None:
        return ""
    return f"[Images and labels]({foreign.file_link(facts.experiment_id, facts.study_run_id, facts.page)})"
