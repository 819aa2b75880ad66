"""What MLflow's page of a registered version says of the data that its network was trained on."""

from types import SimpleNamespace

import records

from hpo.closing import descriptions
from hpo.queue.closing_result import ClosingEntry
from hpo.study.records import SplitScores
from hpo.tracking import foreign

SENTENCE = "C11: 2 of 40 labels are -999, as if they were missing: 7_cell.png (row 7), 9_cell.png (row 9). [sentinels]"


def description(*findings):
    scores = records.result(0.5).validation
    split = SplitScores(validation=scores, test=scores)
    entry = ClosingEntry(
        number=0, config=0, point={}, parameters=1, verdict="good", validation=scores, test=scores, version=1
    )
    job = SimpleNamespace(number=0, spec=records.spec(), run_name="s/0")
    study = records.study_row("s", facts=records.facts(findings=findings))
    predictors = dict.fromkeys(("mean", "volume fraction", "descriptors"), split)
    return descriptions.of_version(study, job, entry, predictors, alarms=())


def test_doubts_about_the_data_stand_in_the_description_of_a_version():
    text = description(SENTENCE)
    assert f"**Doubt about the data:** {SENTENCE}\n\n" in text
    assert text.index("Doubt") < text.index("| this model |")
    assert "Doubt" not in description()
    heads = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert heads[1:] == [
        "| this model", "| descriptors, ridge", "| volume fraction, cubic", "| mean of the training labels"
    ]  # fmt: skip


def test_many_doubts_leave_room_for_the_scores():
    text = description(*(SENTENCE.replace("C11", f"C{number}") for number in range(90)))
    assert text.count("**Doubt about the data:**") == 5 and "**85 more doubts about the data.**" in text
    assert "| this model |" in text[: foreign.LONGEST_DESCRIPTION]
